"""Step graphs around the transformer: text encoder, image decoder, image encoder. Their weights are inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ....core.precision import Precision
from ....core.schedule import Size
from ....families.base import ImageTokenizerShape
from .rows import Shapes, Weights
from .steps import Step
from .weights import Role

if TYPE_CHECKING:
    from transformers import T5Config


T5_ATTENTION = "fastvar_fp32_softmax"  # our attention's name with transformers


def image_tokenizer_role(name: str) -> Role:
    """Norms are fp32, and so is the last convolution: in 16 bits its output would be half a grey level off."""
    return Role.FP32 if ".norm" in name or ".conv_out." in name else Role.COMPUTE


def text_encoder_role(precision: Precision) -> Callable[[str], Role]:
    """The last norm makes fp32 features. In fp16 `wo` overflows, and stays fp32 as in transformers."""

    def role(name: str) -> Role:
        exact = "final_layer_norm." in name or (precision.compute == "float16" and ".wo." in name)
        return Role.FP32 if exact else Role.COMPUTE

    return role


def _t5_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float = 1.0,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query, key, value [B, H, T, hd], mask [B, 1, 1, T] -> [B, T, H, hd]; the softmax in fp32, never in 16 bits."""
    scores = (query @ key.transpose(2, 3)).float() * scaling + attention_mask
    if position_bias is not None:
        scores = scores + position_bias
    return (torch.softmax(scores, dim=-1).to(value.dtype) @ value).transpose(1, 2), None


class TextEncoder(Step):
    """T5 encoder: ids [1, T], attention_mask [1, T] (both int64) -> features [T, Ct]; padding rows are undefined.

    The residual stream is fp32, as it is where the published programs run T5: it starts as fp32 embeddings.
    """

    inputs = ("ids", "attention_mask")
    outputs = ("features",)

    def __init__(self, config: T5Config, text_length: int) -> None:
        super().__init__()
        from transformers import AttentionInterface, T5EncoderModel

        AttentionInterface.register(T5_ATTENTION, _t5_attention)
        config = type(config).from_dict({**config.to_dict(), "_attn_implementation": T5_ATTENTION})
        with torch.device("meta"):
            self.model: Any = T5EncoderModel(config).eval()
        self.text_length = text_length
        # The embedding goes by two names in T5; functional_call ties the second itself, and refuses both.
        self.weights = tuple(name for name in self.model.state_dict() if name != "encoder.embed_tokens.weight")

    def border(self) -> Shapes:
        tokens = (1, self.text_length)
        return {"ids": tokens, "attention_mask": tokens, "features": (self.text_length, self.model.config.d_model)}

    def forward(self, ids: Tensor, attention_mask: Tensor, weights: Weights) -> Tensor:
        embedded = F.embedding(ids, weights["shared.weight"]).float()
        mask = (attention_mask[:, None, None, :].float() - 1.0) * 1e30  # of rank 4: used as it is
        inputs = {"inputs_embeds": embedded, "attention_mask": mask}
        features: Tensor = functional_call(self.model, weights, (), inputs).last_hidden_state[0]
        return features


class ImageCoder(Step):
    """One half of an image tokenizer, for latents of a grid: from its one input to its one output."""

    kind: ClassVar[type[nn.Module]]  # made with the configuration

    def __init__(self, config: ImageTokenizerShape, grid: Size) -> None:
        super().__init__()
        with torch.device("meta"):
            self.coder = type(self).kind(config)
        self.weights = tuple(self.coder.state_dict())
        self.config, self.grid = config, grid

    def border(self) -> Shapes:
        c, (h, w) = self.config, self.grid
        latent = (1, c.code_channels, h, w)
        return {"summed": latent, "latent": latent, "image": (1, 3, h * c.patch_size, w * c.patch_size)}

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        out: Tensor = functional_call(self.coder, weights, (x,))
        return out


class ImageDecoder(ImageCoder):
    """Summed codes [1, channels, h, w] -> image [1, 3, H, W] in [-1, 1]."""

    inputs = ("summed",)
    outputs = ("image",)

    def forward(self, x: Tensor, weights: Weights) -> Tensor:
        return super().forward(x, weights).clamp(-1, 1)


class ImageEncoder(ImageCoder):
    """Image [1, 3, H, W] in [-1, 1] -> latent [1, bits, h, w], before quantisation."""

    inputs = ("image",)
    outputs = ("latent",)
