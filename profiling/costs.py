"""What an image costs before anything runs: arithmetic and memory traffic of every engine call, from shapes alone.

Counted are matrix products, attention and convolutions, a multiplication and an addition as two FLOP; norms, gates,
selection and softmax are not. Bytes are every bound tensor read or written once: no engine can move less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

from ..config import ImageTokenizerConfig, TransformerConfig
from ..engines.dtypes import size_bytes
from ..engines.manifest import Manifest
from ..plan import GenerationPlan
from ..runtime.layout import Binding, EngineCall, Layout, StepCalls, lay_out
from ..schedule import Size

Shapes = Mapping[str, tuple[int, ...]]


class Kind(str, Enum):
    """What an engine does in a generation."""

    TEXT_ENCODER = "text encoder"
    CONDITION = "condition"
    TEXT_KV = "text keys"
    PROJECT = "project"
    ATTEND = "attend"
    BRIDGE = "bridge"
    DECODER = "decoder"


@dataclass(frozen=True)
class Cost:
    """FLOP by what they are spent on, and bytes moved."""

    gemm_flop: int = 0
    attention_flop: int = 0
    convolution_flop: int = 0
    bytes_moved: int = 0

    @property
    def flop(self) -> int:
        return self.gemm_flop + self.attention_flop + self.convolution_flop

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.gemm_flop + other.gemm_flop,
            self.attention_flop + other.attention_flop,
            self.convolution_flop + other.convolution_flop,
            self.bytes_moved + other.bytes_moved,
        )


@dataclass(frozen=True)
class CallCost:
    """One launch. `scale` is its index in the full schedule, `tokens` what it forwards per guidance row; both are
    None before and behind the scales.
    """

    engine: str
    kind: Kind
    layer: int | str | None
    scale: int | None
    tokens: int | None
    cost: Cost


@dataclass(frozen=True)
class EngineCosts:
    """All launches of one image, in order, with `rows` guidance rows and without a negative prompt."""

    rows: int
    calls: tuple[CallCost, ...]
    kv_cache_bytes: int

    @property
    def total(self) -> Cost:
        return add(call.cost for call in self.calls)

    def by_scale(self) -> dict[int, Cost]:
        """Scale index -> its cost, the executed scales only."""
        scales = dict.fromkeys(call.scale for call in self.calls if call.scale is not None)
        return {scale: add(call.cost for call in self.calls if call.scale == scale) for scale in scales}

    def by_kind(self) -> dict[Kind, Cost]:
        """Kind of engine -> its cost."""
        kinds = dict.fromkeys(call.kind for call in self.calls)
        return {kind: add(call.cost for call in self.calls if call.kind == kind) for kind in kinds}


def add(costs: Iterator[Cost]) -> Cost:
    """The sum."""
    return sum(costs, Cost())


def engine_costs(manifest: Manifest, rows: int) -> EngineCosts:
    """Costs of one image.

    Raises:
        BundleError: the manifest holds no engines for that number of guidance rows.
    """
    layout = lay_out(manifest, rows)
    kept = [slot.size for name, slot in layout.slots.items() if name.startswith(("keys.", "values."))]
    return EngineCosts(rows, tuple(_calls(manifest, layout)), sum(kept))


def _calls(manifest: Manifest, layout: Layout) -> Iterator[CallCost]:
    model = manifest.transformer
    if layout.text_encoder is not None:
        yield _cost(Kind.TEXT_ENCODER, layout.text_encoder, None, _text_encoder(manifest, layout.text_encoder))
    assert layout.condition is not None
    yield _cost(Kind.CONDITION, layout.condition, None, _condition(model, layout.condition))
    for call in layout.text_kv:
        yield _cost(Kind.TEXT_KV, call, None, _text_kv(model, call))
    for step in layout.steps:
        for call in step.layers:
            kind, count = (Kind.PROJECT, _project) if is_project(call) else (Kind.ATTEND, _attend)
            yield _cost(kind, call, step, count(model, call))
        yield _cost(Kind.BRIDGE, step.bridge, step, _bridge(manifest, layout.rows, step))
    for call in layout.decode:
        count_stage = _decoder_stage if manifest.tiles else _decoder
        yield _cost(Kind.DECODER, call, None, count_stage(manifest, call))


def is_project(call: EngineCall) -> bool:
    """Whether a layer's launch is the first half of its block, which writes keys and values; else the second."""
    return "x_out" not in call.tensors


def _cost(kind: Kind, call: EngineCall, step: StepCalls | None, flop: Cost) -> CallCost:
    cost = flop + Cost(bytes_moved=bytes_moved(call))
    if step is None:
        return CallCost(call.engine, kind, call.layer, None, None, cost)
    tokens = step.step.tokens if kind is Kind.BRIDGE else _shape(call, "q")[0]
    return CallCost(call.engine, kind, call.layer, step.step.index, tokens, cost)


# Tables of which an engine reads some rows only: input -> how many, given the shapes of all that it is bound to.
_TABLES: dict[str, Callable[[Shapes], int]] = {
    "shared.weight": lambda shapes: shapes["ids"][1],
    "lvl_embed.weight": lambda _: 1,
}


