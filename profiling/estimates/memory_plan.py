"""The memory of a generation over time, computed from the layout before anything runs.

The sums are the bytes that runtime/memory/arena.py allocates when the pipeline is loaded; the timeline says which of
them are in use. On the host the library of the engines allocates more, which is estimated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from ...engines.bundle.manifest import Manifest
from ...engines.registry import runs_on_host
from ...runtime.memory.fit import DeviceNeed, total_need
from ...runtime.memory.layout import TEXT_ENCODER_WEIGHTS, EngineCall, Layout, View, build_layout
from ...runtime.memory.placement import aligned
from .passes import PassLaunches, pass_launches


class Part(str, Enum):
    """Purposes of memory."""

    WEIGHTS = "weights"
    TEXT_ENCODER = "text encoder"
    KEYS = "keys and values"
    TEXT_KEYS = "text keys"
    TOKEN_CACHES = "token caches"
    ACTIVATIONS = "activations"
    WORKSPACE = "workspace"
    DECODER = "decoder"
    LIBRARY = "library"


# Prefixes of slot names (runtime/memory/layout.py), the longer before the shorter. All other slots are activations.
_SLOTS = {
    TEXT_ENCODER_WEIGHTS: Part.TEXT_ENCODER,
    "text_keys.": Part.TEXT_KEYS,
    "text_values.": Part.TEXT_KEYS,
    "keys.": Part.KEYS,
    "values.": Part.KEYS,
    "cache_": Part.TOKEN_CACHES,
    "scratch.": Part.WORKSPACE,
    "image": Part.DECODER,
    "decoder": Part.DECODER,
}


@dataclass(frozen=True)
class TimelineEntry:
    """Bytes in use, by part, during a step of a generation."""

    what: str
    used: Mapping[Part, int]

    @property
    def total(self) -> int:
        return sum(self.used.values())


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes allocated, and the timeline of bytes in use by a pass of `images` with `rows` guidance rows each.

    `launches` are those of every pass that engines are made for.
    """

    rows: int
    need: DeviceNeed
    moments: tuple[TimelineEntry, ...]
    images: int = 1
    launches: tuple[PassLaunches, ...] = ()

    @property
    def peak(self) -> TimelineEntry:
        return max(self.moments, key=lambda moment: moment.total)


def memory_plan(manifest: Manifest, *, offload_text_encoder: bool = False) -> MemoryPlan:
    """The plan of a bundle on its device, with the timeline of the pass that needs most memory."""
    on_host = runs_on_host(manifest)
    offload_text_encoder = offload_text_encoder and not on_host
    layouts = [build_layout(manifest, *s.batch, offload_text_encoder=offload_text_encoder) for s in manifest.sets]
    largest = max(layouts, key=lambda layout: layout.arena_bytes)
    need = total_need(manifest, layouts, on_host=on_host)
    resident = {**_resident(layouts), Part.LIBRARY: need.library_bytes}
    launches = tuple(pass_launches(manifest, layout) for layout in layouts)
    return MemoryPlan(largest.rows, need, tuple(_moments(largest, resident)), largest.images, launches)


def _resident(layouts: Sequence[Layout]) -> dict[Part, int]:
    """Bytes of resident weights, by part."""
    named = {name: weight for layout in layouts for name, weight in layout.weights().items()}
    used = {Part.WEIGHTS: 0, Part.TEXT_ENCODER: 0}
    for name, weight in named.items():
        part = Part.TEXT_ENCODER if name.startswith("text_encoder.") else Part.WEIGHTS
        used[part] += aligned(weight.size)
    return used


def _moments(layout: Layout, resident: dict[Part, int]) -> Iterator[TimelineEntry]:
    """A slot is in use from the first to the last moment that reads or writes it."""
    stages = list(_stages(layout))
    last = {view.buffer: number for number, (_, calls) in enumerate(stages) for view in _views(calls)}
    extent: dict[str, int] = {}  # of the slots so far
    for number, (what, calls) in enumerate(stages):
        for view in _views(calls):
            extent[view.buffer] = max(extent.get(view.buffer, 0), view.start + view.size)
        used = dict.fromkeys(Part, 0) | resident
        for slot, size in extent.items():
            if number <= last[slot]:
                used[part_of(slot)] += size
        yield TimelineEntry(what, used)


def part_of(slot: str) -> Part:
    """The part that a slot of the layout belongs to."""
    return next((part for start, part in _SLOTS.items() if slot.startswith(start)), Part.ACTIVATIONS)


def _stages(layout: Layout) -> Iterator[tuple[str, list[EngineCall]]]:
    """Names of the moments with their launches, in order."""
    encoders = [call for call in (layout.text_encoder, layout.uncond_encoder) if call is not None]
    if encoders:
        yield "text", encoders
    assert layout.conditioning is not None
    yield "conditioning", [layout.conditioning, *layout.layer_conditioning]
    for calls in layout.steps:
        h, w = calls.step.size
        yield f"scale {calls.step.index}, {w}x{h}", list(calls.calls)
    yield "decoder", layout.decode  # of one image after the other


def _views(calls: Sequence[EngineCall]) -> Iterator[View]:
    for call in calls:
        yield from (binding for binding in call.tensors.values() if isinstance(binding, View))
        if call.scratch is not None:
            yield call.scratch
        yield from (view for copy in call.copies for view in (copy.source, copy.target))
