"""VAR's step graphs (the class as conditioning, the halves of a block, the sampling head), and its adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ....core.plan import StepPlan
from ....families.codebook import VqTokenizerConfig, phi_index
from ....families.var import VAR, VarConfig
from ..codebook.steps import CodebookAdapter, CodeSamplingHead, LayerModulation, VqImageEncoder, codebook_weights
from ..common.rows import Shapes, Weights, tokens_of, unit
from ..common.step_graph import StepGraph
from ..common.steps import ImageStep
from ..common.weights import Role, Sources, State, WeightSource, affine
from ..transformer.adapter import LAYER_PREFIX, SHARED_PREFIX, ExportContext, sampling_head_graph
from ..transformer.block_steps import Tensors
from ..transformer.layers import QUARTER
from ..transformer.modulated_steps import ModulatedAttnMlp, ModulatedQkv
from ..transformer.published_models import PublishedModel, TrainingKeys
from ..transformer.weights import Official, all_layers, attention_weights
from .model import DERIVED, VarTransformer, infer_transformer


class Conditioning(ImageStep):
    """labels [R] (int64; the number of classes stands for none) -> x [R, C], pooled [R, C], head_modulation [R, 2, C].

    `pooled` modulates the layers: it is the class embedding after SiLU, or in models of one shared adaptive norm the
    output of that norm, flat [R, 6 C].
    """

    config: VarConfig

    inputs = ("labels",)
    outputs = ("x", "pooled", "head_modulation")

    def __init__(self, config: VarConfig, rows: int) -> None:
        super().__init__(config, rows)
        self.weights = ("class_emb.weight", "pos_start", "position.weight", *affine("head_nm.ada_lin.1"))
        self.weights += affine("shared_ada_lin.1") if config.shared_modulation else ()

    def border(self) -> Shapes:
        R, C = self.rows, self.config.width
        return {"labels": (R,), "x": (R, C), "pooled": (R, pooled_width(self.config)), "head_modulation": (R, 2, C)}

    def forward(self, labels: Tensor, weights: Weights) -> tuple[Tensor, ...]:
        w, c = weights, self.config
        embedding = w["class_emb.weight"].index_select(0, labels)
        active = F.silu(embedding)
        head = F.linear(active, w["head_nm.ada_lin.1.weight"], w["head_nm.ada_lin.1.bias"]).view(-1, 2, c.width)
        x = embedding + w["pos_start"].flatten() + w["position.weight"][0]
        if not c.shared_modulation:
            return x, active, head
        return x, F.linear(active, w["shared_ada_lin.1.weight"], w["shared_ada_lin.1.bias"]), head


class SharedModulation(ImageStep):
    """One layer's own offset on the modulation that all share: pooled [R, 6 C] -> modulation [R, 6, C]."""

    inputs = ("pooled",)
    outputs = ("modulation",)
    weights = ("ada_gss",)

    def border(self) -> Shapes:
        R, C = self.rows, self.config.width
        return {"pooled": (R, 6 * C), "modulation": (R, 6, C)}

    def forward(self, pooled: Tensor, weights: Weights) -> Tensor:
        return pooled.view(-1, 6, self.config.width) + weights["ada_gss"]


class Qkv(ModulatedQkv):
    """VAR's first half: modulated layer norm, cosine attention, no rotary."""

    def __init__(self, config: VarConfig, rows: int, size: tuple[int, int], kept: int, text_rows: int = 0) -> None:
        super().__init__(config, rows, size, kept, text_rows)
        self.unit_queries = config.unit_queries
        self.weights += ("sa.q_scale",) if config.unit_queries else ()

    def positioned(
        self, q: Tensor, k: Tensor, token: Tensor | None, given: Tensors, weights: Weights
    ) -> tuple[Tensor, Tensor]:
        if not self.unit_queries:
            return q * (QUARTER * self.config.head_dim**-0.5), k
        scaled = unit(q.float()) * weights["sa.q_scale"].view(-1, 1)
        return scaled.to(q.dtype), unit(k.float()).to(k.dtype)


