"""HART's step graphs (the prompt as conditioning and first scale, the sampling head), and its adapter.

The halves of its blocks are in blocks.py, what the diffusion head adds at the end in residual.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ....core.plan import GenerationPlan, StepPlan
from ....core.schedule import Size
from ....errors import PlanError
from ....families.codebook import VqTokenizerConfig, phi_index
from ....families.hart import HART, HartConfig, guidance_ratio, top_k
from ..codebook.steps import CodebookAdapter, CodeSamplingHead, LayerModulation
from ..common.rows import OpenDims, Shapes, Weights, of_rows, rms_norm, rows_of, tokens_of
from ..common.step_graph import StepGraph
from ..common.steps import ImageStep, Step
from ..common.weights import Sources, State, affine
from ..transformer.adapter import LAYER_PREFIX, SHARED_PREFIX, ExportContext, sampling_head_graph, size_label
from ..transformer.block_steps import KEPT, LARGER, Tensors
from ..transformer.published_models import PublishedModel
from .blocks import AttnMlp, Qkv
from .model import DERIVED, HartTransformer, infer_transformer
from .residual import Residual, with_tokens
from .weights import hart_weights


class Conditioning(ImageStep):
    """Text features -> tokens of the first scale, rotary positions, modulation of the head.

    cond [T, Ct], of B images [B, T, Ct], mask [B, T] (1 = a token that counts; its padding is read all the same)
    -> x [T * R, C], head_modulation [R, 2, C], context_positions [T * R], offset [R] (the last context position), and
    in modulated models pooled [R, C], SiLU done.

    The unconditional row reads features of zero: every token of it is the bias of the embedding, at position 0.
    """

    config: HartConfig

    inputs = ("cond", "mask")

    def __init__(self, config: HartConfig, rows: int, images: int = 1) -> None:
        super().__init__(config, rows, config.context_length, images)
        self.outputs = ("x", "head_modulation", "context_positions", "offset")
        self.outputs += ("pooled",) if config.modulated else ()
        self.weights = (*affine("context_embed"), "lvl_embed.weight", *affine("head_nm.ada_lin.1"))
        self.weights += ("context_norm.weight",) if config.context_norm else ()

    def border(self) -> Shapes:
        T, R, C = self.text_length, self.rows, self.config.width
        cond = self.of_images((T, self.config.context_width))
        shapes: Shapes = {"cond": cond, "mask": (self.images, T), "x": (T * R, C), "pooled": (R, C)}
        return {**shapes, "head_modulation": (R, 2, C), "context_positions": (T * R,), "offset": (R,)}

    def forward(self, cond: Tensor, mask: Tensor, weights: Weights) -> tuple[Tensor, ...]:
        c, w = self.config, weights
        B, T, C, nothing = self.images, c.context_length, c.width, w["context_embed.bias"]
        features = rms_norm(cond.float(), w["context_norm.weight"]) if c.context_norm else cond
        embedded = F.linear(features.to(w["context_embed.weight"].dtype), w["context_embed.weight"]).float() + nothing
        embedded = embedded.view(B, T, C).transpose(0, 1)
        x = self._rows(embedded, nothing.expand(T, B, C)) + w["lvl_embed.weight"][0]
        largest = self._rows(embedded.amax(0, keepdim=True), nothing.expand(1, B, C)).view(-1, C)
        head = F.linear(F.silu(largest), w["head_nm.ada_lin.1.weight"], w["head_nm.ada_lin.1.bias"])
        before = torch.ones(T, T).triu()  # a running sum as a product, which every compiler has
        positions = (mask @ before - 1).transpose(0, 1)  # [T, B]
        positions = self._rows(positions, torch.zeros(T, B))
        offset = positions[-1]
        found = (x.view(-1, C), head.view(-1, 2, C), positions.flatten(), offset)
        if not c.modulated:
            return found
        if c.pooling == "avg":
            mean = (mask.transpose(0, 1).unsqueeze(-1) * embedded).sum(0, keepdim=True) / mask.sum(1, keepdim=True)
            largest = self._rows(mean, nothing.expand(1, B, C)).view(-1, C)
        return (*found, F.silu(largest))

    def _rows(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """[T, B, ...] each -> [T, R, ...], contiguous: of one tensor AOTInductor's `cat` keeps how it lies."""
        if self.rows == self.images:
            return conditional.contiguous()
        return torch.cat((conditional, unconditional), dim=1)


