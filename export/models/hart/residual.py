"""HART's diffusion head as one step graph: its sampling steps are unrolled, the host gives its randomness.

The small first and last layers and the arithmetic between two steps are fp32. The large products are in the compute
precision.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ....core.schedule import Size
from ....families.hart import RESIDUAL_GAIN, HartConfig
from ..common.rows import ANY, OpenDims, Shapes, Weights, layer_norm, placed, rms_norm, rows_of, stand_in, tokens_of
from ..common.steps import Step
from ..transformer.block_steps import KEPT
from .diffusion import diffusion_steps

NET = "diffusion."


class Residual(Step):
    """The part of the last scale's tokens that codes cannot hold, added to the running sum.

    x [m * R, C] from the last block, codes [m * B] (int64), residual_noise [steps, m * B, Cv] (normal: where sampling
    starts, then what each step but the last adds), summed [B, Cv, H, W]; with guidance guidance [B]; for a part of the
    scale positions [m * B] (int64) -> summed_out.

    The network is conditioned on the last block and on the codes, the same for both guidance rows. At a guidance of
    exactly one it runs unguided, as the published program does.
    """

    def __init__(self, config: HartConfig, rows: int, size: Size, ratio: float, part: int = 0, images: int = 1) -> None:
        """ratio: share of the guidance scale; part: how many tokens these are, 0 for all."""
        super().__init__()
        self.images, self.has_guidance = images, rows > images
        self.config, self.rows, self.size, self.ratio, self.part = config, rows, size, ratio, part
        self.inputs: tuple[str, ...] = ("x", "codes", "residual_noise", "summed")
        self.inputs += (("guidance",) if self.has_guidance else ()) + (("positions",) if part else ())
        self.outputs = ("summed_out",)
        self.weights = residual_weight_names(config)

    def open_dims(self) -> OpenDims:
        tokens: OpenDims = {key: {0: ANY} for key in ("x", "codes", "positions")}
        return {**tokens, "residual_noise": {1: ANY}, **{key: {2: ANY, 3: ANY} for key in ("summed", "summed_out")}}

    @classmethod
    def stand_in(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        part = arguments.get("part", 0)
        return {**arguments, "size": stand_in(arguments["size"], (6, 7)), "part": KEPT if part > 1 else part}

    def border(self) -> Shapes:
        c, B, tokens = self.config, self.images, self.part or tokens_of(self.size)
        m = tokens * B
        return {
            "x": (tokens * self.rows, c.width),
            "codes": (m,),
            "residual_noise": (c.diffusion_steps, m, c.code_channels),
            **dict.fromkeys(("summed", "summed_out"), (B, c.code_channels, *self.size)),
            "guidance": (B,),
            "positions": (m,),
        }

    def forward(
        self, x: Tensor, codes: Tensor, residual_noise: Tensor, summed: Tensor, *further: Tensor, weights: Weights
    ) -> Tensor:
        named = dict(zip(self.inputs[4:], further, strict=True))
        w = {name.removeprefix(NET): tensor for name, tensor in weights.items()}
        known = self._known(x, codes, w)
        strength = None
        if self.has_guidance:
            strength = named["guidance"] * self.ratio
            strength = torch.where(strength == 1, 0.0, strength)
            if self.images > 1:
                strength = strength.repeat(codes.shape[0] // self.images).unsqueeze(1)  # [m * B, 1]
        sample = residual_noise[0]  # [m * B, Cv]
        for i, step in enumerate(diffusion_steps(self.config.diffusion_steps)):
            active = F.silu(w["times"][i] + known).to(w["cond_embed.weight"].dtype)
            out = self._guided(self._net(sample, active, w), strength)
            sample = step.apply(sample, out, residual_noise[0 if step.last else i + 1])
        residual = sample * RESIDUAL_GAIN
        if self.part:
            return with_tokens(summed, residual, named["positions"])
        if self.images > 1:
            residual = residual.view(-1, self.images * self.config.code_channels)
        return summed + residual.transpose(0, 1).reshape(summed.shape)

    def _known(self, x: Tensor, codes: Tensor, w: Weights) -> Tensor:
        """The condition of each token and guidance row, without the time: [m * R, W]."""
        embedded = F.linear(w["codebook.weight"].index_select(0, codes), w["word_embed.weight"], w["word_embed.bias"])
        z = x.view(-1, self.rows, self.config.width) + self._rows_of(embedded)
        z = rms_norm(z, w["decoder_norm.weight"]).view(-1, self.config.width).to(w["cond_embed.weight"].dtype)
        return F.linear(z, w["cond_embed.weight"], w["cond_embed.bias"]).float()

    def _net(self, sample: Tensor, active: Tensor, w: Weights) -> Tensor:
        """sample [m * B, Cv], SiLU of time and condition [m * R, W] -> noise and variance [m * R, 2 * Cv]."""
        h = F.linear(sample, w["input_proj.weight"], w["input_proj.bias"])
        h = self._rows_of(h).expand(-1, self.rows, -1).reshape(-1, self.config.diffusion_width)
        for i in range(self.config.diffusion_depth):
            h = h + _block(h, active, w, f"res_blocks.{i}.")
        shift, scale = _linear(active, w, "final_layer.adaLN_modulation.1").chunk(2, dim=-1)
        h = layer_norm(h) * (1 + scale) + shift
        return F.linear(h, w["final_layer.linear.weight"], w["final_layer.linear.bias"])

    def _rows_of(self, each: Tensor) -> Tensor:
        """What tokens of each image have, [m * B, n] -> that of each row [m, R, n], or [m, 1, n] of one image's."""
        if self.images == 1:
            return each.unsqueeze(1)
        return each.view(-1, self.images, each.shape[1]).repeat(1, self.rows // self.images, 1)

    def _guided(self, out: Tensor, strength: Tensor | None) -> Tensor:
        """[m * R, 2 * Cv] -> [m * B, 2 * Cv]: guidance on the noise; the variance stays the conditional row's."""
        B, Cv = self.images, self.config.code_channels
        out = out.view(-1, self.rows // B, B, 2 * Cv)
        conditional = out[:, 0].reshape(-1, 2 * Cv)
        if strength is None:
            return conditional
        (noise, variance), other = conditional.chunk(2, dim=-1), out[:, 1].reshape(-1, 2 * Cv)[:, :Cv]
        return torch.cat(((1 + strength) * noise - strength * other, variance), dim=-1)


def residual_weight_names(config: HartConfig) -> tuple[str, ...]:
    """The codebook, the embedding, the norm, and the network."""
    layers = ["cond_embed", "input_proj", "final_layer.linear", "final_layer.adaLN_modulation.1"]
    for i in range(config.diffusion_depth):
        layers += [f"res_blocks.{i}.{name}" for name in ("in_ln", "mlp.0", "mlp.2", "adaLN_modulation.1")]
    network = [f"{NET}{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    shared = ("codebook.weight", "word_embed.weight", "word_embed.bias", "decoder_norm.weight")
    return (*shared, f"{NET}times", *network)


def _block(h: Tensor, active: Tensor, w: Weights, prefix: str) -> Tensor:
    shift, scale, gate = _linear(active, w, prefix + "adaLN_modulation.1").chunk(3, dim=-1)
    inner = layer_norm(h) * w[prefix + "in_ln.weight"] + w[prefix + "in_ln.bias"]
    inner = F.silu(_linear(inner * (1 + scale) + shift, w, prefix + "mlp.0"))
    return gate * _linear(inner, w, prefix + "mlp.2")


def _linear(x: Tensor, w: Weights, name: str) -> Tensor:
    """In the weight's precision; fp32 out of it."""
    return F.linear(x.to(w[name + ".weight"].dtype), w[name + ".weight"], w[name + ".bias"]).float()


def with_tokens(summed: Tensor, embedded: Tensor, positions: Tensor) -> Tensor:
    """summed [B, Cv, H, W] with embedded [m * B, Cv] added at the tokens `positions` [m * B]."""
    images, channels = summed.shape[:2]
    flat = summed.flatten(2)  # [B, Cv, L]
    if images == 1:
        rest = torch.zeros_like(flat.squeeze(0).transpose(0, 1))  # [L, Cv]
        return summed + placed(embedded, positions, rest).transpose(0, 1).reshape(summed.shape)
    rest = torch.zeros_like(flat).permute(2, 0, 1).reshape(-1, channels)  # [L * B, Cv]
    added = placed(embedded, rows_of(positions.view(-1, images), images), rest)
    return summed + added.view(-1, images * channels).transpose(0, 1).reshape(summed.shape)
