"""Whether a bundle fits into a device's free memory, and which choices would make it fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...core.dtypes import human_bytes, storage_dtype
from ...engines.bundle.estimates import library_bytes, packed_bytes
from ...engines.bundle.manifest import Manifest
from ...errors import DeviceMemoryError
from .arena import place_weights
from .layout import Layout, WeightView, build_layout

LAYER_WEIGHTS = ".blocks."  # in the name of a layer's own weights


@dataclass(frozen=True)
class DeviceNeed:
    """Bytes that a pipeline takes: weights and arena are its own, the rest is what the engines' library takes.

    `packed_bytes` are not needed: matrices are packed for speed, where there is room for it (`Backend.pack_weights`).
    """

    weight_bytes: int
    arena_bytes: int
    library_bytes: int = 0
    on_host: bool = False  # engines share the memory of the machine
    packed_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.arena_bytes + self.library_bytes


def device_need(layouts: Sequence[Layout]) -> DeviceNeed:
    """What these layouts take together, exactly as `Memory` allocates it on a device of its own memory."""
    return DeviceNeed(place_weights(layouts)[1], max(layout.arena_bytes for layout in layouts))


def total_need(manifest: Manifest, layouts: Sequence[Layout], *, on_host: bool) -> DeviceNeed:
    """The same with what the engines' library allocates by itself, estimated (engines/bundle/estimates.py).

    On the host weights are the mapped file.
    """
    own = {"library_bytes": library_bytes(manifest), "packed_bytes": packed_bytes(manifest)}
    return replace(device_need(layouts), **own, on_host=on_host)


def require_fit(
    manifest: Manifest,
    layouts: Sequence[Layout],
    need: DeviceNeed,
    *,
    free_bytes: int | None,
    budget_bytes: int | None,
    offloads: bool,
) -> None:
    """Refuse before anything is allocated.

    Raises:
        DeviceMemoryError: names what is needed, what is free or allowed, and the choices that would fit.
    """
    # On the host the engines' library takes memory too, and `free_bytes` is all that the machine or container has.
    known = ((free_bytes, "are all there is" if need.on_host else "are free"), (budget_bytes, "are its budget"))
    limits = [(n, what) for n, what in known if n is not None]
    limit, what = min(limits, default=(need.total_bytes, ""))
    if need.total_bytes <= limit:
        return
    ways = [] if need.on_host else _smaller(manifest, layouts, offloads, need.library_bytes)
    fitting = [f"{how}: {human_bytes(n)}" for how, n in ways if n <= limit]
    library = f", {human_bytes(need.library_bytes)} for the library" if need.library_bytes else ""
    raise DeviceMemoryError(
        f"this bundle needs {human_bytes(need.total_bytes)} of memory ({human_bytes(need.weight_bytes)} weights, "
        f"{human_bytes(need.arena_bytes)} for drawing{library}), {human_bytes(limit)} {what}",
        expected="room for all of it when the bundle is loaded",
        fix="; ".join(fitting) or "no option of this model fits: choose a smaller --size or a smaller model",
    )


def _smaller(manifest: Manifest, layouts: Sequence[Layout], offloads: bool, library: int) -> list[tuple[str, int]]:
    """Ways to need less, with what each leads to: single ones first, then together."""
    batches = [(layout.rows, layout.images) for layout in layouts]
    offload = "load with offload_text_encoder=True (--offload-text-encoder)"
    guidance, quantised = "build with --guidance off", "build with --weights int8"

    def total(batches: Sequence[tuple[int, int]], offloaded: bool) -> int:
        made = [build_layout(manifest, *batch, offload_text_encoder=offloaded) for batch in batches]
        return library + device_need(made).total_bytes

    can_offload = bool(manifest.text_encoder) and not offloads
    saved = 0 if manifest.precision.weights else _matrix_bytes(layouts, manifest) // 2
    ways: list[tuple[str, int]] = []
    if can_offload:
        ways.append((offload, total(batches, True)))
    if saved:
        ways.append((quantised, total(batches, offloads) - saved))
    if can_offload and saved:
        ways.append((f"{quantised}, and {offload}", total(batches, True) - saved))
    unguided = [batch for batch in batches if batch[0] == 1]
    if unguided and len(unguided) < len(batches):
        ways.append((guidance, total(unguided, offloads)))
    return ways


def _matrix_bytes(layouts: Sequence[Layout], manifest: Manifest) -> int:
    """The layers' matrices: what 8-bit weights halve in a 16-bit build."""
    weights: dict[str, WeightView] = {n: w for layout in layouts for n, w in layout.weights().items()}
    wide = storage_dtype(manifest.precision.compute).itemsize == 2
    matrices = (w for n, w in weights.items() if LAYER_WEIGHTS in n and len(w.shape) == 2 and w.dtype != "float32")
    return sum(w.size for w in matrices) if wide else 0
