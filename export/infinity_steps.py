"""Infinity's step graphs around the blocks: condition, text keys and values, the bridge between two scales; its wiring.

Each is a torch module with weights as inputs and every shape static; the layout of activations is that of rows.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError
from ..families.infinity import INFINITY, ImageTokenizerConfig, TransformerConfig
from ..plan import StepPlan
from ..resize import bilinear_matrix
from ..schedule import PIXELS_PER_TOKEN, Size
from .graphs import StepGraph
from .image_tokenizer import ImageTokenizer, infer_image_tokenizer
from .infinity import InfinityTransformer, infer_transformer
from .infinity_blocks import Attend, Project
from .infinity_weights import transformer_weights
from .rows import (
    ANY,
    OpenDims,
    Shapes,
    Weights,
    first,
    modulate,
    stand_in,
    tokens_of,
)
from .weights import WeightSource
from .wiring import LAYER_PREFIX, SHARED_PREFIX, Setting, Wiring, bridge_graph


class Condition(nn.Module):
    """Text features -> first tokens, cross-attention source, modulation of the blocks and of the head.

    cond, uncond [T, Ct] (uncond absent without guidance), mask [R, T] (1 = a token)
    -> x [R, C], text [T * R, C], modulation [R, 6, C], head_modulation [R, 2, C], text_bias [R * heads, 1, T]
    """

    outputs = ("x", "text", "modulation", "head_modulation", "text_bias")
    weights = (
        "text_norm.weight",
        "text_proj_for_sos.ca.mat_q",
        "text_proj_for_sos.ca.mat_kv.weight",
        "text_proj_for_sos.ca.kv_bias",
        "text_proj_for_sos.ca.proj.weight",
        "text_proj_for_sos.ca.proj.bias",
        "text_proj_for_ca.0.weight",
        "text_proj_for_ca.0.bias",
        "text_proj_for_ca.2.weight",
        "text_proj_for_ca.2.bias",
        "pos_start",
        "lvl_embed.weight",
        "shared_ada_lin.1.weight",
        "shared_ada_lin.1.bias",
        "head_nm.ada_lin.1.weight",
        "head_nm.ada_lin.1.bias",
    )

    def __init__(self, config: TransformerConfig, rows: int, text_length: int) -> None:
        super().__init__()
        self.config, self.rows = config, rows
        self.text_length = text_length
        self.inputs = ("cond", "uncond", "mask") if rows == 2 else ("cond", "mask")

    def input_shapes(self) -> Shapes:
        text = (self.text_length, self.config.text_width)
        return {**dict.fromkeys(self.inputs[:-1], text), "mask": (self.rows, self.text_length)}

    def output_shapes(self) -> Shapes:
        c, R, T = self.config, self.rows, self.text_length
        return {
            "x": (R, c.width),
            "text": (T * R, c.width),
            "modulation": (R, 6, c.width),
            "head_modulation": (R, 2, c.width),
            "text_bias": (R * c.heads, 1, T),
        }

    def forward(self, *tensors: Tensor, weights: Weights) -> tuple[Tensor, ...]:
        c, w = self.config, weights
        *features, mask = tensors
        text = torch.stack(features, dim=1).float()  # [T, R, Ct]
        text = text * torch.rsqrt(text.square().mean(-1, keepdim=True) + 1e-6) * w["text_norm.weight"]
        flat = text.flatten(0, 1).to(w["text_proj_for_ca.0.weight"].dtype)  # [T * R, Ct]
        bias = (mask.float() - 1.0) * 1e30  # [R, T]: 0 for a token, hugely negative for padding
        sos = self._pool(flat, bias, w)  # [R, C]
        hidden = F.gelu(
            F.linear(flat, w["text_proj_for_ca.0.weight"], w["text_proj_for_ca.0.bias"]), approximate="tanh"
        )
        source = F.linear(hidden, w["text_proj_for_ca.2.weight"], w["text_proj_for_ca.2.bias"])
        active = F.silu(sos)  # modulation is fp32 throughout: its error would be that of every layer
        modulation = F.linear(active, w["shared_ada_lin.1.weight"], w["shared_ada_lin.1.bias"])
        head = F.linear(active, w["head_nm.ada_lin.1.weight"], w["head_nm.ada_lin.1.bias"])
        x = sos + w["pos_start"].flatten() + w["lvl_embed.weight"][0]
        text_bias = bias[:, None, None, :].expand(-1, c.heads, -1, -1).flatten(0, 1)
        return x, source, modulation.view(-1, 6, c.width), head.view(-1, 2, c.width), text_bias.contiguous()

    def _pool(self, flat: Tensor, bias: Tensor, w: Weights) -> Tensor:
        """flat [T * R, Ct], bias [R, T] -> [R, C] in fp32: one learned query over the text."""
        c, prefix = self.config, "text_proj_for_sos.ca."
        heads, size = c.pool_heads, c.width // c.pool_heads
        kv = F.linear(flat, w[prefix + "mat_kv.weight"], w[prefix + "kv_bias"])
        kv = kv.float().view(-1, self.rows, 2, heads, size).permute(2, 1, 3, 0, 4)  # [2, R, heads, T, size]
        query = w[prefix + "mat_q"].view(1, heads, 1, size) * size**-0.5
        scores = (query * kv[0]).sum(-1) + bias[:, None, :]  # [R, heads, T]
        pooled = (torch.softmax(scores, dim=-1).unsqueeze(-1) * kv[1]).sum(2).flatten(1)
        return F.linear(pooled, w[prefix + "proj.weight"], w[prefix + "proj.bias"])


class TextKV(nn.Module):
    """One layer's cross-attention keys and values, once per image: text [T * R, C] -> k, v [T, R * heads, hd]."""

    inputs = ("text",)
    outputs = ("text_keys", "text_values")
    weights = ("ca.mat_kv.weight", "ca.kv_bias")

    def __init__(self, config: TransformerConfig, rows: int, text_length: int) -> None:
        super().__init__()
        self.config, self.rows, self.text_length = config, rows, text_length

    def input_shapes(self) -> Shapes:
        return {"text": (self.text_length * self.rows, self.config.width)}

    def output_shapes(self) -> Shapes:
        c = self.config
        return dict.fromkeys(self.outputs, (self.text_length, self.rows * c.heads, c.head_dim))

    def forward(self, text: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
        c = self.config
        k, v = F.linear(text, weights["ca.mat_kv.weight"], weights["ca.kv_bias"]).split(c.width, dim=-1)
        shape = (-1, self.rows * c.heads, c.head_dim)
        return k.reshape(shape), v.reshape(shape)


class Bridge(nn.Module):
    """From the last block of one scale to the first of the next: head, guidance, sampling, codes, sum, embedding.

    x [L * R, C], head_modulation [R, 2, C], noise [L, channels], guidance, tau, cut (each [1]; cut = 1 - top_p),
    summed [1, bits, H, W] -> logits [L, 2 * channels], summed_out, and but for the last scale x_next [L' * Rn, C].
    Rn, the rows of the next scale, is one where guidance is switched off there; head_modulation [Rt, 2, C] keeps two.
    """

    enlarge_0: Tensor  # bilinear matrices [final, own] and [next, final], per axis
    enlarge_1: Tensor
    shrink_0: Tensor
    level: Tensor  # of the next scale [1]
    shrink_1: Tensor
    weights_last = ("head.weight", "head.bias")
    weights_next = (*weights_last, "word_embed.weight", "word_embed.bias", "lvl_embed.weight")

    def __init__(
        self,
        config: TransformerConfig,
        rows: int,
        size: Size,
        final: Size,
        next_size: Size | None,
        next_index: int | None,
        text_rows: int = 0,
        next_rows: int = 0,
    ) -> None:
        super().__init__()
        self.config, self.rows, self.size, self.final = config, rows, size, final
        self.text_rows, self.next_rows = text_rows or rows, next_rows or rows
        self.next_size, self.next_index = next_size, next_index
        self.inputs: tuple[str, ...] = ("x", "head_modulation", "noise", "tau", "cut", "summed")
        if rows == 2:
            self.inputs += ("guidance",)
        self.outputs = ("logits", "summed_out") + (() if next_size is None else ("x_next",))
        self.weights = self.weights_last if next_size is None else self.weights_next
        p = config.patch
        self._resize("enlarge", (size[0] * p, size[1] * p), (final[0] * p, final[1] * p))
        if next_size is not None:
            self.register_buffer("level", torch.tensor([next_index]), persistent=False)
            self._resize("shrink", (final[0] * p, final[1] * p), (next_size[0] * p, next_size[1] * p))

    def open_dims(self) -> OpenDims:
        matrices, codes = ("enlarge_0", "enlarge_1", "shrink_0", "shrink_1"), ("summed", "summed_out")
        tokens: OpenDims = {key: {0: ANY} for key in ("x", "noise", "logits", "x_next")}
        return {**tokens, **{key: {0: ANY, 1: ANY} for key in matrices}, **{key: {2: ANY, 3: ANY} for key in codes}}

    @classmethod
    def stand_in(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        size, final, following = (arguments[name] for name in ("size", "final", "next_size"))
        own = stand_in(size, (6, 7))
        sizes: dict[str, Any] = {"size": own, "final": own if size == final else stand_in(final, (11, 13))}
        if following is not None:
            sizes |= {"next_size": stand_in(following, (8, 9)), "next_index": 1}
        return {**arguments, **sizes}

    def take_sizes(self, memory: dict[str, Tensor]) -> None:
        """All are in the shapes of the inputs and of the resizing matrices."""

    def input_shapes(self) -> Shapes:
        c, R, L, p = self.config, self.rows, tokens_of(self.size), self.config.patch
        shapes: Shapes = {
            "x": (L * R, c.width),
            "head_modulation": (self.text_rows, 2, c.width),
            "noise": (L, c.code_channels),
            "tau": (1,),
            "cut": (1,),
            "summed": (1, c.bits, self.final[0] * p, self.final[1] * p),
        }
        return shapes | ({"guidance": (1,)} if R == 2 else {})

    def output_shapes(self) -> Shapes:
        c = self.config
        shapes: Shapes = {
            "logits": (tokens_of(self.size), 2 * c.code_channels),
            "summed_out": self.input_shapes()["summed"],
        }
        if self.next_size is None:
            return shapes
        return shapes | {"x_next": (tokens_of(self.next_size) * self.next_rows, c.width)}

    def _resize(self, name: str, source: Size, target: Size) -> None:
        for axis in (0, 1):
            matrix = torch.from_numpy(bilinear_matrix(source[axis], target[axis]))
            self.register_buffer(f"{name}_{axis}", matrix, persistent=False)

    def forward(
        self,
        x: Tensor,
        head_modulation: Tensor,
        noise: Tensor,
        tau: Tensor,
        cut: Tensor,
        summed: Tensor,
        *guidance: Tensor,
        weights: Weights,
    ) -> tuple[Tensor, ...]:
        w, p = weights, self.config.patch
        head_modulation = first(head_modulation, self.rows)
        h = modulate(x, head_modulation[:, 0], head_modulation[:, 1], self.rows).to(w["head.weight"].dtype)
        logits = (
            F.linear(h, w["head.weight"], w["head.bias"]).float().view(-1, self.rows, 2 * self.config.code_channels)
        )
        logits = logits / tau
        logits = guidance[0] * logits[:, 0] + (1 - guidance[0]) * logits[:, 1] if guidance else logits[:, 0]
        codes = self._sample(logits, noise, cut)  # [L, channels]
        rows, columns = self.enlarge_0.shape[1] // p, self.enlarge_1.shape[1] // p
        grid = codes.transpose(0, 1).reshape(1, -1, rows, columns)
        if p > 1:
            grid = F.pixel_shuffle(grid, p)
        if self.size != self.final:
            grid = self.enlarge_0 @ grid @ self.enlarge_1.t()
        summed = summed + grid
        if self.next_size is None:
            return logits, summed
        following = self.shrink_0 @ summed @ self.shrink_1.t()
        if p > 1:
            following = F.pixel_unshuffle(following, p)
        tokens = following.flatten(2).squeeze(0).transpose(0, 1).to(w["word_embed.weight"].dtype)  # [L', channels]
        embedded = F.linear(tokens, w["word_embed.weight"], w["word_embed.bias"]).float()
        embedded = embedded + w["lvl_embed.weight"].index_select(0, self.level)
        x_next = embedded.unsqueeze(1).expand(-1, self.next_rows, -1).reshape(-1, self.config.width)
        return logits, summed, x_next

    def _sample(self, logits: Tensor, noise: Tensor, cut: Tensor) -> Tensor:
        """A bit is one where noise < P(one); a value of probability <= cut goes. Bit b -> (2b - 1) / sqrt(bits)."""
        pair = logits.view(-1, self.config.code_channels, 2)
        one = torch.sigmoid(pair[..., 1] - pair[..., 0])
        one = torch.where(one <= cut, torch.zeros_like(one), torch.where(1 - one <= cut, torch.ones_like(one), one))
        size = self.config.bits**-0.5
        return torch.where(noise < one, size, -size)


# No tensor of the transformer tells it.
_PATCHIFY = '; or give "spatial_patchify" (true: a token is 2 x 2 cells) in config.json beside the transformer'


class InfinityWiring(Wiring):
    """Text enters by cross-attention and modulation; positions are normalised to the 1M grid."""

    family = INFINITY
    marker = "cfg_uncond"
    transformer = InfinityTransformer
    image_tokenizer = ImageTokenizer
    project = Project
    attend = Attend
    text_encoders = ("t5",)

    def check_parts(self, transformer: TransformerConfig, images: ImageTokenizerConfig) -> None:
        if transformer.bits != images.bits:
            raise CheckpointError(
                f"the transformer predicts {transformer.bits} bits a cell, the image tokenizer reads {images.bits}",
                fix="give the image tokenizer that the transformer was trained with" + _PATCHIFY,
            )
        if images.patch_size * transformer.patch != PIXELS_PER_TOKEN:
            raise CheckpointError(
                f"a token would cover {images.patch_size * transformer.patch} pixels a side",
                expected=f"{PIXELS_PER_TOKEN}: {PIXELS_PER_TOKEN // transformer.patch} pixels a cell of the image "
                "tokenizer",
                fix="give the image tokenizer that the transformer was trained with" + _PATCHIFY,
            )

    def infer_transformer(
        self, shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any]
    ) -> TransformerConfig:
        return infer_transformer(shapes, settings)

    def infer_image_tokenizer(self, shapes: Mapping[str, tuple[int, ...]]) -> ImageTokenizerConfig:
        return infer_image_tokenizer(shapes)

    def weights(
        self,
        transformer: TransformerConfig,
        state: Mapping[str, Tensor],
        images: ImageTokenizerConfig,
        images_state: Mapping[str, Tensor],
    ) -> dict[str, WeightSource]:
        return transformer_weights(transformer, state)

    def condition(self, setting: Setting) -> StepGraph:
        return StepGraph(f"condition-{setting.label}", Condition, self._text(setting), SHARED_PREFIX)

    def layer_condition(self, setting: Setting) -> StepGraph:
        return StepGraph(f"text-kv-{setting.label}", TextKV, self._text(setting), LAYER_PREFIX)

    def _text(self, setting: Setting) -> dict[str, Any]:
        return {"config": setting.transformer, "rows": setting.rows, "text_length": setting.text_length}

    def project_arguments(self, setting: Setting, step: StepPlan) -> dict[str, Any]:
        return {"position_grid": setting.plan.schedule.position_grid}

    def attend_arguments(self, setting: Setting, step: StepPlan) -> dict[str, Any]:
        return {"text_length": setting.text_length}

    def bridge(self, setting: Setting, step: StepPlan) -> StepGraph:
        arguments = {"config": setting.transformer, "rows": step.rows(setting.rows), "text_rows": setting.rows}
        return bridge_graph(Bridge, arguments, setting, step)
