"""Step graphs of families that choose codes from a codebook (VAR, HART): sampling head, layers' modulation, decoder.

Each is a torch module with weights as inputs and every shape static; activations lie as common/rows.py says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ....core.resize import area_matrix, bicubic_matrix
from ....core.schedule import Size
from ....families.base import SquareScales, TransformerT
from ....families.codebook import VqTokenizerConfig, phi_index
from ..common.coders import ImageDecoder, ImageEncoder, image_tokenizer_role
from ..common.rows import ANY, OpenDims, Shapes, Weights, largest, tokens_of
from ..common.steps import ImageStep
from ..common.weights import Role, Sources, State, WeightSource, getter
from ..transformer.adapter import ModelAdapter
from ..transformer.block_steps import Tensors
from ..transformer.sampling_head import SamplingHeadStep
from .tokenizer import LatentDecoder, LatentEncoder, VqTokenizer, infer_vq_tokenizer

HIDDEN = -1e30  # a logit that is out of the running
BLOCK = 64  # of running sums
COLDEST = 0.005  # temperature of smooth mixing, at least


class LayerModulation(ImageStep):
    """One layer's adaptive norms and gates in this image: gamma, scale and shift of both sub-layers.

    pooled [R, C], SiLU done -> modulation [R, 6, C] (fp32). The matrix is a third of a VAR transformer's weights, so it
    is stored in the compute precision, as the published programs run it.
    """

    inputs = ("pooled",)
    outputs = ("modulation",)
    weights = ("ada_lin.1.weight", "ada_lin.1.bias")

    def border(self) -> Shapes:
        return {"pooled": (self.rows, self.config.width), "modulation": (self.rows, 6, self.config.width)}

    def forward(self, pooled: Tensor, weights: Weights) -> Tensor:
        matrix = weights["ada_lin.1.weight"]
        out = F.linear(pooled.to(matrix.dtype), matrix, weights["ada_lin.1.bias"])
        return out.float().view(-1, 6, self.config.width)


class CodeSamplingHead(SamplingHeadStep):
    """The sampling head of families that draw one code a token from a codebook.

    noise [L * B, 1], cut [B] (1 - top_p), with guidance guidance [B], where the caller sets it top_k [B] (int64), in
    smooth sampling gumbel [L * B, codes]; logits [L * B, codes].

    noise picks a code in the cumulative distribution, codes by falling logit; noise -1 - i forces code i.
    `ratio`, from 0 to 1, is a scale's place in the schedule: guidance grows with it, the smooth temperature falls.
    """

    config: SquareScales
    ratio: Tensor

    resizing = (bicubic_matrix, area_matrix)

    def __init__(
        self,
        config: SquareScales,
        rows: int,
        *,
        index: int,
        scales: int,
        ratio: float,
        smooth: bool = False,
        **sizes: Any,
    ) -> None:
        """index: of the scale, of `scales`; sizes: the arguments of SamplingHeadStep."""
        self.index, self.smooth = index, smooth  # the base asks for them at once
        self.phi = f"phi.{phi_index(index, scales)}" if self.has_phi(sizes["next_size"]) else ""
        super().__init__(config, rows, **sizes)
        self.inputs = ("x", "head_modulation", "noise", "cut", "summed", *self.further_inputs())
        self.inputs += (("guidance",) if self.has_guidance else ()) + (("gumbel",) if smooth else ())
        self.register_buffer("ratio", torch.tensor([ratio]), persistent=False)

    # What a family says

    def has_phi(self, next_size: Size | None) -> bool:
        """Whether this scale's codes are smoothed by a phi convolution."""
        return True

    def ranked(self) -> int:
        """How many of the largest logits may be drawn."""
        return int(self.config.codes)

    def further_inputs(self) -> tuple[str, ...]:
        """Inputs that only this family reads."""
        return ()

    def sampled_rows(self, x: Tensor) -> Tensor:
        """The rows of x [L * R, C] that draw codes."""
        return x

    # Shapes

    def draws(self) -> int:
        """Number of codes drawn for each image."""
        return tokens_of(self.size)

    def drawing_weights(self) -> tuple[str, ...]:
        return ("codebook.weight", *((f"{self.phi}.weight", f"{self.phi}.bias") if self.phi else ()))

    def further_shapes(self) -> Shapes:
        draws, codes = self.draws() * self.images, self.config.codes
        logits: Shapes = dict.fromkeys(("logits", "gumbel"), (draws, codes))
        return {"noise": (draws, 1), **logits, "codes": (draws,), "top_k": (self.images,)}

    def open_dims(self) -> OpenDims:
        several = self.next_size is not None and len(getattr(self, self.place_buffer)) > 1
        found = {**super().open_dims(), **({self.place_buffer: {0: ANY}} if several else {})}
        del found["top_k"]  # one number, whatever the scale
        return found

    @classmethod
    def stand_in(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        return {**super().stand_in(arguments), "ratio": 0.5}

    # Arithmetic

    def forward(
        self,
        x: Tensor,
        head_modulation: Tensor,
        noise: Tensor,
        cut: Tensor,
        summed: Tensor,
        *further: Tensor,
        weights: Weights,
    ) -> tuple[Tensor, ...]:
        named: Tensors = dict(zip(self.inputs[5:], further, strict=True))
        logits = self.guided(self.sampled_rows(x), head_modulation, named, weights)
        cut, top_k = (self.of_each_token(t, noise) for t in (cut, named.get("top_k", cut)))
        ranking = Ranking(logits, self.ranked(), cut, top_k if "top_k" in named else None)
        codes = ranking.draw(noise.squeeze(1))
        embedded = weights["codebook.weight"].index_select(0, codes)  # [L, Cv]
        if self.smooth:
            embedded = ranking.mix(named["gumbel"], self.ratio) @ weights["codebook.weight"]
        summed = self.added(summed, embedded, named, weights)
        found = (logits, summed, *((codes,) if "codes" in self.outputs else ()))
        return found if self.next_size is None else (*found, self.embedded(summed, weights))

    def guided(self, x: Tensor, head_modulation: Tensor, named: Tensors, weights: Weights) -> Tensor:
        """Logits [L * B, codes], fp32."""
        logits = self.head(x, head_modulation, weights)  # [L, G, B * codes]
        found = logits[:, 0]
        if "guidance" in named:
            strength = self.of_each(named["guidance"] * self.ratio, self.config.codes)
            found = (1 + strength) * logits[:, 0] - strength * logits[:, 1]
        return found if self.images == 1 else found.reshape(-1, self.config.codes)

    def added(self, summed: Tensor, embedded: Tensor, named: Tensors, weights: Weights) -> Tensor:
        """The running sum with this scale's embedded codes [L * B, Cv]."""
        if self.size == self.final:
            size = (summed.shape[2], summed.shape[3])
            grid = self.grids(embedded, size)
            # TensorRT-RTX 1.7 fails where codes reach both a convolution and its sum in the same layout.
            unsmoothed = self.grids((1 - PHI_SHARE) * embedded, size)
        else:
            grid = self.grids(embedded, (self.enlarge_0.shape[1], self.enlarge_1.shape[1]))
            grid = self.enlarge_0 @ grid @ self.enlarge_1.t()
            unsmoothed = (1 - PHI_SHARE) * grid
        if self.phi:
            smoothed = F.conv2d(grid, weights[f"{self.phi}.weight"], weights[f"{self.phi}.bias"], padding=1)
            grid = PHI_SHARE * smoothed + unsmoothed
        return summed + grid


PHI_SHARE = VqTokenizerConfig.phi_ratio


class Ranking:
    """Logits [L, codes] in falling order, and those that top-k and then top-p leave."""

    def __init__(self, logits: Tensor, count: int, cut: Tensor, top_k: Tensor | None) -> None:
        """count: how many are ranked; top_k (int64) of those are left, 0 for all; cut is 1 - top_p. Both are [1] for
        all tokens, or [L, 1].
        """
        self.logits = logits
        self.values, self.index = largest(logits, count, dim=1, lowest=2 * HIDDEN)
        mass = (self.values - self.values[:, :1]).exp()
        if top_k is not None:
            rank = torch.where((top_k < 1) | (top_k > count), count, top_k) - 1
            least = self.values.index_select(1, rank) if rank.dim() == 1 else self.values.gather(1, rank)
            mass = torch.where(self.values >= least, mass, 0.0)
        # The rarest codes go whose probabilities together are at most `cut`; the likeliest never.
        rest = running_sums(mass, falling=True)  # of a code and of all rarer ones
        stays = rest > cut * rest[:, :1]
        self.mass = torch.cat((mass[:, :1], torch.where(stays, mass, 0.0)[:, 1:]), dim=1)
        self.last = ((self.mass > 0).sum(1) - 1).clamp(min=0)  # [L] rank of the rarest code that is left

    def draw(self, uniform: Tensor) -> Tensor:
        """Codes [L] (int64) for one number each in [0, 1); -1 - i forces code i."""
        sums = running_sums(self.mass)
        rank = (sums <= uniform.unsqueeze(1) * sums[:, -1:]).sum(1).minimum(self.last)
        drawn = self.index.gather(1, rank.unsqueeze(1)).squeeze(1)
        return torch.where(uniform < 0, (-1 - uniform).to(torch.int64), drawn)

    def mix(self, gumbel: Tensor, ratio: Tensor) -> Tensor:
        """Weights [L, codes] of the codes that are left, sharper the later the scale."""
        least = self.values.gather(1, self.last.unsqueeze(1))
        left = torch.where(self.logits >= least, self.logits, HIDDEN)
        temperature = (0.27 * (1 - 0.95 * ratio)).clamp(min=COLDEST)
        return torch.softmax((left * (1 + ratio) + gumbel) / temperature, dim=-1)


def running_sums(x: Tensor, falling: bool = False) -> Tensor:
    """Sums of x [L, K] up to each entry, or from each to the end; in blocks by matrices, which every compiler has."""
    length = x.shape[1]
    blocks = F.pad(x, (0, -length % BLOCK)).unflatten(1, (-1, BLOCK))  # [L, n, BLOCK]
    count = blocks.shape[1]
    within, before = torch.ones(BLOCK, BLOCK), torch.ones(count, count)
    inner = blocks @ (within.tril() if falling else within.triu())
    outer = blocks.sum(-1) @ (before.tril(-1) if falling else before.triu(1))  # [L, n]
    return (inner + outer.unsqueeze(-1)).flatten(1)[:, :length]


class VqImageDecoder(ImageDecoder):
    """The decoder of a VQ tokenizer, with the convolution before it."""

    kind = LatentDecoder


class VqImageEncoder(ImageEncoder):
    """The encoder of a VQ tokenizer, with the convolution behind it."""

    kind = LatentEncoder


class CodebookAdapter(ModelAdapter[TransformerT, VqTokenizerConfig]):
    """The common adapter of families that choose codes from a VQ tokenizer's codebook."""

    image_tokenizer = VqTokenizer
    decoder = VqImageDecoder
    encoder: ClassVar[type[ImageEncoder] | None] = None
    tiles_decoder = False
    decoder_prefix = encoder_prefix = "image_tokenizer."
    decoder_parts = ("decoder.", "post_quant_conv.")
    encoder_parts = ("encoder.", "quant_conv.")

    def infer_image_tokenizer(self, shapes: Mapping[str, tuple[int, ...]]) -> VqTokenizerConfig:
        return infer_vq_tokenizer(shapes)

    def image_role(self, name: str) -> Role:
        """The encoder's last convolution is fp32: in 16 bits its latent would have other nearest codes."""
        return Role.FP32 if name.startswith("quant_conv.") else image_tokenizer_role(name)


def codebook_weights(images: VqTokenizerConfig, state: State) -> Sources:
    """The tensors of the image tokenizer that sampling heads read: codebook and phi convolutions."""
    channels = images.code_channels
    sources = {"codebook.weight": WeightSource((images.codes, channels), getter(state, "quantize.embedding.weight"))}
    for i in range(images.phis):
        for kind, shape in (("weight", (channels, channels, 3, 3)), ("bias", (channels,))):
            source = getter(state, f"quantize.quant_resi.qresi_ls.{i}.{kind}")
            sources[f"phi.{i}.{kind}"] = WeightSource(shape, source)
    return sources
