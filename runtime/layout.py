"""The memory layout of a generation: every buffer, and what each engine launch is bound to. Pure data.

Nothing here touches memory or a library, so that every binding of every step can be checked anywhere.
Weights are named, not placed: they live in the memory-mapped weight file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..engines.dtypes import size_bytes
from ..engines.manifest import EngineSet, Manifest
from ..errors import InternalError
from ..plan import StepPlan

ALIGNMENT = 256  # bytes; what CUDA allocations give, and more than any CPU kernel asks for


@dataclass(frozen=True)
class Slot:
    """A named piece of the arena. Offsets and sizes in bytes."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class View:
    """A tensor inside a slot, `start` bytes from its beginning."""

    slot: str
    start: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return size_bytes(self.dtype, self.shape)


@dataclass(frozen=True)
class WeightView:
    """A whole tensor of the weight file."""

    name: str


Binding = View | WeightView


@dataclass(frozen=True)
class EngineCall:
    """One engine launch with everything it is bound to. `layer` is None for engines that run once."""

    engine: str
    tensors: Mapping[str, Binding]
    layer: int | None = None


@dataclass(frozen=True)
class StepCalls:
    """The launches of one scale, in order, and where the host writes and reads."""

    step: StepPlan
    layers: tuple[EngineCall, ...]
    bridge: EngineCall
    noise: View
    block_in: View
    summed: View
    kept: Mapping[int, Mapping[str, View]]  # layer -> sub-layer -> indices into [L * R]


@dataclass
class Layout:
    """All slots and launches of one image."""

    rows: int
    slots: dict[str, Slot] = field(default_factory=dict)
    text_encoder: EngineCall | None = None
    uncond_encoder: EngineCall | None = None
    condition: EngineCall | None = None
    text_kv: list[EngineCall] = field(default_factory=list)
    steps: list[StepCalls] = field(default_factory=list)
    decoder: EngineCall | None = None
    image: View | None = None
    arena_bytes: int = 0


