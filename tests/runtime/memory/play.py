"""A layout is played: every byte remembers its writer, every read knows who that should be."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fastvar.engines.bundle.manifest import EDGE_OUTSIDE, Manifest
from fastvar.runtime.memory.layout import EngineCall, Layout, StepCalls, View, WeightView
from fastvar.runtime.memory.stripes import WITH_HALO

SCRATCH = -2  # in place of a writer: what an engine left in its scratch memory


@dataclass
class Play:
    """Who wrote what is read: reads[reader, tensor] = [(writer, tensor, bytes), ...], in the order of the bytes."""

    manifest: Manifest
    layout: Layout
    reads: dict[tuple[Any, str], list[tuple[Any, str, int]]] = field(default_factory=dict)
    written: list[tuple[Any, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._owner = np.full(self.layout.arena_bytes, -1)
        layout = self.layout
        self.call("encoder", layout.encoder, host=("image",))
        self.read("image tokens", {"latent": views(layout.encoder)["latent"]} if layout.encoder else {})
        self.call("prompt", layout.text_encoder, host=("ids", "attention_mask"))
        self.call("negative", layout.uncond_encoder, host=("ids", "attention_mask"))
        self.call("conditioning", layout.conditioning, host=("mask",))
        for call in layout.layer_conditioning:
            self.call(("text_kv", call.layer), call)
        settings = ("summed", "tau", "cut", "guidance")
        self.write("settings", {n: v for n, v in views(layout.steps[0].sampling_head).items() if n in settings})
        for position, step in enumerate(layout.steps):
            self.step(position, step)
        for number, call in enumerate(layout.decode):
            self.call(("decode", number) if self.manifest.tiles else "decoder", call)
        assert layout.image is not None
        self.read("user", {"image": layout.image})

    def step(self, position: int, calls: StepCalls) -> None:
        self.write(("host", position), {"noise": calls.drawn["noise"]})
        self.read(("host", position), {"block_in": calls.block_in})
        for name, call in zip(itertools.cycle(("qkv", "attn_mlp")), calls.layers, strict=False):
            self.call((name, position, call.layer), call)
        self.call(("sampling_head", position), calls.sampling_head)
        results = {"logits": views(calls.sampling_head)["logits"], "summed_out": calls.summed}
        kept = {f"{layer}.{name}": view for layer, found in calls.kept.items() for name, view in found.items()}
        self.read(("host", position), {**results, **kept})

    def call(self, label: Any, call: EngineCall | None, host: tuple[str, ...] = ()) -> None:
        if call is None:
            return
        spec, bound = self.manifest.engines[call.engine], views(call)
        self.write(("host", label), {name: bound[name] for name in host})
        if label == "prompt":
            self.write("brought", dict(self.layout.offloaded_weights))
        if call.scratch is not None:
            self._owner[extent(self.layout, call.scratch)] = SCRATCH
        self.read(label, {t.name: within(call, t.name, bound[t.name]) for t in spec.inputs if t.name in bound})
        self.write(label, {t.name: bound[t.name] for t in spec.outputs})
        for copy in call.copies:  # what is read at the target was written by who wrote the source
            self._owner[extent(self.layout, copy.target)] = self._owner[extent(self.layout, copy.source)]

    def write(self, label: Any, tensors: dict[str, View]) -> None:
        for name, view in tensors.items():
            self._owner[extent(self.layout, view)] = len(self.written)
            self.written.append((label, name))

    def read(self, label: Any, tensors: dict[str, View]) -> None:
        for name, view in tensors.items():
            owners = self._owner[extent(self.layout, view)]
            assert (owners != SCRATCH).all(), f"{label} reads {name} where an engine worked"
            assert (owners >= 0).all(), f"{label} reads {name} where nobody has written"
            ends = [*(np.flatnonzero(np.diff(owners)) + 1).tolist(), len(owners)]
            starts = [0, *ends[:-1]]
            self.reads[label, name] = [
                (*self.written[owners[start]], end - start) for start, end in zip(starts, ends, strict=True)
            ]

    def whole(self, label: Any, name: str) -> tuple[Any, str]:
        """The one writer of all that is read."""
        ((writer, tensor, _),) = self.reads[label, name]
        return writer, tensor


def views(call: EngineCall) -> dict[str, View]:
    return {name: view for name, view in call.tensors.items() if isinstance(view, View)}


def within(call: EngineCall, name: str, view: View) -> View:
    """Without the rows beyond the image that a stripe at its end is bound to."""
    outside = [call.tensors.get(end) for end in ("above", "below")] if name in WITH_HALO else []
    above, below = (isinstance(end, WeightView) and end.name == EDGE_OUTSIDE for end in outside or (None, None))
    rows, *rest = view.shape
    row_bytes = view.size // rows
    return replace(view, start=view.start + above * row_bytes, shape=(rows - above - below, *rest))


def extent(layout: Layout, view: View) -> slice:
    start = layout.buffers[view.buffer].offset + view.start
    return slice(start, start + view.size)


def all_calls(layout: Layout) -> Iterator[EngineCall]:
    once = (layout.encoder, layout.text_encoder, layout.uncond_encoder, layout.conditioning, *layout.layer_conditioning)
    yield from (call for call in once if call is not None)
    for step in layout.steps:
        yield from (*step.layers, step.sampling_head)
    yield from layout.decode
