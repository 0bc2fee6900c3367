"""The cost of an image before it runs: arithmetic and memory traffic of each engine call, from shapes alone.

FLOP count matrix products, attention and convolutions, with two FLOP per multiplication and addition. They do not
count norms, gates, selection and softmax. Bytes count each bound tensor once, the least that an engine can move.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, replace
from enum import Enum

from ...core.dtypes import size_bytes
from ...core.plan import GenerationPlan
from ...core.schedule import Size
from ...engines.bundle.manifest import Manifest
from ...runtime.memory.layout import Binding, EngineCall, Layout, StepCalls, build_layout

Shapes = Mapping[str, tuple[int, ...]]
_LEVEL = re.compile(r"(?:^|\.)up\.(\d+)\.")  # level 0 of a decoder is the finest


class Kind(str, Enum):
    """Kinds of engine."""

    TEXT_ENCODER = "text encoder"
    CONDITION = "conditioning"
    LAYER_CONDITION = "layer condition"
    QKV = "qkv"
    ATTN_MLP = "attn_mlp"
    PICK = "pick"
    SAMPLING_HEAD = "sampling_head"
    RESIDUAL = "residual"
    DECODER = "decoder"


@dataclass(frozen=True)
class Cost:
    """FLOP by operation, and bytes moved."""

    gemm_flop: int = 0
    attention_flop: int = 0
    convolution_flop: int = 0
    bytes_moved: int = 0

    @property
    def flop(self) -> int:
        return self.gemm_flop + self.attention_flop + self.convolution_flop

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class CallCost:
    """One launch. `scale` is an index into the full schedule, `tokens` the tokens forwarded per guidance row; both are
    None before and after the scales.
    """

    engine: str
    kind: Kind
    layer: int | str | None
    scale: int | None
    tokens: int | None
    cost: Cost


@dataclass(frozen=True)
class EngineCosts:
    """All launches of an image, in order, with `rows` guidance rows and without a negative prompt."""

    rows: int
    calls: tuple[CallCost, ...]
    kv_cache_bytes: int

    @property
    def total(self) -> Cost:
        return add(call.cost for call in self.calls)

    def by_scale(self) -> dict[int, Cost]:
        """Scale index -> cost, of the executed scales."""
        scales = dict.fromkeys(call.scale for call in self.calls if call.scale is not None)
        return {scale: add(call.cost for call in self.calls if call.scale == scale) for scale in scales}

    def by_kind(self) -> dict[Kind, Cost]:
        """Kind of engine -> cost."""
        kinds = dict.fromkeys(call.kind for call in self.calls)
        return {kind: add(call.cost for call in self.calls if call.kind == kind) for kind in kinds}


def add(costs: Iterable[Cost]) -> Cost:
    """The sum."""
    return sum(costs, Cost())


def engine_costs(manifest: Manifest, rows: int, images: int = 1) -> EngineCosts:
    """The costs of a pass of so many images with so many guidance rows each.

    Raises:
        BundleError: the manifest has no engines for such a pass.
    """
    layout = build_layout(manifest, rows, images)
    kept = [slot.size for name, slot in layout.buffers.items() if name.startswith(("keys.", "values."))]
    return EngineCosts(rows, tuple(_calls(manifest, layout)), sum(kept))


def _calls(manifest: Manifest, layout: Layout) -> Iterator[CallCost]:
    if layout.text_encoder is not None:
        yield _text_cost(manifest, layout.text_encoder, layout.images)
    assert layout.conditioning is not None
    yield _cost(Kind.CONDITION, layout.conditioning, None, _condition(manifest, layout.conditioning))
    for call in layout.layer_conditioning:
        yield _cost(Kind.LAYER_CONDITION, call, None, _layer_condition(manifest, call))
    for step in layout.steps:
        if step.pick is not None:
            yield _cost(Kind.PICK, step.pick, step, Cost())
        for call in step.layers:
            kind, count = (Kind.QKV, _qkv) if is_project(call) else (Kind.ATTN_MLP, _attn_mlp)
            yield _cost(kind, call, step, count(manifest, call))
        yield _cost(Kind.SAMPLING_HEAD, step.sampling_head, step, _sampling_head(manifest, step))
        if step.residual is not None:
            yield _cost(Kind.RESIDUAL, step.residual, step, _residual(manifest, step.residual, step.rows))
    for call in layout.decode * layout.images:
        count_stage = _decoder_stage if manifest.tiles else _decoder
        yield _cost(Kind.DECODER, call, None, count_stage(manifest, call))


def _text_cost(manifest: Manifest, call: EngineCall, images: int) -> CallCost:
    """The prompts of all images, as one."""
    one = _cost(Kind.TEXT_ENCODER, call, None, _text_encoder(manifest, call))
    return replace(one, cost=Cost(*(images * count for count in astuple(one.cost))))


def is_project(call: EngineCall) -> bool:
    """Whether a launch is the first half of a layer's block, which writes keys and values."""
    return "x_out" not in call.tensors


