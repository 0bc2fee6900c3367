"""The memory layout of a generation: every buffer, and what each engine launch is bound to. Pure data.

Nothing here touches memory or a library, so that every binding of every step can be checked anywhere.
Weights are named, not placed (arena.py places them), but for those of a text encoder that leaves the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from ...core.dtypes import size_bytes
from ...core.noise import DRAWN, SCALARS
from ...core.plan import Batch, StepPlan
from ...engines.bundle.manifest import EngineSet, Manifest
from ...engines.spec import LAYER, TensorSpec
from ...errors import InternalError
from .placement import Buffer, BufferRequest, Phase, aligned, place
from .stripes import TiledDecoder


@dataclass(frozen=True)
class View:
    """A tensor inside a buffer, `start` bytes from its beginning."""

    buffer: str
    start: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return size_bytes(self.dtype, self.shape)

    def part(self, index: int) -> View:
        """One along the first dimension."""
        shape = self.shape[1:]
        return replace(self, start=self.start + index * size_bytes(self.dtype, shape), shape=shape)


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
# Inputs that the host may write; all others have been written by an earlier engine.
HOST_GIVEN = {"ids", "attention_mask", "cond", "uncond", "mask", "labels", "image", "summed", *SCALARS, *DRAWN}
KEPT = "kept_"  # before the name of a sub-layer: the tokens it has chosen
TEXT_ENCODER_WEIGHTS = "text_encoder_weights"  # the buffer of weights that are copied to the device for every prompt


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
    """The launches of one scale, in order, and where the host writes and reads. `rows` are those of all images."""

    step: StepPlan
    rows: int
    layers: tuple[EngineCall, ...]
    sampling_head: EngineCall
    drawn: Mapping[str, View]  # what the host draws at random, by the name of the input
    block_in: View
    summed: View
    kept: Mapping[int, Mapping[str, View]]  # layer -> sub-layer -> indices into [L * R]
    pick: EngineCall | None = None
    residual: EngineCall | None = None

    @property
    def calls(self) -> tuple[EngineCall, ...]:
        """Every launch in order."""
        before, after = ((call,) if call is not None else () for call in (self.pick, self.residual))
        return (*before, *self.layers, self.sampling_head, *after)


@dataclass
class Layout:
    """All buffers and launches of one pass: `images` side by side, each with `rows` guidance rows.

    Texts are encoded and images decoded one at a time. Where there are several, a text's features are copied from the
    text encoder's output to their place among all, and an image's codes from theirs to the decoder's input.
    `offloaded_weights` are the text encoder's weights with their places, where they do not stay on the device.
    """

    rows: int
    images: int = 1
    buffers: dict[str, Buffer] = field(default_factory=dict)
    encoder: EngineCall | None = None
    text_encoder: EngineCall | None = None
    uncond_encoder: EngineCall | None = None
    conditioning: EngineCall | None = None
    layer_conditioning: list[EngineCall] = field(default_factory=list)
    steps: list[StepCalls] = field(default_factory=list)
    decode: list[EngineCall] = field(default_factory=list)
    image: View | None = None
    codes: View | None = None  # of all images, and the decoder's input, where there are several
    decoded: View | None = None
    offloaded_weights: dict[str, View] = field(default_factory=dict)
    arena_bytes: int = 0

    def calls(self) -> Iterator[EngineCall]:
        """Every launch, in order."""
        once = (self.encoder, self.text_encoder, self.uncond_encoder, self.conditioning, *self.layer_conditioning)
        yield from (call for call in once if call is not None)
        for step in self.steps:
            yield from step.calls
        yield from self.decode

    def weights(self) -> dict[str, WeightView]:
        """The weights that stay where they are, by name."""
        bindings = (binding for call in self.calls() for binding in call.tensors.values())
        return {binding.name: binding for binding in bindings if isinstance(binding, WeightView)}


class LayoutBuilder:
    """Lays out one engine set: a buffer is as large as the largest tensor it ever holds, and lives from the first
    phase it is used in to the last.
    """

    def __init__(self, manifest: Manifest, batch: Batch, offload_text_encoder: bool = False) -> None:
        self.manifest, self.set = manifest, manifest.engine_set(*batch)
        self.layout = Layout(*batch)
        self.rows = batch.guidance_rows * batch.images
        self.requests: dict[str, BufferRequest] = {}
        self.phase = Phase.ENCODE
        self.offloads = offload_text_encoder
        # The residual stream alternates between two buffers: every block and sampling head reads one and writes the
        # other. So does the latent accumulator. A scale sampled in parts keeps all its tokens in one more buffer.
        self.x, self.other, self.whole = "x0", "x1", ""
        self.summed, self.other_sum = "summed0", "summed1"
        self.per_layer: frozenset[str] = frozenset()  # what the condition gives to each layer apart

    def plan(self) -> Layout:
        self._encoder()
        self.phase = Phase.TEXT
        self._text()
        self.phase = Phase.SCALES
        for tensor in self.manifest.engines[self.set.conditioning].inputs:
            if tensor.name in self.requests:  # kept, so that a bad number can be looked for from the start
                self._request(tensor.name, 0)
        for position, step in enumerate(self.manifest.plan.steps):
            self.layout.steps.append(self._step(position, step, self.set))
        self.phase = Phase.DECODE
        self._decoder()
        self.layout.buffers, self.layout.arena_bytes = place(self.requests)
        return self.layout

    def _request(self, buffer: str, size: int) -> None:
        request = BufferRequest(size, self.phase, self.phase)
        self.requests[buffer] = request.joined(self.requests[buffer]) if buffer in self.requests else request

    def _view(self, buffer: str, start: int, dtype: str, shape: tuple[int, ...]) -> View:
        self._request(buffer, start + size_bytes(dtype, shape))
        return View(buffer, start, dtype, shape)

    def _bind(
        self,
        engine: str,
        buffers: Mapping[str, tuple[str, int]],
        layer: int | str | None = None,
        constants: Mapping[str, str] | None = None,
    ) -> EngineCall:
        """Bind an engine: weights by their pattern, constants to the weight named for each, everything else to the
        buffer (and start byte) given for it.
        """
        spec = self.manifest.engines[engine]
        named = {**spec.weights, **(constants or {})}
        tensors: dict[str, Binding] = {}
        for tensor in spec.inputs:
            given = tensor.name in named or tensor.name in HOST_GIVEN
            if not given and buffers.get(tensor.name, ("", 0))[0] not in self.requests:
                raise InternalError(f"engine {engine}: nothing gives its input {tensor.name!r}")
        for tensor in (*spec.inputs, *spec.outputs):
            if tensor.name in named:
                tensors[tensor.name] = self._weight(engine, named[tensor.name].replace(LAYER, str(layer)), tensor)
                continue
            if tensor.name not in buffers:
                raise InternalError(f"engine {engine}: nothing is planned for its tensor {tensor.name!r}")
            tensors[tensor.name] = self._view(*buffers[tensor.name], tensor.dtype, tensor.shape)
        size = spec.report.scratch_bytes
        scratch = self._view(f"scratch.{self.phase.name.lower()}", 0, "uint8", (size,)) if size else None
        return EngineCall(engine, tensors, layer, scratch)

    def _weight(self, engine: str, name: str, tensor: TensorSpec) -> Binding:
        if not (self.offloads and engine == self.manifest.text_encoder):
            return WeightView(name, tensor.dtype, tensor.shape)
        offloaded = self.layout.offloaded_weights
        if name not in offloaded:
            start = max((view.start + aligned(view.size) for view in offloaded.values()), default=0)
            offloaded[name] = self._view(TEXT_ENCODER_WEIGHTS, start, tensor.dtype, tensor.shape)
        return offloaded[name]

    def _text(self) -> None:
        m, layout = self.manifest, self.layout
        encoder = {"ids": ("ids", 0), "attention_mask": ("attention_mask", 0)}
        if m.text_encoder:
            places = ("cond", "uncond") if layout.images == 1 else ("features", "features")
            layout.text_encoder = self._bind(m.text_encoder, {**encoder, "features": (places[0], 0)})
            if layout.rows == 2 and "uncond" in self._names(self.set.conditioning):
                layout.uncond_encoder = self._bind(m.text_encoder, {**encoder, "features": (places[1], 0)})
        layout.conditioning = self._bind(
            self.set.conditioning, {**self._own_names(self.set.conditioning), "x": ("x0", 0)}
        )
        if not self.set.layer_conditioning:
            return
        self.per_layer = frozenset(spec.name for spec in m.engines[self.set.layer_conditioning].outputs)
        for layer in range(m.plan.depth):
            buffers = self._own_names(self.set.layer_conditioning, layer)
            layout.layer_conditioning.append(self._bind(self.set.layer_conditioning, buffers, layer))

    def _names(self, engine: str) -> set[str]:
        """What an engine is bound to beside weights."""
        spec = self.manifest.engines[engine]
        return {tensor.name for tensor in (*spec.inputs, *spec.outputs)} - set(spec.weights)

    def _own_names(self, engine: str, layer: int | None = None) -> dict[str, tuple[str, int]]:
        """Buffers named as the tensors; one for each layer where the condition differs from layer to layer."""
        return {n: (f"{n}.{layer}" if n in self.per_layer else n, 0) for n in self._names(engine)}

    def _step(self, position: int, step: StepPlan, engines: EngineSet) -> StepCalls:
        names = engines.steps[position]
        pick = self._pick(names.pick) if names.pick else None
        calls: list[EngineCall] = []
        kept: dict[int, dict[str, View]] = {}
        for layer in range(self.manifest.plan.depth):
            pruned = self.manifest.plan.policy.prunes(layer)
            qkv = self._qkv(names.qkv_pruned if pruned else names.qkv, step, layer)
            attn_mlp = self._attn_mlp(names.attn_mlp_pruned if pruned else names.attn_mlp, step, layer)
            calls += (qkv, attn_mlp)
            if pruned and step.prunes:
                # Sub-layers that share a selection have none of their own.
                found = {"sa": qkv.tensors["kept"]}
                found |= {n.removeprefix(KEPT): t for n, t in attn_mlp.tensors.items() if n.startswith(KEPT)}
                kept[layer] = {n: view for n, view in found.items() if isinstance(view, View)}
            self.x, self.other = self.other, self.x
        sampling_head = self._summing(names.sampling_head, position)
        residual = self._summing(names.residual, position) if names.residual else None
        if "x_next" in sampling_head.tensors:
            self.x, self.other = self.other, self.x
        first, total = (pick or calls[0]).tensors["x"], (residual or sampling_head).tensors["summed_out"]
        assert isinstance(first, View)
        assert isinstance(total, View)
        row_count = step.rows(self.layout.rows, self.layout.images)
        found_calls = StepCalls(step, row_count, tuple(calls), sampling_head, {}, first, total, kept, pick, residual)
        return replace(found_calls, drawn=_drawn(found_calls))

    def _pick(self, engine: str) -> EngineCall:
        """The first part's tokens and all later ones come from where the whole scale's tokens are."""
        if not self.whole:
            self.whole, self.x = self.x, "x2"
        return self._bind(engine, {**self._own_names(engine), "x": (self.whole, 0), "x_out": (self.x, 0)})

    def _summing(self, engine: str, position: int) -> EngineCall:
        """An engine that adds to the running sum."""
        buffers = self._own_names(engine)
        buffers["logits"] = (f"logits.{position}", 0)  # looked at when all scales have run
        buffers |= {"x": (self.x, 0), "x_next": (self.other, 0)}
        buffers |= {"summed": (self.summed, 0), "summed_out": (self.other_sum, 0)}
        self.summed, self.other_sum = self.other_sum, self.summed
        return self._bind(engine, buffers)

    def _qkv(self, engine: str, step: StepPlan, layer: int) -> EngineCall:
        pruned = self.manifest.plan.policy.prunes(layer)
        keys = self.manifest.engines[engine].tensor("keys")
        own, start = step.past(pruned), 0
        if self._narrowed(step):
            own, start = own - step.guided_past(pruned), self._unguided_start(keys, step, layer)
        start += own * size_bytes(keys.dtype, keys.shape[1:])
        cache = {name: (f"{name}.{layer}", start) for name in ("keys", "values")}
        buffers = {**self._own_names(engine, layer), "x": (self.x, 0), "kept": (f"kept_sa.{layer}", 0)}
        if start % self.manifest.address_alignment == 0:
            return self._bind(engine, {**buffers, **cache}, layer)
        # Only small models: in the published ones a token's keys take a multiple of 256 bytes.
        call = self._bind(engine, {**buffers, **{name: (f"staged_{name}", 0) for name in cache}}, layer)
        return replace(call, copies=tuple(self._copy(call, name, *place) for name, place in cache.items()))

    def _narrowed(self, step: StepPlan) -> bool:
        """Guidance has been switched off: one row is left of two, of every image."""
        return not step.guided and self.layout.rows == 2

    def _unguided_start(self, keys: TensorSpec, step: StepPlan, layer: int) -> int:
        """Where a layer's keys of the conditional rows alone begin, behind those of all rows."""
        guided = step.guided_past(self.manifest.plan.policy.prunes(layer))
        row = size_bytes(keys.dtype, keys.shape[1:]) // step.rows(self.layout.rows, self.layout.images)
        end = guided * self.rows * row
        return -(-end // self.manifest.address_alignment) * self.manifest.address_alignment

    def _copy(self, call: EngineCall, name: str, buffer: str, start: int) -> Copy:
        source = call.tensors[name]
        assert isinstance(source, View)
        return Copy(source, self._view(buffer, start, source.dtype, source.shape))

    def _attn_mlp(self, engine: str, step: StepPlan, layer: int) -> EngineCall:
        buffers = self._own_names(engine, layer)
        # The token cache is written at the restore scale, and read at the pruned ones.
        buffers |= {name: (f"cache_{name.split('_', 1)[1]}.{layer}", 0) for name in buffers if name.startswith("cache")}
        own = [name for name in buffers if name in ("keys", "values") or name.startswith(KEPT)]
        buffers |= {name: (f"{name}.{layer}", 0) for name in own}
        if self._narrowed(step):
            start = self._unguided_start(self.manifest.engines[engine].tensor("keys"), step, layer)
            buffers |= {f"guided_{name}": (f"{name}.{layer}", 0) for name in ("keys", "values")}
            buffers |= {name: (f"{name}.{layer}", start) for name in ("keys", "values")}
        buffers |= {"x": (self.x, 0), "x_out": (self.other, 0), "kept": (f"kept_sa.{layer}", 0)}
        return self._bind(engine, buffers, layer)

    def _encoder(self) -> None:
        if self.manifest.encoder:
            buffers = {"image": ("given_image", 0), "latent": ("latent", 0)}
            self.layout.encoder = self._bind(self.manifest.encoder, buffers)

    def _decoder(self) -> None:
        m, layout = self.manifest, self.layout
        summed = layout.steps[-1].summed.buffer
        if layout.images > 1:
            whole = layout.steps[-1].summed
            layout.codes = self._view(whole.buffer, whole.start, whole.dtype, whole.shape)  # all live until the last
            summed = "decoded"
            layout.decoded = self._view(summed, 0, whole.dtype, (1, *whole.shape[1:]))
        if m.tiles is None:
            layout.decode.append(self._bind(m.decoder, {"summed": (summed, 0), "image": ("image", 0)}))
            image = layout.decode[-1].tensors["image"]
            assert isinstance(image, View)
            layout.image = image
            return
        decoder = TiledDecoder(m.tiles, m.engines, summed)
        for launch in decoder.launches():
            layout.decode.append(self._bind(launch.engine, launch.buffers, launch.layer, launch.constants))
        layout.image = self._view("image", 0, decoder.image.dtype, decoder.image.shape)


def _drawn(calls: StepCalls) -> dict[str, View]:
    """Inputs of a scale that the host draws."""
    found = {n: t for call in calls.calls for n, t in call.tensors.items() if n in DRAWN}
    return {name: view for name, view in found.items() if isinstance(view, View)}


def build_layout(manifest: Manifest, rows: int, images: int = 1, *, offload_text_encoder: bool = False) -> Layout:
    """Plan the memory and the launches of a pass: `images`, each with `rows` guidance rows.

    `offload_text_encoder`: its weights are copied to the device for every prompt, and share their place with what lives
    later.
    """
    return LayoutBuilder(manifest, Batch(rows, images), offload_text_encoder).plan()
