"""Whether a bundle's engines, weights and plan fit together, before memory is laid out and anything runs.

A manifest may say anything; what it says is followed here launch by launch. Pure arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from ...core.noise import DRAWN, SCALARS
from ...core.plan import StepPlan
from ...engines.bundle.manifest import EngineSet, Manifest
from ...engines.bundle.weight_file import WeightFile
from ...engines.spec import EngineSpec, TensorSpec
from ...errors import BundleError, InternalError
from ...families.codebook import VqTokenizerConfig, phis_of
from .layout import HOST_GIVEN, EngineCall, Layout, View, WeightView, build_layout
from .stripes import BUFFER

UNCONDITIONAL = "transformer.cfg_uncond"  # where a family learns the features of no text
CODEBOOK, PHI = "transformer.codebook.weight", "transformer.phi."  # where tokens are codes; the phis are numbered
# What the first stage of a tiled decoder has beside its weights, and what the others.
_FIRST_STAGE = {"summed", "stripe_out", "statistics_out"}
_STAGES = (
    {"stripe", "inner_stripe_out", "statistics_out"},
    {"inner_stripe", "residual", "stripe_out", "statistics_out"},
    {"stripe", "stripe_out", "statistics_out"},
    {"stripe", "image"},
)
_OF_STAGES = {"statistics", "above", "below"}  # which many of them read besides
_ALWAYS_GIVEN = HOST_GIVEN - {"cond", "uncond", "summed"}  # the host writes these before every launch that reads them


def sound_layout(manifest: Manifest, rows: int, images: int = 1, *, offload_text_encoder: bool = False) -> Layout:
    """`build_layout`, of a manifest that may say anything.

    Every engine has the tensors of its role, in the plan's sizes; all that a launch reads has been written, as it is
    read.

    Raises:
        BundleError: says what is otherwise.
    """
    _report(_engine_problems(manifest))
    try:
        layout = build_layout(manifest, rows, images, offload_text_encoder=offload_text_encoder)
    except InternalError as error:  # here it is the file that is wrong
        raise BundleError(f"the bundle is inconsistent: {error}", fix="rebuild the bundle") from error
    _report(_flow_problems(manifest, layout))
    return layout


def check_weights(manifest: Manifest, layouts: Sequence[Layout], weights: WeightFile) -> None:
    """The weight file has every tensor that engines are bound to, in its type and shape.

    Raises:
        BundleError: says which it has not.
    """
    _report(_weight_problems(manifest, layouts, weights))


def _report(problems: Iterator[str]) -> None:
    for problem in problems:
        raise BundleError(f"the bundle is inconsistent: {problem}", fix="rebuild the bundle")


def _engine_problems(m: Manifest) -> Iterator[str]:
    if m.text_encoder:
        yield from _lacking(m, m.text_encoder, {"ids", "attention_mask"}, {"features"})
        text = m.engines[m.text_encoder]
        if not _shapes(text, "ids") == _shapes(text, "attention_mask") == [(1, _shape(text, "ids")[-1])]:
            yield f"engine {m.text_encoder!r} reads more than one text"
        if len(_shape(text, "features")) != 2 or _shape(text, "features")[0] != m.text_length:
            yield f"engine {m.text_encoder!r} does not read texts of {m.text_length} tokens"
    if m.encoder:
        yield from _lacking(m, m.encoder, {"image"}, {"latent"})
    for engine_set in m.sets:
        yield from _condition_problems(m, engine_set)
        for step, names in zip(m.plan.steps, engine_set.steps, strict=True):
            yield from _lacking(m, names.sampling_head, {"summed"}, {"logits", "summed_out"})
            yield from _lacking(m, names.pick, {"x"}, {"x_out"})
            yield from _lacking(m, names.residual, {"summed"}, {"summed_out"})
            for pruned in {m.plan.policy.prunes(layer) for layer in range(m.plan.depth)}:
                qkv = names.qkv_pruned if pruned else names.qkv
                attn_mlp = names.attn_mlp_pruned if pruned else names.attn_mlp
                kept = {"kept"} if pruned and step.prunes else set()
                yield from _lacking(m, qkv, {"x"}, {"q", "keys", "values"} | kept)
                yield from _lacking(m, attn_mlp, {"x", "q", "keys", "values"} | kept, {"x_out"})
                yield from _step_problems(m, engine_set, step, (qkv, attn_mlp))
            sampling_head = m.engines[names.sampling_head]
            if _shape(sampling_head, "summed") != _shape(sampling_head, "summed_out"):
                yield f"engine {names.sampling_head!r} sums codes of two shapes"
            drawing = (names.sampling_head, names.pick, names.residual)
            yield from _drawn_problems(m, step, engine_set.images, drawing)
    yield from _decoder_problems(m)


def _condition_problems(m: Manifest, engine_set: EngineSet) -> Iterator[str]:
    spec = m.engines[engine_set.conditioning]
    if drawn := _names(spec) & {*DRAWN, *SCALARS}:
        yield f"engine {spec.name!r} runs before the scales and takes {', '.join(sorted(drawn))}"
    most = engine_set.rows * engine_set.images
    for name, further in (("labels", ()), ("mask", (m.text_length,))):
        for shape in _shapes(spec, name):
            if not 1 <= shape[0] <= most or shape[1:] != further:
                yield f"engine {spec.name!r} has {name} of shape {list(shape)}"
    for name in ("cond", "uncond"):
        for shape in _shapes(spec, name):
            several = (engine_set.images,) if engine_set.images > 1 else ()
            if len(shape) != 2 + len(several) or shape[:-1] != (*several, m.text_length):
                yield f"engine {spec.name!r} has {name} of shape {list(shape)}"


def _step_problems(m: Manifest, engine_set: EngineSet, step: StepPlan, names: tuple[str, ...]) -> Iterator[str]:
    rows = step.rows(*engine_set.batch)
    for name in names:
        tokens = _shape(m.engines[name], "x")[0]
        if tokens != step.tokens * rows:
            yield f"engine {name!r} takes {tokens} tokens, scale {step.index} has {step.tokens * rows}"


def _drawn_problems(m: Manifest, step: StepPlan, images: int, names: tuple[str, ...]) -> Iterator[str]:
    for name in filter(None, names):
        spec = m.engines[name]
        for scalar in SCALARS:
            if any(shape != (images,) for shape in _shapes(spec, scalar)):
                yield f"engine {name!r} has more than one {scalar} for each image"
        if "residual_noise" in _names(spec) and not _shapes(spec, "diffusion.times"):
            yield f"engine {name!r} has no diffusion.times"
        counts = {step.tokens, math.prod(step.size)} if step.part is None else {step.tokens}
        counts = {count * images for count in counts}
        channels = m.transformer.code_channels
        widths = {"noise": {1, channels}, "gumbel": {getattr(m.transformer, "codes", 0)}, "residual_noise": {channels}}
        for tensor in spec.inputs:
            drawn = tensor.shape[1 if tensor.name == "residual_noise" else 0 :]
            sound = drawn[:1] and drawn[0] in counts and set(drawn[1:]) <= widths.get(tensor.name, set())
            if tensor.name in DRAWN and not (sound and len(drawn) <= 2):
                yield f"engine {name!r} has {tensor.name} of shape {list(tensor.shape)} for {step.tokens} tokens"


def _decoder_problems(m: Manifest) -> Iterator[str]:
    grid = [side * m.transformer.patch for side in m.plan.schedule.final]
    height, width = (side * m.image_tokenizer.patch_size for side in grid)
    if m.encoder and _shape(m.engines[m.encoder], "image") != (1, 3, height, width):
        yield f"engine {m.encoder!r} reads images of another size than {width}x{height}"
    if m.encoder and _shape(m.engines[m.encoder], "latent") != (1, m.image_tokenizer.code_channels, *grid):
        yield f"engine {m.encoder!r} makes a latent of another size than the decoder's"
    if m.tiles is None:
        yield from _lacking(m, m.decoder, {"summed"}, {"image"})
        if _shape(m.engines[m.decoder], "image") != (1, 3, height, width):
            yield f"engine {m.decoder!r} makes images of another size than {width}x{height}"
        return
    for position, stage in enumerate(m.tiles.stages):
        whole, last = m.engines[stage.engine], m.engines[stage.last]
        names = _names(whole) - _OF_STAGES
        fitting = names == _FIRST_STAGE if position == 0 else any(names == kind for kind in _STAGES)
        if not fitting or ("image" in names) != (position == len(m.tiles.stages) - 1):
            yield f"stage {position} of the decoder has tensors {sorted(names)}"
        if {t.name: (t.dtype, t.shape[1:]) for t in _tensors(whole)} != {
            t.name: (t.dtype, t.shape[1:]) for t in _tensors(last)
        }:
            yield f"stage {position} of the decoder ends with another one"
        if any(not tensor.shape for tensor in _tensors(whole)):
            yield f"stage {position} of the decoder has a tensor without rows"
    rows = [_shape(m.engines[name], "image")[0] for name in (m.tiles.stages[-1].engine, m.tiles.stages[-1].last)]
    if rows[0] * (m.tiles.stripes - 1) + rows[1] != height:
        yield f"the decoder's stripes do not make {height} rows"


def _lacking(m: Manifest, name: str, inputs: set[str], outputs: set[str]) -> Iterator[str]:
    """An engine's tensors that its role wants. No name, no engine of the role."""
    if not name:
        return
    spec = m.engines[name]
    found = ({tensor.name for tensor in spec.inputs}, {tensor.name for tensor in spec.outputs})
    missing = sorted((inputs - found[0]) | (outputs - found[1]))
    if missing or (inputs & spec.weights.keys()):
        yield f"engine {name!r} has no {', '.join(missing) or 'inputs of its own'}"


