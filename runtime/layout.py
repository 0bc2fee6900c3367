"""The memory layout of a generation: every buffer, and what each engine launch is bound to. Pure data.

Nothing here touches memory or a library, so that every binding of every step can be checked anywhere.
Weights are named, not placed (memory.py places them), but for those of a text encoder that leaves the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from ..engines.dtypes import size_bytes
from ..engines.manifest import EngineSet, Manifest, TensorSpec
from ..errors import InternalError
from ..plan import StepPlan
from .placement import Need, Phase, Slot, aligned, place
from .stripes import TiledDecoder


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
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return size_bytes(self.dtype, self.shape)


Binding = View | WeightView
TEXT_ENCODER_WEIGHTS = "text_encoder_weights"  # the slot of weights that are brought for every prompt


@dataclass(frozen=True)
class Copy:
    """A tensor that an engine wrote, to its place."""

    source: View
    target: View


@dataclass(frozen=True)
class EngineCall:
    """One engine launch with everything it is bound to.

    `layer` is a transformer's by number or an image decoder's by key, None for engines that run once. `scratch` is
    memory that the engine uses while it runs; all engines of a phase share it. `copies` are made behind it: tensors
    that belong where the engine's library accepts no address.
    """

    engine: str
    tensors: Mapping[str, Binding]
    layer: int | str | None = None
    scratch: View | None = None
    copies: tuple[Copy, ...] = ()


@dataclass(frozen=True)
class StepCalls:
    """The launches of one scale, in order, and where the host writes and reads. `rows` are its guidance rows."""

    step: StepPlan
    rows: int
    layers: tuple[EngineCall, ...]
    bridge: EngineCall
    noise: View
    block_in: View
    summed: View
    kept: Mapping[int, Mapping[str, View]]  # layer -> sub-layer -> indices into [L * R]


@dataclass
class Layout:
    """All slots and launches of one image.

    `brought` are the text encoder's weights with their places, where they do not stay on the device.
    """

    rows: int
    slots: dict[str, Slot] = field(default_factory=dict)
    encoder: EngineCall | None = None
    text_encoder: EngineCall | None = None
    uncond_encoder: EngineCall | None = None
    condition: EngineCall | None = None
    text_kv: list[EngineCall] = field(default_factory=list)
    steps: list[StepCalls] = field(default_factory=list)
    decode: list[EngineCall] = field(default_factory=list)
    image: View | None = None
    brought: dict[str, View] = field(default_factory=dict)
    arena_bytes: int = 0

    def calls(self) -> Iterator[EngineCall]:
        """Every launch, in order."""
        once = (self.encoder, self.text_encoder, self.uncond_encoder, self.condition, *self.text_kv)
        yield from (call for call in once if call is not None)
        for step in self.steps:
            yield from (*step.layers, step.bridge)
        yield from self.decode

    def weights(self) -> dict[str, WeightView]:
        """The weights that stay where they are, by name."""
        bindings = (binding for call in self.calls() for binding in call.tensors.values())
        return {binding.name: binding for binding in bindings if isinstance(binding, WeightView)}


class Planner:
    """Lays out one engine set: a slot is as large as the largest tensor it ever holds, and lives from the first
    phase it is used in to the last.
    """

    def __init__(self, manifest: Manifest, rows: int, offload_text_encoder: bool = False) -> None:
        self.manifest, self.set = manifest, manifest.engine_set(rows)
        self.layout = Layout(rows)
        self.needs: dict[str, Need] = {}
        self.phase = Phase.ENCODE
        self.offloads = offload_text_encoder
        # The residual stream alternates between two slots: every block and bridge reads one and writes the other.
        self.x, self.other = "x0", "x1"

    def plan(self) -> Layout:
        self._encoder()
        self.phase = Phase.TEXT
        self._text()
        self.phase = Phase.SCALES
        for name in ("cond", "uncond", "mask"):  # kept, so that a bad number can be looked for from the start
            if name in self.needs:
                self._need(name, 0)
        for position, step in enumerate(self.manifest.plan.steps):
            self.layout.steps.append(self._step(position, step, self.set))
        self.phase = Phase.DECODE
        self._decoder()
        self.layout.slots, self.layout.arena_bytes = place(self.needs)
        return self.layout

    def _need(self, slot: str, size: int) -> None:
        need = Need(size, self.phase, self.phase)
        self.needs[slot] = need.joined(self.needs[slot]) if slot in self.needs else need

    def _view(self, slot: str, start: int, dtype: str, shape: tuple[int, ...]) -> View:
        self._need(slot, start + size_bytes(dtype, shape))
        return View(slot, start, dtype, shape)

    def _bind(
        self,
        engine: str,
        slots: Mapping[str, tuple[str, int]],
        layer: int | str | None = None,
        constants: Mapping[str, str] | None = None,
    ) -> EngineCall:
        """Bind an engine: weights by their pattern, constants to the weight named for each, everything else to the
        slot (and start byte) given for it.
        """
        spec = self.manifest.engines[engine]
        named = {**spec.weights, **(constants or {})}
        tensors: dict[str, Binding] = {}
        for tensor in (*spec.inputs, *spec.outputs):
            if tensor.name in named:
                tensors[tensor.name] = self._weight(engine, named[tensor.name].format(layer=layer), tensor)
                continue
            if tensor.name not in slots:
                raise InternalError(f"engine {engine}: nothing is planned for its tensor {tensor.name!r}")
            tensors[tensor.name] = self._view(*slots[tensor.name], tensor.dtype, tensor.shape)
        size = spec.report.scratch_bytes
        scratch = self._view(f"scratch.{self.phase.name.lower()}", 0, "uint8", (size,)) if size else None
        return EngineCall(engine, tensors, layer, scratch)

    def _weight(self, engine: str, name: str, tensor: TensorSpec) -> Binding:
        if not (self.offloads and engine == self.manifest.text_encoder):
            return WeightView(name, tensor.dtype, tensor.shape)
        brought = self.layout.brought
        if name not in brought:
            start = max((view.start + aligned(view.size) for view in brought.values()), default=0)
            brought[name] = self._view(TEXT_ENCODER_WEIGHTS, start, tensor.dtype, tensor.shape)
        return brought[name]

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
            attend = self._attend(names.attend_pruned if pruned else names.attend, step, layer)
            calls += (project, attend)
            if pruned and step.prunes:
                # Sub-layers that share a selection have none of their own.
                found = {"sa": project.tensors["kept"]}
                found |= {n: attend.tensors[f"kept_{n}"] for n in ("ca", "ffn") if f"kept_{n}" in attend.tensors}
                kept[layer] = {n: view for n, view in found.items() if isinstance(view, View)}
            self.x, self.other = self.other, self.x
        summed = ("summed0", "summed1") if position % 2 == 0 else ("summed1", "summed0")
        bridge = self._bridge(names.bridge, position, summed)
        self.x, self.other = self.other, self.x
        first = calls[0].tensors["x"]
        noise, total = bridge.tensors["noise"], bridge.tensors["summed_out"]
        assert isinstance(first, View)
        assert isinstance(noise, View)
        assert isinstance(total, View)
        return StepCalls(step, step.rows(self.layout.rows), tuple(calls), bridge, noise, first, total, kept)

    def _project(self, engine: str, step: StepPlan, layer: int) -> EngineCall:
        pruned = self.manifest.plan.policy.prunes(layer)
        keys = self.manifest.engines[engine].tensor("keys")
        own, start = step.past(pruned), 0
        if self._narrowed(step):
            own, start = own - step.guided_past(pruned), self._unguided_start(keys, step, layer)
        start += own * size_bytes(keys.dtype, keys.shape[1:])
        cache = {name: (f"{name}.{layer}", start) for name in ("keys", "values")}
        slots = {"x": (self.x, 0), "modulation": ("modulation", 0), "q": ("q", 0), "kept": (f"kept_sa.{layer}", 0)}
        if start % self.manifest.address_alignment == 0:
            return self._bind(engine, {**slots, **cache}, layer)
        # Only small models: in the published ones a token's keys take a multiple of 256 bytes.
        call = self._bind(engine, {**slots, **{name: (f"staged_{name}", 0) for name in cache}}, layer)
        return replace(call, copies=tuple(self._copy(call, name, *place) for name, place in cache.items()))

    def _narrowed(self, step: StepPlan) -> bool:
        """Guidance has been switched off: one row is left of two."""
        return step.rows(self.layout.rows) < self.layout.rows

    def _unguided_start(self, keys: TensorSpec, step: StepPlan, layer: int) -> int:
        """Where a layer's keys of the conditional row alone begin, behind those of all rows."""
        guided = step.guided_past(self.manifest.plan.policy.prunes(layer))
        row = size_bytes(keys.dtype, keys.shape[1:]) // step.rows(self.layout.rows)
        end = guided * self.layout.rows * row
        return -(-end // self.manifest.address_alignment) * self.manifest.address_alignment

    def _copy(self, call: EngineCall, name: str, slot: str, start: int) -> Copy:
        source = call.tensors[name]
        assert isinstance(source, View)
        return Copy(source, self._view(slot, start, source.dtype, source.shape))

    def _attend(self, engine: str, step: StepPlan, layer: int) -> EngineCall:
        own = ("keys", "values", "text_keys", "text_values", "kept_ca", "kept_ffn")
        slots = {name: (f"{name}.{layer}", 0) for name in own}
        if self._narrowed(step):
            start = self._unguided_start(self.manifest.engines[engine].tensor("keys"), step, layer)
            slots |= {f"guided_{name}": (f"{name}.{layer}", 0) for name in ("keys", "values")}
            slots |= {name: (f"{name}.{layer}", start) for name in ("keys", "values")}
        slots |= {name: (name, 0) for name in ("q", "text_bias", "modulation")}
        slots |= {"x": (self.x, 0), "x_out": (self.other, 0), "kept": (f"kept_sa.{layer}", 0)}
        for sub_layer in ("sa", "ca", "ffn"):
            # Written at the cached scale, read at the pruned ones.
            slots |= {f"{end}_{sub_layer}": (f"cache_{sub_layer}.{layer}", 0) for end in ("cache", "cached")}
        return self._bind(engine, slots, layer)

    def _bridge(self, engine: str, position: int, summed: tuple[str, str]) -> EngineCall:
        slots = {name: (name, 0) for name in ("head_modulation", "noise", "guidance", "tau", "cut")}
        slots["logits"] = (f"logits.{position}", 0)  # looked at when all scales have run
        slots |= {"x": (self.x, 0), "x_next": (self.other, 0)}
        slots |= {"summed": (summed[0], 0), "summed_out": (summed[1], 0)}
        return self._bind(engine, slots)

    def _encoder(self) -> None:
        if self.manifest.encoder:
            slots = {"image": ("given_image", 0), "latent": ("latent", 0)}
            self.layout.encoder = self._bind(self.manifest.encoder, slots)

    def _decoder(self) -> None:
        m, layout = self.manifest, self.layout
        summed = layout.steps[-1].summed.slot
        if m.tiles is None:
            layout.decode.append(self._bind(m.decoder, {"summed": (summed, 0), "image": ("image", 0)}))
            image = layout.decode[-1].tensors["image"]
            assert isinstance(image, View)
            layout.image = image
            return
        decoder = TiledDecoder(m.tiles, m.engines, summed)
        for launch in decoder.launches():
            layout.decode.append(self._bind(launch.engine, launch.slots, launch.layer, launch.constants))
        layout.image = self._view("image", 0, decoder.image.dtype, decoder.image.shape)


def lay_out(manifest: Manifest, rows: int, *, offload_text_encoder: bool = False) -> Layout:
    """Plan the memory and the launches of one image with `rows` guidance rows.

    `offload_text_encoder`: its weights are brought for every prompt, and share their place with what lives later.
    """
    return Planner(manifest, rows, offload_text_encoder).plan()