class SamplingHead(CodeSamplingHead):
    """VAR's sampling head: the caller sets top-k; every token of all scales has a learned position."""

    config: VarConfig

    place_table = "position.weight"

    def further_inputs(self) -> tuple[str, ...]:
        return ("top_k",)

    def next_places(self) -> Tensor:
        assert self.next_index is not None
        assert self.next_size is not None
        return self.config.first_token(self.next_index) + torch.arange(tokens_of(self.next_size))

    @classmethod
    def stand_in(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """One program for all scales that go by the same phi."""
        found, index, scales = super().stand_in(arguments), arguments["index"], arguments["scales"]
        alike = next(i for i in range(scales) if phi_index(i, scales) == phi_index(index, scales))
        return {**found, "index": alike}


Context = ExportContext[VarConfig, VqTokenizerConfig]


class VarAdapter(CodebookAdapter[VarConfig]):
    """VAR: a class enters by modulation and as the first token."""

    family = VAR
    marker = "class_emb.weight"
    transformer = VarTransformer
    qkv = Qkv
    attn_mlp = ModulatedAttnMlp
    encoder = VqImageEncoder
    training_keys = TrainingKeys(trained=("var_wo_ddp", "var"))
    published = (PublishedModel(r"var_d\d+", image_tokenizers=("vae_ch160v4096z32",)),)
    derived = DERIVED

    def infer_transformer(self, shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any]) -> VarConfig:
        return infer_transformer(shapes, settings)

    def conditioning(self, context: Context) -> StepGraph:
        return StepGraph(f"conditioning-{context.label}", Conditioning, self._arguments(context), SHARED_PREFIX)

    def layer_conditioning(self, context: Context) -> StepGraph:
        kind = SharedModulation if context.transformer.shared_modulation else LayerModulation
        return StepGraph(f"modulation-{context.label}", kind, self._arguments(context), LAYER_PREFIX)

    def _arguments(self, context: Context) -> dict[str, Any]:
        return {"config": context.transformer, "rows": context.rows}

    def sampling_head(self, context: Context, step: StepPlan) -> StepGraph:
        plan = context.plan
        scales = len(plan.schedule)
        arguments: dict[str, Any] = {"index": step.index, "scales": scales, "ratio": step.index / max(scales - 1, 1)}
        arguments |= {"config": context.transformer, "smooth": plan.sampling_mode.smooth}
        return sampling_head_graph(SamplingHead, arguments, context, step)

    def weights(self, transformer: VarConfig, state: State, images: VqTokenizerConfig, images_state: State) -> Sources:
        official = Official.of(VarTransformer, transformer, state)
        sources = _shared_weights(transformer, official) | codebook_weights(images, images_state)
        layers = all_layers(transformer.depth, lambda i: _layer_weights(transformer, official.layer(f"blocks.{i}.")))
        return {SHARED_PREFIX + name: source for name, source in (sources | layers).items()}


def pooled_width(config: VarConfig) -> int:
    """Channels of `pooled`, which the condition gives to every layer."""
    return (6 if config.shared_modulation else 1) * config.width


def _shared_weights(c: VarConfig, official: Official) -> Sources:
    exact = ("class_emb.weight", "pos_start", *affine("word_embed", "head_nm.ada_lin.1"))
    exact += affine("shared_ada_lin.1") if c.shared_modulation else ()

    def position() -> Tensor:
        """Level and position embedding of every token, in one table."""
        level_of = torch.repeat_interleave(torch.arange(c.max_scales), torch.tensor([side**2 for side in c.scales]))
        return official["pos_1LC"][0].float() + official["lvl_embed.weight"].float()[level_of]

    sources = official.taken(exact) | official.taken(affine("head"), Role.COMPUTE)
    return sources | {"position.weight": WeightSource((c.tokens, c.width), position)}


def _layer_weights(c: VarConfig, official: Official) -> Sources:
    sources = attention_weights(c, official, "attn", "mat_qkv", c.unit_queries)
    sources |= official.taken(("ffn.fc1.weight", "ffn.fc2.weight"), Role.QUANTIZABLE)
    sources |= official.taken(("ffn.fc1.bias", "ffn.fc2.bias"), Role.COMPUTE)
    if not c.shared_modulation:
        return sources | official.taken(affine("ada_lin.1"), Role.COMPUTE)
    return sources | {"ada_gss": WeightSource((6, c.width), lambda: official["ada_gss"].view(6, c.width))}