def _tensors(spec: EngineSpec) -> list[TensorSpec]:
    """Of an engine, without its weights."""
    return [tensor for tensor in (*spec.inputs, *spec.outputs) if tensor.name not in spec.weights]


def _names(spec: EngineSpec) -> set[str]:
    return {tensor.name for tensor in _tensors(spec)}


def _shapes(spec: EngineSpec, name: str) -> list[tuple[int, ...]]:
    """The shape of a tensor, if the engine has it."""
    return [tensor.shape for tensor in (*spec.inputs, *spec.outputs) if tensor.name == name]


def _shape(spec: EngineSpec, name: str) -> tuple[int, ...]:
    """The shape of a tensor that the engine is known to have; never empty."""
    return spec.tensor(name).shape or (0,)


@dataclass
class _Written:
    """What has been written into each slot, as it was last."""

    views: dict[str, list[View]] = field(default_factory=dict)

    def add(self, view: View) -> None:
        """What it overlaps is gone, all of it."""
        kept = [old for old in self.views.get(view.buffer, ()) if _end(old) <= view.start or _end(view) <= old.start]
        self.views[view.buffer] = sorted([*kept, view], key=lambda written: written.start)

    def holds(self, view: View) -> bool:
        """Whether it was written: by one launch in this very shape, or by several that end where it ends."""
        found = [old for old in self.views.get(view.buffer, ()) if view.start < _end(old) and old.start < _end(view)]
        if not found or any(old.dtype != view.dtype for old in found):
            return False
        if found[0].start == view.start and len(found) == 1:
            return found[0].shape == view.shape
        joined = all(view.shape[1:] in (old.shape[1:], old.shape) for old in found)  # rows of it, or one each
        return joined and found[0].start == view.start and _end(found[-1]) == _end(view) and _adjacent(found)