def _cost(kind: Kind, call: EngineCall, step: StepCalls | None, flop: Cost) -> CallCost:
    cost = flop + Cost(bytes_moved=bytes_moved(call))
    if step is None:
        return CallCost(call.engine, kind, call.layer, None, None, cost)
    tokens = _shape(call, "q")[0] if kind in (Kind.QKV, Kind.ATTN_MLP) else step.step.tokens
    return CallCost(call.engine, kind, call.layer, step.step.index, tokens, cost)


def _codes_read(shapes: Shapes) -> int:
    """Rows of the codebook: of the sampled codes, or all if codes are mixed."""
    if "gumbel" in shapes:
        return shapes["codebook.weight"][0]
    return shapes["codes" if "codes" in shapes else "noise"][0]


# Tables that an engine reads some rows of: input -> number of rows, given the shapes of all bound tensors.
_TABLES: dict[str, Callable[[Shapes], int]] = {
    "shared.weight": lambda shapes: shapes["ids"][1],
    "lvl_embed.weight": lambda _: 1,
    "embed_tokens.weight": lambda shapes: shapes["ids"][1],
    "class_emb.weight": lambda shapes: shapes["labels"][0],
    "position.weight": lambda shapes: shapes.get("x_next", (1,))[0],
    "codebook.weight": _codes_read,
}


def bytes_moved(call: EngineCall) -> int:
    """Each tensor once, embedding tables by the rows read, and the copies after the engine twice."""
    shapes = {name: binding.shape for name, binding in call.tensors.items()}
    tensors = sum(_read(name, binding, shapes) for name, binding in call.tensors.items())
    return tensors + sum(copy.source.size + copy.target.size for copy in call.copies)


def _read(name: str, binding: Binding, shapes: Shapes) -> int:
    if name not in _TABLES:
        return binding.size
    return size_bytes(binding.dtype, (_TABLES[name](shapes), *binding.shape[1:]))


def gemm(m: int, n: int, k: int) -> int:
    """FLOP of [m, k] @ [k, n]."""
    return 2 * m * n * k


def attention(queries: int, keys: int, width: int) -> int:
    """FLOP of Q K^T and P V over all heads of total width `width`."""
    return 2 * gemm(queries, keys, width)


def _shape(call: EngineCall, name: str) -> tuple[int, ...]:
    return call.tensors[name].shape


def _matrices(manifest: Manifest, call: EngineCall) -> Shapes:
    """The matrices of an engine: its weights without tables, gates and kernels."""
    weights = _weights(manifest, call).items()
    return {n: s for n, s in weights if len(s) == 2 and n.endswith(".weight") and n not in _TABLES}


def _products(manifest: Manifest, call: EngineCall, rows: int) -> int:
    """FLOP of all matrices over that number of rows."""
    return sum(gemm(rows, *shape) for shape in _matrices(manifest, call).values())


# Matrices of the condition that multiply every text token; all others multiply one row per guidance row.
_OF_EVERY_TOKEN = ("text_proj_for_ca.", "text_proj_for_sos.ca.mat_kv.", "context_embed.")


def _condition(manifest: Manifest, call: EngineCall) -> Cost:
    """Text projections over T * R rows; pooling with one query; modulation of the blocks and the head."""
    rows, length = _shape(call, "head_modulation")[0], manifest.text_length
    tokens = math.prod(_shape(call, "mask")) if "mask" in call.tensors else 0
    matrices = _matrices(manifest, call).items()
    flop = sum(gemm(tokens if name.startswith(_OF_EVERY_TOKEN) else rows, *shape) for name, shape in matrices)
    pools = any(name.endswith(".mat_q") for name in _weights(manifest, call))
    return Cost(flop, rows * attention(1, length, manifest.transformer.width) if pools else 0)


def _layer_condition(manifest: Manifest, call: EngineCall) -> Cost:
    first = manifest.engines[call.engine].inputs[0].name
    return Cost(_products(manifest, call, _shape(call, first)[0]))