class Planner:
    """Lays out one engine set: slots are sized by the largest tensor they ever hold, then placed in a row."""

    def __init__(self, manifest: Manifest, rows: int) -> None:
        self.manifest, self.set = manifest, manifest.engine_set(rows)
        self.layout = Layout(rows)
        self.sizes: dict[str, int] = {}
        # The residual stream alternates between two slots: every block and bridge reads one and writes the other.
        self.x, self.other = "x0", "x1"

    def plan(self) -> Layout:
        self._text()
        for position, step in enumerate(self.manifest.plan.steps):
            self.layout.steps.append(self._step(position, step, self.set))
        self._decoder()
        self._place()
        return self.layout

    def _bind(self, engine: str, slots: Mapping[str, tuple[str, int]], layer: int | None = None) -> EngineCall:
        """Bind an engine: weights by their pattern, everything else to the slot (and start byte) given for it."""
        spec = self.manifest.engines[engine]
        tensors: dict[str, Binding] = {}
        for tensor in (*spec.inputs, *spec.outputs):
            if tensor.name in spec.weights:
                tensors[tensor.name] = WeightView(spec.weights[tensor.name].format(layer=layer))
                continue
            if tensor.name not in slots:
                raise InternalError(f"engine {engine}: nothing is planned for its tensor {tensor.name!r}")
            slot, start = slots[tensor.name]
            tensors[tensor.name] = View(slot, start, tensor.dtype, tensor.shape)
            self.sizes[slot] = max(self.sizes.get(slot, 0), start + size_bytes(tensor.dtype, tensor.shape))
        return EngineCall(engine, tensors, layer)

    def _text(self) -> None:
        m, layout = self.manifest, self.layout
        encoder = {"ids": ("ids", 0), "attention_mask": ("attention_mask", 0)}
        if m.text_encoder:
            layout.text_encoder = self._bind(m.text_encoder, {**encoder, "features": ("cond", 0)})
            if layout.rows == 2:
                layout.uncond_encoder = self._bind(m.text_encoder, {**encoder, "features": ("uncond", 0)})
        names = ("cond", "uncond", "mask", "text", "modulation", "head_modulation", "text_bias")
        layout.condition = self._bind(self.set.condition, {**{n: (n, 0) for n in names}, "x": ("x0", 0)})
        for layer in range(m.plan.depth):
            slots = {
                "text": ("text", 0),
                "text_keys": (f"text_keys.{layer}", 0),
                "text_values": (f"text_values.{layer}", 0),
            }
            layout.text_kv.append(self._bind(self.set.text_kv, slots, layer))

    def _step(self, position: int, step: StepPlan, engines: EngineSet) -> StepCalls:
        names = engines.steps[position]
        calls: list[EngineCall] = []
        kept: dict[int, dict[str, View]] = {}
        for layer in range(self.manifest.plan.depth):
            pruned = self.manifest.plan.policy.prunes(layer)
            project = self._project(names.project_pruned if pruned else names.project, step, layer)
            attend = self._attend(names.attend_pruned if pruned else names.attend, layer)
            calls += (project, attend)
            if pruned and step.prunes:
                found = (project.tensors["kept"], attend.tensors["kept_ca"], attend.tensors["kept_ffn"])
                kept[layer] = {n: v for n, v in zip(("sa", "ca", "ffn"), found, strict=True) if isinstance(v, View)}
            self.x, self.other = self.other, self.x
        summed = ("summed0", "summed1") if position % 2 == 0 else ("summed1", "summed0")
        bridge = self._bridge(names.bridge, summed)
        self.x, self.other = self.other, self.x
        first = calls[0].tensors["x"]
        noise, total = bridge.tensors["noise"], bridge.tensors["summed_out"]
        assert isinstance(first, View)
        assert isinstance(noise, View)
        assert isinstance(total, View)
        return StepCalls(step, tuple(calls), bridge, noise, first, total, kept)

    def _project(self, engine: str, step: StepPlan, layer: int) -> EngineCall:
        past = step.past_pruned if self.manifest.plan.policy.prunes(layer) else step.past_dense
        keys = self.manifest.engines[engine].tensor("keys")
        start = past * size_bytes(keys.dtype, keys.shape[1:])
        cache = {name: (f"{name}.{layer}", start) for name in ("keys", "values")}
        slots = {"x": (self.x, 0), "modulation": ("modulation", 0), "q": ("q", 0), "kept": (f"kept_sa.{layer}", 0)}
        return self._bind(engine, {**slots, **cache}, layer)

    def _attend(self, engine: str, layer: int) -> EngineCall:
        own = ("keys", "values", "text_keys", "text_values", "kept_ca", "kept_ffn")
        slots = {name: (f"{name}.{layer}", 0) for name in own}
        slots |= {name: (name, 0) for name in ("q", "text_bias", "modulation")}
        slots |= {"x": (self.x, 0), "x_out": (self.other, 0), "kept": (f"kept_sa.{layer}", 0)}
        for sub_layer in ("sa", "ca", "ffn"):
            # Written at the cached scale, read at the pruned ones.
            slots |= {f"{end}_{sub_layer}": (f"cache_{sub_layer}.{layer}", 0) for end in ("cache", "cached")}
        return self._bind(engine, slots, layer)

    def _bridge(self, engine: str, summed: tuple[str, str]) -> EngineCall:
        slots = {name: (name, 0) for name in ("head_modulation", "noise", "guidance", "tau", "cut", "logits")}
        slots |= {"x": (self.x, 0), "x_next": (self.other, 0)}
        slots |= {"summed": (summed[0], 0), "summed_out": (summed[1], 0)}
        return self._bind(engine, slots)

    def _decoder(self) -> None:
        layout = self.layout
        last = layout.steps[-1].summed
        layout.decoder = self._bind(self.manifest.decoder, {"summed": (last.slot, 0), "image": ("image", 0)})
        image = layout.decoder.tensors["image"]
        assert isinstance(image, View)
        layout.image = image

    def _place(self) -> None:
        offset = 0
        for name, size in self.sizes.items():
            self.layout.slots[name] = Slot(name, offset, size)
            offset += -(-size // ALIGNMENT) * ALIGNMENT
        self.layout.arena_bytes = offset


def lay_out(manifest: Manifest, rows: int) -> Layout:
    """Plan the memory and the launches of one image with `rows` guidance rows."""
    return Planner(manifest, rows).plan()