def _end(view: View) -> int:
    return view.start + view.size


def _adjacent(views: Sequence[View]) -> bool:
    return all(_end(a) == b.start for a, b in pairwise(views))


def _flow_problems(m: Manifest, layout: Layout) -> Iterator[str]:
    written = _Written()
    for call in layout.calls():
        yield from _call_problems(call, m.engines[call.engine], written)
    if layout.image is None or not written.holds(layout.image):
        yield "no engine writes the whole image"


def _call_problems(call: EngineCall, spec: EngineSpec, written: _Written) -> Iterator[str]:
    for tensor in spec.inputs:
        view = call.tensors[tensor.name]
        if not isinstance(view, View) or tensor.name in spec.weights:  # those may be brought to a place of their own
            continue
        if view.buffer == BUFFER:  # a stripe reads spare rows too, which nothing writes
            continue
        if tensor.name in _ALWAYS_GIVEN or (tensor.name in HOST_GIVEN and view.buffer not in written.views):
            written.add(view)
        if not written.holds(view):
            shown = f"{view.dtype}{list(view.shape)}"
            yield f"engine {call.engine!r} reads {tensor.name!r} as {shown}, which nothing writes so"
    targets: Mapping[View, View] = {copy.source: copy.target for copy in call.copies}
    for tensor in spec.outputs:
        view = call.tensors[tensor.name]
        if isinstance(view, View):
            written.add(view)
            if view in targets:
                written.add(targets[view])


def _weight_problems(m: Manifest, layouts: Sequence[Layout], weights: WeightFile) -> Iterator[str]:
    channels = m.image_tokenizer.code_channels
    needed = [("preview.weight", "float32", (3, channels)), ("preview.bias", "float32", (3,))]
    needed += _quantiser_weights(m) if m.encoder else ()
    for layout in layouts:
        bound = (binding for call in layout.calls() for binding in call.tensors.values())
        needed += [(w.name, w.dtype, w.shape) for w in bound if isinstance(w, WeightView)]
        needed += [(name, view.dtype, view.shape) for name, view in layout.offloaded_weights.items()]
    for name, dtype, shape in dict.fromkeys(needed):
        if name not in weights:
            yield f"its weight file holds no tensor {name!r}"
        elif (weights.dtype(name), weights.shape(name)) != (dtype, shape):
            found = f"{weights.dtype(name)}{list(weights.shape(name))}"
            yield f"tensor {name!r} of its weight file is {found}, engines take {dtype}{list(shape)}"
    if UNCONDITIONAL in weights:
        learned = (weights.dtype(UNCONDITIONAL), *weights.shape(UNCONDITIONAL)[1:])
        if learned != ("float32", m.transformer.text_width):
            yield f"tensor {UNCONDITIONAL!r} of its weight file is not of the text's width"


def _quantiser_weights(m: Manifest) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, element type and shape of what the host quantises the latent of a given image with."""
    images = m.image_tokenizer
    if isinstance(images, VqTokenizerConfig):
        channels = images.code_channels
        yield CODEBOOK, "float32", (images.codes, channels)
        for phi in phis_of(m.plan).values():
            yield f"{PHI}{phi}.weight", "float32", (channels, channels, 3, 3)
            yield f"{PHI}{phi}.bias", "float32", (channels,)