class SamplingHead(CodeSamplingHead):
    """HART's sampling head: the scale decides how many codes are ranked, and the last scale has no phi.

    At the first scale the last context token alone draws the one code of the 1x1 map. Where the last scale is drawn in
    parts, positions [m * B] (int64) are the numbers of this part's tokens. Where the diffusion head follows, codes
    [L * B] (int64) are an output.
    """

    config: HartConfig

    place_table = "lvl_embed.weight"
    head_weights = (*CodeSamplingHead.head_weights, "head_norm.weight")

    def __init__(self, *, part: int = 0, residual: bool = False, **arguments: Any) -> None:
        """part: how many tokens of the last scale these are, 0 for all."""
        self.part, self.residual = part, residual  # the base asks for them at once
        super().__init__(**arguments)

    def has_phi(self, next_size: Size | None) -> bool:
        return next_size is not None

    def ranked(self) -> int:
        return min(top_k(self.index), int(self.config.codes))

    def further_inputs(self) -> tuple[str, ...]:
        return ("positions",) if self.part else ()

    def further_outputs(self) -> tuple[str, ...]:
        return ("codes",) if self.residual else ()

    def further_shapes(self) -> Shapes:
        return {**super().further_shapes(), "positions": (self.part * self.images,)}

    def next_places(self) -> Tensor:
        return torch.tensor([self.next_index])

    def head_input(self, x: Tensor, modulation: Tensor, weights: Weights) -> Tensor:
        h = rms_norm(x, weights["head_norm.weight"]).view(-1, self.rows, self.config.width)
        return (h * (1 + modulation[:, 0]) + modulation[:, 1]).view(-1, self.config.width)

    def sampled_rows(self, x: Tensor) -> Tensor:
        return x.narrow(0, x.shape[0] - self.rows, self.rows) if self.index == 0 else x

    def tokens(self) -> int:
        return int(self.config.context_length) if self.index == 0 else self.draws()

    def draws(self) -> int:
        return self.part or tokens_of(self.size)

    @classmethod
    def stand_in(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """One program for all scales that rank as many codes and go by the same phi."""
        found, index, scales = super().stand_in(arguments), arguments["index"], arguments["scales"]
        if index and arguments["next_size"] is not None:
            alike = (top_k(index), phi_index(index, scales))
            index = next(i for i in range(1, scales) if (top_k(i), phi_index(i, scales)) == alike)
        part = arguments.get("part", 0)
        return {**found, "index": index, "part": KEPT if part > 1 else part}

    def added(self, summed: Tensor, embedded: Tensor, named: Tensors, weights: Weights) -> Tensor:
        if not self.part:
            return super().added(summed, embedded, named, weights)
        return with_tokens(summed, embedded, named["positions"])


class Pick(Step):
    """The tokens of a part of a scale: x [L * R, C], positions [m * B] (int64) -> x_out [m * R, C]."""

    inputs = ("x", "positions")
    outputs = ("x_out",)
    weights: tuple[str, ...] = ()

    def __init__(self, config: HartConfig, rows: int, size: Size, part: int, images: int = 1) -> None:
        super().__init__()
        self.config, self.rows, self.size, self.part, self.images = config, rows, size, part, images

    def open_dims(self) -> OpenDims:
        x: OpenDims = {"x": {0: ("tokens", self.rows)}, "x_out": {0: ("part", self.rows)}}
        return {**x, "positions": {0: ("part", self.images)}}

    @classmethod
    def stand_in(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        return {**arguments, "size": LARGER, "part": KEPT if arguments["part"] > 1 else 1}

    def border(self) -> Shapes:
        C, R = self.config.width, self.rows
        own = (self.part * self.images,)
        return {"x": (tokens_of(self.size) * R, C), "positions": own, "x_out": (self.part * R, C)}

    def forward(self, x: Tensor, positions: Tensor, weights: Weights) -> Tensor:
        return x.index_select(0, rows_of(of_rows(positions, self.images, self.rows), self.rows))


Context = ExportContext[HartConfig, VqTokenizerConfig]


class HartAdapter(CodebookAdapter[HartConfig]):
    """HART: the prompt is the first scale itself, and a diffusion head ends the last one."""

    family = HART
    marker = "context_embed.weight"
    transformer = HartTransformer
    qkv = Qkv
    attn_mlp = AttnMlp
    text_encoders = ("qwen2",)
    published = (
        PublishedModel(
            "llm",
            "hart_0.7b",
            image_tokenizers=("tokenizer",),
            text_encoder="Qwen2-VL-1.5B-Instruct",
            text_encoder_repository="mit-han-lab/Qwen2-VL-1.5B-Instruct",
            weight_files=("ema_model.bin",),  # what the published program draws with, unless told otherwise
        ),
    )
    derived = DERIVED

    def infer_transformer(self, shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any]) -> HartConfig:
        return infer_transformer(shapes, settings)

    def conditioning(self, context: Context) -> StepGraph:
        check_plan(context.plan)
        arguments = {"config": context.transformer, "rows": context.rows, "images": context.images}
        return StepGraph(f"conditioning-{context.label}{context.of_images}", Conditioning, arguments, SHARED_PREFIX)

    def layer_conditioning(self, context: Context) -> StepGraph | None:
        if not context.transformer.modulated:
            return None
        arguments = {"config": context.transformer, "rows": context.rows}
        return StepGraph(f"modulation-{context.label}", LayerModulation, arguments, LAYER_PREFIX)

    def grid(self, context: Context, step: StepPlan) -> Size:
        return step.size if step.index and step.part is None else (1, step.tokens)

    def qkv_arguments(self, context: Context, step: StepPlan) -> dict[str, Any]:
        given = self._modulation(context) + (("offset",) if step.index else ("context_positions",))
        given += ("positions",) if step.part is not None else ()
        own = {"images": context.images} if step.part is not None else {}
        return {"given": given, "scale": step.size, "final": context.plan.schedule.final, **own}

    def attn_mlp_arguments(self, context: Context, step: StepPlan) -> dict[str, Any]:
        return {"given": self._modulation(context)}

    def _modulation(self, context: Context) -> tuple[str, ...]:
        return ("modulation",) if context.transformer.modulated else ()

    def sampling_head(self, context: Context, step: StepPlan) -> StepGraph:
        plan, scales = context.plan, len(context.plan.schedule)
        arguments: dict[str, Any] = {"index": step.index, "scales": scales}
        arguments |= {"config": context.transformer, "ratio": guidance_ratio(step.index, scales)}
        arguments |= {"smooth": plan.sampling_mode.smooth, "part": _part(step)}
        arguments |= {"residual": plan.sampling_mode.residual and step.next_index is None}
        graph = sampling_head_graph(SamplingHead, arguments, context, step)
        return graph if step.part is None else replace(graph, name=f"{graph.name}-part{step.part}")

    def pick(self, context: Context, step: StepPlan) -> StepGraph | None:
        if step.part is None:
            return None
        arguments = {"config": context.transformer, "rows": context.rows_of(step), "images": context.images}
        arguments |= {"size": step.size}
        name = f"pick-{size_label(step.size)}-k{step.tokens}-{context.rows_label(step)}{context.of_images}"
        return StepGraph(name, Pick, {**arguments, "part": step.tokens}, SHARED_PREFIX)

    def residual(self, context: Context, step: StepPlan) -> StepGraph | None:
        if step.next_index is not None or not context.plan.sampling_mode.residual:
            return None
        ratio = guidance_ratio(step.index, len(context.plan.schedule))
        arguments = {"config": context.transformer, "rows": context.rows_of(step), "images": context.images}
        arguments |= {"size": step.size, "ratio": ratio}
        name = f"residual-{size_label(step.size)}-k{step.tokens}-{context.rows_label(step)}{context.of_images}"
        return StepGraph(name, Residual, {**arguments, "part": _part(step)}, SHARED_PREFIX)

    def weights(self, transformer: HartConfig, state: State, images: VqTokenizerConfig, images_state: State) -> Sources:
        found = hart_weights(transformer, state, images, images_state)
        return {SHARED_PREFIX + name: source for name, source in found.items()}


def _part(step: StepPlan) -> int:
    return 0 if step.part is None else step.tokens


def check_plan(plan: GenerationPlan) -> None:
    """Check a plan against the two ends of HART's schedule.

    Raises:
        PlanError: the last scale is skipped, or tokens are to be restored from the first.
    """
    name = plan.policy.name
    if plan.steps[-1].index != len(plan.schedule) - 1:
        raise PlanError(f"policy {name!r} skips HART's last scale, whose tokens are the image's detail")
    if plan.cached_size is not None and plan.policy.restore_scale == 0:
        raise PlanError(
            f"policy {name!r} restores tokens from scale 0, which is the prompt in HART",
            expected="a scale of image tokens",
            fix="set restore_scale",
        )
