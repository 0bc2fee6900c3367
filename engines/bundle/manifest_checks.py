"""Whether a manifest is consistent in itself: names that lead somewhere, sizes within bounds, one backend.

What its engines are bound to is checked where that is laid out, in the runtime.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from ...core.dtypes import BY_NAME, size_bytes
from ...core.precision import COMPUTE, WEIGHT_FORMATS, PrecisionChoice
from ...errors import BundleError
from ...families import family_named
from ..cache.product_speeds import FLOATS, INT8, MOST_GFLOPS
from ..registry import BACKEND_NAMES
from ..spec import EngineSpec, TensorSpec
from .folder import is_inside
from .manifest import Manifest

MOST_TOKEN_PIXELS = 256  # along a side
MOST_TEXT = 1 << 16  # tokens
MOST_RANK, MOST_EXTENT, MOST_TENSOR_BYTES = 8, 1 << 22, 1 << 40
MOST_SCRATCH_BYTES = 1 << 38
MOST_ALIGNMENT = 4096
MOST_IMAGES = 64  # in one pass
MOST_STRIPES = 1 << 16
MOST_TOLD = 200  # letters of what was noted in words
MOST_SIZE = 1 << 31  # of anything that a model's configuration counts
_HASH_DIGITS = set("0123456789abcdef")


def check_manifest(manifest: Manifest) -> None:
    """Refuse what does not hold together.

    Raises:
        BundleError: says what.
    """
    for problem in _problems(manifest):
        raise BundleError(f"manifest.json is inconsistent: {problem}", fix="rebuild the bundle")


def _problems(m: Manifest) -> Iterator[str]:
    """The first one counts: later checks rely on earlier ones."""
    yield from _problems_of_files(m)
    yield from _problems_of_model(m)
    yield from _problems_of_plan(m)
    if not m.engines:
        yield "it has no engines"
    for name, spec in m.engines.items():
        yield from (f"engine {name!r}: {problem}" for problem in _problems_of_engine(name, spec, m))
    yield from _problems_of_names(m)
    yield from _problems_of_settings(m)


def _problems_of_files(m: Manifest) -> Iterator[str]:
    for record in m.files:
        if not is_inside(record.file):
            yield f"it names {record.file!r}, expected: a file inside the bundle"
        if len(record.sha256) != 64 or not set(record.sha256) <= _HASH_DIGITS:
            yield f"{record.file!r} has the digest {record.sha256!r}"
        if record.size_bytes < 0:
            yield f"{record.file!r} has {record.size_bytes} bytes"
    if len({record.file for record in m.files}) < len(m.files):
        yield "it describes one file in two ways"


def _problems_of_model(m: Manifest) -> Iterator[str]:
    for what, config in (("transformer", m.transformer), ("image_tokenizer", m.image_tokenizer)):
        for name, value in asdict(config).items():
            if any(not 0 <= number <= MOST_SIZE for number in _numbers(value)):
                yield f"{what}.{name} is {value}"
    if len(m.image_tokenizer.level_channels) > MOST_RANK:
        yield f"the image tokenizer has {len(m.image_tokenizer.level_channels)} resolutions"


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, tuple):
        for one in value:
            yield from _numbers(one)
    elif isinstance(value, int | float):
        yield value


def _problems_of_plan(m: Manifest) -> Iterator[str]:
    plan, schedule = m.plan, m.plan.schedule
    if plan.depth != m.transformer.depth:
        yield f"the plan is for {plan.depth} layers, the transformer has {m.transformer.depth}"
    if plan.first_tokens != m.transformer.first_tokens:
        yield f"the first scale has {plan.first_tokens} tokens, the transformer gives {m.transformer.first_tokens}"
    if len(schedule) > m.transformer.max_scales:
        yield f"it draws {len(schedule)} scales, the transformer knows {m.transformer.max_scales}"
    if not 1 <= schedule.pixels_per_token <= MOST_TOKEN_PIXELS:
        yield f"a token is {schedule.pixels_per_token} pixels wide"
    if not 0 <= m.text_length <= MOST_TEXT:
        yield f"texts of {m.text_length} tokens"


def _problems_of_engine(name: str, spec: EngineSpec, m: Manifest) -> Iterator[str]:
    if spec.name != name:
        yield f"it is called {spec.name!r} as well"
    if spec.backend not in BACKEND_NAMES:
        yield f"backend {spec.backend!r} is none of {', '.join(BACKEND_NAMES)}"
    if (spec.backend, spec.target) != (m.backend, m.target):
        yield f"it is for {spec.backend} on {spec.target}, another for {m.backend} on {m.target}"
    tensors = (*spec.inputs, *spec.outputs)
    if not spec.outputs or len({tensor.name for tensor in tensors}) < len(tensors):
        yield "its tensors have no names of their own"
    if unknown := sorted(spec.weights.keys() - {tensor.name for tensor in spec.inputs}):
        yield f"weights {unknown} are none of its inputs"
    for tensor in tensors:
        yield from _problems_of_tensor(tensor)
    report = spec.report
    if not 0 <= report.scratch_bytes <= MOST_SCRATCH_BYTES:
        yield f"it works in {report.scratch_bytes} bytes"
    if min(report.kernels, report.fused_attentions, spec.attentions) < 0:
        yield "a count is negative"


def _problems_of_tensor(tensor: TensorSpec) -> Iterator[str]:
    if tensor.dtype not in BY_NAME:
        yield f"tensor {tensor.name!r} has element type {tensor.dtype!r}"
    elif (
        len(tensor.shape) > MOST_RANK
        or any(not 1 <= extent <= MOST_EXTENT for extent in tensor.shape)
        or size_bytes(tensor.dtype, tensor.shape) > MOST_TENSOR_BYTES
    ):
        yield f"tensor {tensor.name!r} has shape {list(tensor.shape)}"


def _problems_of_names(m: Manifest) -> Iterator[str]:
    """Engines that are named are there; every step that is drawn has its own."""
    rows, batches = {engine_set.rows for engine_set in m.sets}, [engine_set.batch for engine_set in m.sets]
    if not rows or len(set(batches)) < len(batches) or not {1, 2} >= rows:
        yield f"it has engines for {sorted(rows)} guidance rows"
    if not all(1 <= engine_set.images <= MOST_IMAGES for engine_set in m.sets):
        yield f"it has engines for {[engine_set.images for engine_set in m.sets]} images in a pass"
    if missing := [r for r in sorted(rows) if 1 not in m.batch_sizes(r)]:
        yield f"it has no engines for one image with {missing[0]} guidance rows"
    layers = {m.plan.policy.prunes(layer) for layer in range(m.plan.depth)}
    for engine_set in m.sets:
        if len(engine_set.steps) != len(m.plan.steps):
            yield f"it has engines for {len(engine_set.steps)} scales, {len(m.plan.steps)} are drawn"
        needed = [engine_set.conditioning]
        for step in engine_set.steps:
            needed += [step.sampling_head]
            needed += [step.qkv, step.attn_mlp] if False in layers else []
            needed += [step.qkv_pruned, step.attn_mlp_pruned] if True in layers else []
            needed += filter(None, (step.pick, step.residual, step.qkv, step.attn_mlp))
            needed += filter(None, (step.qkv_pruned, step.attn_mlp_pruned))
        yield from _missing(m, (*needed, *filter(None, (engine_set.layer_conditioning,))))
    yield from _missing(m, filter(None, (m.text_encoder, m.encoder)))
    yield from _problems_of_decoder(m)


def _missing(m: Manifest, names: Any) -> Iterator[str]:
    for name in dict.fromkeys(names):
        if name not in m.engines:
            yield f"it has no engine {name!r}"


def _problems_of_decoder(m: Manifest) -> Iterator[str]:
    if m.tiles is None:
        yield from _missing(m, [m.decoder])
        return
    if m.decoder:
        yield "its image decoder is whole and tiled"
    if not (m.tiles.stages and m.tiles.rows >= 1 and 1 <= m.tiles.stripes <= MOST_STRIPES):
        yield f"its image decoder has {m.tiles.stripes} stripes of {m.tiles.rows} rows"
    yield from _missing(m, [name for stage in m.tiles.stages for name in (stage.engine, stage.last)])


def _problems_of_settings(m: Manifest) -> Iterator[str]:
    if not 0 <= m.prompt_format.pad_id <= MOST_SIZE:
        yield f"texts are padded with token {m.prompt_format.pad_id}"
    usual, found = family_named(m.family).sampling, m.sampling
    for name in ("tau", "top_k"):
        if (getattr(usual, name) is None) != (getattr(found, name) is None):
            yield f"{name} is {getattr(found, name)}, which {m.family} models do not draw with"
    if not all(math.isfinite(value) for value in asdict(found).values() if value is not None):
        yield "a setting is no number"
    alignment = m.address_alignment
    if not 1 <= alignment <= MOST_ALIGNMENT or alignment & (alignment - 1):
        yield f"addresses are multiples of {alignment}"
    weights = {"", *(stored for stored, _ in WEIGHT_FORMATS.values())}
    if m.precision.compute not in COMPUTE.values() or m.precision.weights not in weights:
        yield f"it computes in {m.precision.compute!r} with weights in {m.precision.weights!r}"
    if m.precision.activations not in ("", "int8"):
        yield f"it rounds activations to {m.precision.activations!r}"
    if m.precision_choice is not None:
        yield from _problems_of_choice(m.precision_choice)


def _problems_of_choice(choice: PrecisionChoice) -> Iterator[str]:
    if unknown := sorted(choice.gflops.keys() - {*FLOATS, INT8}):
        yield f"products of {unknown} were measured"
    if any(not 0 < speed < MOST_GFLOPS for speed in choice.gflops.values()):
        yield f"products were measured at {choice.gflops} GFLOP/s"
    for told in (choice.reason, choice.cpu, choice.library):
        if len(told) > MOST_TOLD or not told.isprintable():
            yield f"its precision was chosen for {told[:MOST_TOLD]!r}"
