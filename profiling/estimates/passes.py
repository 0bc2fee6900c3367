"""The passes that a bundle has engines for: what is launched in each, and what loading up to each takes.

Counted from the layout alone, before anything runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...engines.bundle.manifest import Manifest
from ...engines.registry import runs_on_host
from ...runtime.memory.fit import DeviceNeed, total_need
from ...runtime.memory.layout import Layout
from ...runtime.memory.soundness import sound_layout


@dataclass(frozen=True)
class PassLaunches:
    """Launches of one pass, without negative prompts.

    `engines` counts them engine by engine; `recorded` counts what a GPU is given where the launches of a scale are
    recorded as one graph; `kernels` are those inside the engines, None where their compiler reported none.
    """

    guidance_rows: int
    images: int
    engines: int
    recorded: int
    kernels: int | None

    @property
    def engines_an_image(self) -> float:
        return self.engines / self.images

    @property
    def recorded_an_image(self) -> float:
        return self.recorded / self.images


def pass_launches(manifest: Manifest, layout: Layout) -> PassLaunches:
    """Texts are encoded and images decoded one after the other; all else a pass launches once, whatever its images."""
    assert layout.conditioning is not None
    texts = [] if layout.text_encoder is None else [layout.text_encoder]
    once = [layout.conditioning, *layout.layer_conditioning, *(call for step in layout.steps for call in step.calls)]
    launched = [*once, *[*texts, *layout.decode] * layout.images]
    kernels = [manifest.engines[call.engine].report.kernels for call in launched]
    recorded = 1 + len(layout.steps) + (len(texts) + 1) * layout.images  # of the condition, the scales, the decoder
    return PassLaunches(layout.rows, layout.images, len(launched), recorded, sum(kernels) if all(kernels) else None)


@dataclass(frozen=True)
class PassMemory:
    """What loading a bundle for passes of at most `images` takes."""

    images: int
    guidance_rows: tuple[int, ...]  # of the sets with so many images
    activation_bytes: tuple[int, ...]  # of a pass with each of these
    need: DeviceNeed


def passes_of(manifest: Manifest, *, offload_text_encoder: bool = False) -> list[PassMemory]:
    """Every number of images that the bundle has engines for, in rising order; as a session loads them.

    Raises:
        BundleError: its engines do not fit together.
    """
    on_host = runs_on_host(manifest)
    offloads = offload_text_encoder and not on_host
    layouts = [sound_layout(manifest, *own.batch, offload_text_encoder=offloads) for own in manifest.sets]
    return list(_passes(manifest, layouts, on_host))


def _passes(manifest: Manifest, layouts: Sequence[Layout], on_host: bool) -> Iterator[PassMemory]:
    for images in sorted({layout.images for layout in layouts}):
        own = [layout for layout in layouts if layout.images == images]
        smaller = [layout for layout in layouts if layout.images <= images]
        rows = tuple(layout.rows for layout in own)
        arenas = tuple(layout.arena_bytes for layout in own)
        yield PassMemory(images, rows, arenas, total_need(manifest, smaller, on_host=on_host))


def largest_that_fits(passes: Sequence[PassMemory], budget: int) -> int:
    """How many images a pass may draw at most within a budget of bytes; 0 where not even one fits."""
    return max((found.images for found in passes if found.need.total_bytes <= budget), default=0)
