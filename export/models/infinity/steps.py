"""Infinity's step graphs around the blocks (conditioning, text keys and values, sampling head), and its adapter.

Each is a torch module with weights as inputs and every shape static; activations lie as common/rows.py says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ....core.plan import StepPlan
from ....core.resize import bilinear_matrix
from ....core.schedule import PIXELS_PER_TOKEN
from ....errors import CheckpointError
from ....families.infinity import INFINITY, ImageTokenizerConfig, TransformerConfig
from ..common.coders import ImageDecoder, ImageEncoder
from ..common.rows import Shapes, Weights, tokens_first
from ..common.step_graph import StepGraph
from ..common.steps import ImageStep
from ..common.weights import Sources, State, affine
from ..transformer.adapter import LAYER_PREFIX, SHARED_PREFIX, ExportContext, ModelAdapter, sampling_head_graph
from ..transformer.published_models import PublishedModel, TrainingKeys
from ..transformer.sampling_head import SamplingHeadStep
from .blocks import AttnMlp, Qkv
from .model import InfinityTransformer, infer_transformer
from .tokenizer import Decoder, Encoder, ImageTokenizer, infer_image_tokenizer
from .weights import transformer_weights

POOL = "text_proj_for_sos.ca"


class Conditioning(ImageStep):
    """Text features -> first tokens, cross-attention source, modulation of the blocks and of the head.

    cond, uncond [T, Ct], of B images [B, T, Ct] (uncond absent without guidance), mask [R, T] (1 = a token)
    -> x [R, C], text [T * R, C], modulation [R, 6, C], head_modulation [R, 2, C], text_bias [R * heads, 1, T]
    """

    config: TransformerConfig

    outputs = ("x", "text", "modulation", "head_modulation", "text_bias")
    weights = (
        *("text_norm.weight", f"{POOL}.mat_q", f"{POOL}.mat_kv.weight", f"{POOL}.kv_bias"),
        *affine(f"{POOL}.proj", "text_proj_for_ca.0", "text_proj_for_ca.2"),
        *("pos_start", "lvl_embed.weight", *affine("shared_ada_lin.1", "head_nm.ada_lin.1")),
    )

    def __init__(self, config: TransformerConfig, rows: int, text_length: int, images: int = 1) -> None:
        super().__init__(config, rows, text_length, images)
        self.inputs = ("cond", "uncond", "mask") if rows > images else ("cond", "mask")

    def border(self) -> Shapes:
        c, R, T = self.config, self.rows, self.text_length
        return {
            **dict.fromkeys(("cond", "uncond"), self.of_images((T, c.text_width))),
            "mask": (R, T),
            "x": (R, c.width),
            "text": (T * R, c.width),
            "modulation": (R, 6, c.width),
            "head_modulation": (R, 2, c.width),
            "text_bias": (R * c.heads, 1, T),
        }

    def forward(self, *tensors: Tensor, weights: Weights) -> tuple[Tensor, ...]:
        c, w = self.config, weights
        *features, mask = tensors
        text = tokens_first(features, self.images).float()  # [T, R, Ct]
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
        c, prefix = self.config, f"{POOL}."
        heads, size = c.pool_heads, c.width // c.pool_heads
        kv = F.linear(flat, w[prefix + "mat_kv.weight"], w[prefix + "kv_bias"])
        kv = kv.float().view(-1, self.rows, 2, heads, size).permute(2, 1, 3, 0, 4)  # [2, R, heads, T, size]
        query = w[prefix + "mat_q"].view(1, heads, 1, size) * size**-0.5
        scores = (query * kv[0]).sum(-1) + bias[:, None, :]  # [R, heads, T]
        pooled = (torch.softmax(scores, dim=-1).unsqueeze(-1) * kv[1]).sum(2).flatten(1)
        return F.linear(pooled, w[prefix + "proj.weight"], w[prefix + "proj.bias"])


class TextKV(ImageStep):
    """One layer's cross-attention keys and values, once per image: text [T * R, C] -> k, v [T, R * heads, hd]."""

    inputs = ("text",)
    outputs = ("text_keys", "text_values")
    weights = ("ca.mat_kv.weight", "ca.kv_bias")

    def border(self) -> Shapes:
        c, T = self.config, self.text_length
        keys = (T, self.rows * c.heads, c.head_dim)
        return {"text": (T * self.rows, c.width), "text_keys": keys, "text_values": keys}

    def forward(self, text: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
        c = self.config
        k, v = F.linear(text, weights["ca.mat_kv.weight"], weights["ca.kv_bias"]).split(c.width, dim=-1)
        shape = (-1, self.rows * c.heads, c.head_dim)
        return k.reshape(shape), v.reshape(shape)


class SamplingHead(SamplingHeadStep):
    """Infinity's sampling head: bits are drawn one by one; tokens have the level embedding of their scale alone.

    It reads tau and cut [B] (1 - top_p), with guidance guidance [B]; noise [L * B, channels], logits
    [L * B, 2 * channels].
    """

    config: TransformerConfig
    level: Tensor  # of the next scale [1]

    resizing = (bilinear_matrix, bilinear_matrix)
    place_table = "lvl_embed.weight"
    place_buffer = "level"

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.inputs = ("x", "head_modulation", "noise", "tau", "cut", "summed")
        self.inputs += ("guidance",) if self.has_guidance else ()

    def next_places(self) -> Tensor:
        return torch.tensor([self.next_index])

    def further_shapes(self) -> Shapes:
        tokens, channels = self.tokens() * self.images, self.config.code_channels
        return {"noise": (tokens, channels), "logits": (tokens, 2 * channels)}

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
        p = self.config.patch
        # [L, G, B * n]; settings of an image are those of all its n logits
        tau, strength = (self.of_each(t, 2 * self.config.code_channels) for t in (tau, *(guidance or (tau,))))
        logits = self.head(x, head_modulation, weights) / tau
        logits = strength * logits[:, 0] + (1 - strength) * logits[:, 1] if guidance else logits[:, 0]
        logits = logits if self.images == 1 else logits.reshape(-1, 2 * self.config.code_channels)
        codes = self._sample(logits, noise, self.of_each_token(cut, noise))  # [L * B, channels]
        own = summed.shape[2:] if self.size == self.final else (self.enlarge_0.shape[1], self.enlarge_1.shape[1])
        grid = self.grids(codes, (own[0] // p, own[1] // p))
        if p > 1:
            grid = F.pixel_shuffle(grid, p)
        if self.size != self.final:
            grid = self.enlarge_0 @ grid @ self.enlarge_1.t()
        summed = summed + grid
        return (logits, summed) if self.next_size is None else (logits, summed, self.embedded(summed, weights))

    def _sample(self, logits: Tensor, noise: Tensor, cut: Tensor) -> Tensor:
        """A bit is one where noise < P(one); a value of probability <= cut goes. Bit b -> (2b - 1) / sqrt(bits)."""
        pair = logits.view(-1, self.config.code_channels, 2)
        one = torch.sigmoid(pair[..., 1] - pair[..., 0])
        one = torch.where(one <= cut, torch.zeros_like(one), torch.where(1 - one <= cut, torch.ones_like(one), one))
        size = self.config.bits**-0.5
        return torch.where(noise < one, size, -size)


# No tensor of the transformer tells it.
_PATCHIFY = '; or give "spatial_patchify" (true: a token is 2 x 2 cells) in config.json beside the transformer'


class InfinityImageDecoder(ImageDecoder):
    """Infinity's decoder as a step."""

    kind = Decoder


class InfinityImageEncoder(ImageEncoder):
    """Infinity's encoder as a step."""

    kind = Encoder


Context = ExportContext[TransformerConfig, ImageTokenizerConfig]


def _published(transformer: str, name: str, *image_tokenizers: str) -> PublishedModel:
    return PublishedModel(transformer, name, image_tokenizers, "flan-t5-xl", "google/flan-t5-xl")


class InfinityAdapter(ModelAdapter[TransformerConfig, ImageTokenizerConfig]):
    """Infinity: text enters by cross-attention and modulation; positions are normalised to the 1M grid."""

    family = INFINITY
    marker = "cfg_uncond"
    transformer = InfinityTransformer
    image_tokenizer = ImageTokenizer
    decoder = InfinityImageDecoder
    encoder = InfinityImageEncoder
    qkv = Qkv
    attn_mlp = AttnMlp
    text_encoders = ("t5",)
    published = (
        _published(r"infinity_125[mM]\w*", "infinity_125m", "infinity_vae_d16"),
        _published("infinity_2b_reg", "infinity_2b", "infinity_vae_d32reg", "infinity_vae_d32_reg"),
        _published("infinity_8b_weights", "infinity_8b", "infinity_vae_d56_f8_14_patchify"),
        _published("infinity_8b_512x512_weights", "infinity_8b_512x512", "infinity_vae_d56_f8_14_patchify"),
    )
    training_keys = TrainingKeys(("gpt_ema_fsdp", "gpt_ema_for_vis"), ("gpt_fsdp", "gpt_wo_ddp"))
    image_tokenizers = tuple(f"infinity_vae_{kind}" for kind in ("d24", "d32", "d32_rdn_short", "d64"))

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
        self, transformer: TransformerConfig, state: State, images: ImageTokenizerConfig, images_state: State
    ) -> Sources:
        return transformer_weights(transformer, state)

    def conditioning(self, context: Context) -> StepGraph:
        arguments = {**self._text(context), "images": context.images}
        return StepGraph(f"conditioning-{context.label}{context.of_images}", Conditioning, arguments, SHARED_PREFIX)

    def layer_conditioning(self, context: Context) -> StepGraph:
        return StepGraph(f"text-kv-{context.label}", TextKV, self._text(context), LAYER_PREFIX)

    def _text(self, context: Context) -> dict[str, Any]:
        return {"config": context.transformer, "rows": context.rows, "text_length": context.text_length}

    def qkv_arguments(self, context: Context, step: StepPlan) -> dict[str, Any]:
        return {"rope_grid": context.plan.schedule.rope_grid}

    def attn_mlp_arguments(self, context: Context, step: StepPlan) -> dict[str, Any]:
        return {"text_length": context.text_length}

    def sampling_head(self, context: Context, step: StepPlan) -> StepGraph:
        return sampling_head_graph(SamplingHead, {"config": context.transformer}, context, step)