def bytes_moved(call: EngineCall) -> int:
    """Every tensor once, of embedding tables the rows that are looked up, and copies behind the engine twice."""
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
    """FLOP of Q K^T and P V over all heads, which together are `width` wide."""
    return 2 * gemm(queries, keys, width)


def _shape(call: EngineCall, name: str) -> tuple[int, ...]:
    return call.tensors[name].shape


def _condition(c: TransformerConfig, call: EngineCall) -> Cost:
    """Text projections over T * R rows; pooling by one query; modulation of the blocks (6 C) and the head (2 C)."""
    rows, length = _shape(call, "mask")
    text = rows * length
    projections = gemm(text, 2 * c.width, c.text_width) + gemm(text, c.width, c.text_width)
    projections += gemm(text, c.width, c.width)
    pooled = gemm(rows, c.width, c.width) + gemm(rows, 8 * c.width, c.width)
    return Cost(gemm_flop=projections + pooled, attention_flop=rows * attention(1, length, c.width))


def _text_kv(c: TransformerConfig, call: EngineCall) -> Cost:
    return Cost(gemm_flop=gemm(_shape(call, "text")[0], 2 * c.width, c.width))


def _project(c: TransformerConfig, call: EngineCall) -> Cost:
    kept, rows_heads, _ = _shape(call, "q")
    return Cost(gemm_flop=gemm(kept * rows_heads // c.heads, 3 * c.width, c.width))


def _attend(c: TransformerConfig, call: EngineCall) -> Cost:
    """Attention to the cache and to the text; the matrices of both, two in one and one in the other; feed-forward."""
    kept, rows_heads, _ = _shape(call, "q")
    rows = rows_heads // c.heads
    matrices = 3 * gemm(kept * rows, c.width, c.width) + 2 * gemm(kept * rows, c.mlp_width, c.width)
    keys = _shape(call, "keys")[0] + _shape(call, "text_keys")[0]
    return Cost(gemm_flop=matrices, attention_flop=rows * attention(kept, keys, c.width))


def _bridge(manifest: Manifest, rows: int, step: StepCalls) -> Cost:
    """The head, and the embedding of the next scale; both resizes are products with a matrix per axis."""
    c, plan = manifest.transformer, manifest.plan
    flop = gemm(step.step.tokens * rows, 2 * c.code_channels, c.width)
    own, final = _grid(plan, step.step.index, c.patch), _grid(plan, len(plan.schedule) - 1, c.patch)
    if own != final:
        flop += resize(c.bits, own, final)
    if step.step.next_index is not None:
        following = _grid(plan, step.step.next_index, c.patch)
        tokens = plan.schedule.tokens(step.step.next_index)
        flop += resize(c.bits, final, following) + gemm(tokens, c.width, c.code_channels)
    return Cost(gemm_flop=flop)


def _grid(plan: GenerationPlan, scale: int, patch: int) -> Size:
    height, width = plan.schedule.sizes[scale]
    return height * patch, width * patch


def resize(channels: int, source: Size, target: Size) -> int:
    """FLOP of a bilinear resize by matrices: the rows first, then the columns."""
    return channels * (gemm(target[0], source[1], source[0]) + gemm(target[0], target[1], source[1]))


def _text_encoder(manifest: Manifest, call: EngineCall) -> Cost:
    """T5: every matrix once for each token, and an attention wherever there are queries."""
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
    return Cost(convolution_flop=decoder_flop(manifest.image_tokenizer, (height, width)))


def _decoder_stage(manifest: Manifest, call: EngineCall) -> Cost:
    """One stage on one stripe: its convolutions, at the rows that it writes."""
    rows, _, width = next(
        _shape(call, name) for name in ("stripe_out", "inner_stripe_out", "image") if name in call.tensors
    )
    kernels = [shape for shape in _weights(manifest, call).values() if len(shape) == 4]
    return Cost(convolution_flop=sum(convolution(i, o, kernel, rows * width) for o, i, kernel, _ in kernels))


def decoder_flop(config: ImageTokenizerConfig, grid: Size) -> int:
    """FLOP of the image decoder on a latent grid [h, w], convolution by convolution (export/image_tokenizer.py)."""
    channels, area = config.level_channels, grid[0] * grid[1]
    inputs = channels[-1]
    flop = convolution(config.bits, inputs, 3, area) + 2 * residual_block(inputs, inputs, area)
    for level, outputs in reversed(list(enumerate(channels))):
        flop += residual_block(inputs, outputs, area) + config.residual_blocks * residual_block(outputs, outputs, area)
        if level > 0:  # twice as high and wide, then a convolution
            area *= 4
            flop += convolution(outputs, outputs, 3, area)
        inputs = outputs
    return flop + convolution(inputs, 3, 3, area)


def residual_block(inputs: int, outputs: int, area: int) -> int:
    """Two 3x3 convolutions, and a 1x1 one where the width changes."""
    shortcut = 0 if inputs == outputs else convolution(inputs, outputs, 1, area)
    return convolution(inputs, outputs, 3, area) + convolution(outputs, outputs, 3, area) + shortcut


def convolution(inputs: int, outputs: int, kernel: int, area: int) -> int:
    """FLOP of a convolution that gives `area` pixels."""
    return gemm(area, outputs, inputs * kernel**2)