def _qkv(manifest: Manifest, call: EngineCall) -> Cost:
    kept, rows_heads, _ = _shape(call, "q")
    return Cost(_products(manifest, call, kept * rows_heads // manifest.transformer.heads))


def _attn_mlp(manifest: Manifest, call: EngineCall) -> Cost:
    """Attention to the cache, and to the text if the model has such; every matrix once."""
    kept, rows_heads, _ = _shape(call, "q")
    rows = rows_heads // manifest.transformer.heads
    keys = sum(_shape(call, name)[0] for name in ("keys", "guided_keys", "text_keys") if name in call.tensors)
    products = _products(manifest, call, kept * rows)
    return Cost(products, rows * attention(kept, keys, manifest.transformer.width))


def _sampling_head(manifest: Manifest, step: StepCalls) -> Cost:
    """The head, and the embedding of the next scale. Both resizes are products with a matrix per axis; phi, if the
    model has it, is a convolution of the sum.
    """
    c, plan, call = manifest.transformer, manifest.plan, step.sampling_head
    images, channels, *final = _shape(call, "summed_out")
    area, shapes = images * final[0] * final[1], _weights(manifest, call)
    flop = gemm(_shape(call, "logits")[0] // images * step.rows, *shapes["head.weight"])
    own, last = _grid(plan, step.step.index, c.patch), _grid(plan, len(plan.schedule) - 1, c.patch)
    if own != last:
        flop += images * resize(channels, own, last)
    if step.step.next_index is not None:
        flop += images * resize(channels, last, _grid(plan, step.step.next_index, c.patch))
        flop += gemm(images * plan.schedule.tokens(step.step.next_index), *shapes["word_embed.weight"])
    return Cost(flop, convolution_flop=_convolutions(shapes, area))


def _residual(manifest: Manifest, call: EngineCall, rows: int) -> Cost:
    """The diffusion head: its network once per step, token and guidance row; matrices that do not depend on the step
    once, matrices that guidance rows share once per token.
    """
    steps, tokens, _ = _shape(call, "residual_noise")
    rows //= _shape(call, "summed")[0]  # of each image

    def count(name: str) -> int:
        times = steps if name.startswith("diffusion.") and "cond_embed." not in name else 1
        return times * tokens * (1 if "input_proj." in name or "word_embed." in name else rows)

    return Cost(sum(gemm(count(name), *shape) for name, shape in _matrices(manifest, call).items()))


def _grid(plan: GenerationPlan, scale: int, patch: int) -> Size:
    height, width = plan.schedule.sizes[scale]
    return height * patch, width * patch


def resize(channels: int, source: Size, target: Size) -> int:
    """FLOP of a bilinear resize by matrices, rows first, then columns."""
    return channels * (gemm(target[0], source[1], source[0]) + gemm(target[0], target[1], source[1]))


def _text_encoder(manifest: Manifest, call: EngineCall) -> Cost:
    """T5: every matrix once per token, and an attention per query matrix."""
    length = _shape(call, "ids")[1]
    matrices = {name: shape for name, shape in _weights(manifest, call).items() if len(shape) == 2}
    tables = ("shared.weight", "relative_attention_bias.weight")
    products = sum(gemm(length, *shape) for name, shape in matrices.items() if not name.endswith(tables))
    queries = [shape[0] for name, shape in matrices.items() if name.endswith(".q.weight")]
    return Cost(gemm_flop=products, attention_flop=sum(attention(length, length, width) for width in queries))


def _weights(manifest: Manifest, call: EngineCall) -> dict[str, tuple[int, ...]]:
    return {name: _shape(call, name) for name in manifest.engines[call.engine].weights}


def _decoder(manifest: Manifest, call: EngineCall) -> Cost:
    height, width = _shape(call, "summed")[2:]
    return decoder_cost(_weights(manifest, call), (height, width))


def _decoder_stage(manifest: Manifest, call: EngineCall) -> Cost:
    """The convolutions of one stage on one stripe, at the rows that it writes."""
    rows, _, width = next(
        _shape(call, name) for name in ("stripe_out", "inner_stripe_out", "image") if name in call.tensors
    )
    return Cost(convolution_flop=_convolutions(_weights(manifest, call), rows * width))


def decoder_cost(weights: Shapes, grid: Size) -> Cost:
    """The image decoder on a latent grid [h, w]; the names of its weights give the resolution of each convolution."""
    last = max(int(found[1]) for name in weights if (found := _LEVEL.search(name)))
    flop = pairs = 0
    for name, shape in weights.items():
        if len(shape) != 4:
            continue
        outputs, inputs, kernel, _ = shape
        level = _LEVEL.search(name)
        doublings = last - int(level[1]) if level else last if "conv_out." in name else 0
        area = grid[0] * grid[1] * 4 ** (doublings + (".upsample." in name))
        flop += convolution(inputs, outputs, kernel, area)
        if name.endswith(".qkv.weight"):
            pairs += attention(area, area, inputs)
    return Cost(attention_flop=pairs, convolution_flop=flop)


def _convolutions(weights: Shapes, area: int) -> int:
    """FLOP of all convolutions at `area` pixels."""
    return sum(convolution(s[1], s[0], s[2], area) for s in weights.values() if len(s) == 4)


def convolution(inputs: int, outputs: int, kernel: int, area: int) -> int:
    """FLOP of a convolution with `area` output pixels."""
    return gemm(area, outputs, inputs * kernel**2)
