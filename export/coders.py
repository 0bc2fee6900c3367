"""Step graphs around the transformer: text encoder, image decoder, image encoder. Weights are inputs here too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..config import ImageTokenizerConfig
from ..schedule import Size
from .image_tokenizer import Decoder, Encoder
from .rows import Shapes, Weights

if TYPE_CHECKING:
    from transformers import T5Config


class TextEncoder(nn.Module):
    """T5 encoder: ids [1, T], attention_mask [1, T] (both int64) -> features [T, Ct]; padding rows are undefined."""

    inputs = ("ids", "attention_mask")
    outputs = ("features",)

    def __init__(self, config: T5Config, text_length: int) -> None:
        super().__init__()
        from transformers import T5EncoderModel

        config = type(config).from_dict({**config.to_dict(), "_attn_implementation": "eager"})
        with torch.device("meta"):
            self.model: Any = T5EncoderModel(config).eval()
        self.text_length = text_length
        # The embedding goes by two names in T5; functional_call ties the second itself, and refuses both.
        self.weights = tuple(name for name in self.model.state_dict() if name != "encoder.embed_tokens.weight")

    def input_shapes(self) -> Shapes:
        return dict.fromkeys(self.inputs, (1, self.text_length))

    def forward(self, ids: Tensor, attention_mask: Tensor, weights: Weights) -> Tensor:
        result = functional_call(self.model, weights, (), {"input_ids": ids, "attention_mask": attention_mask})
        features: Tensor = result.last_hidden_state[0]
        return features


class ImageDecoder(nn.Module):
    """Summed codes [1, bits, h, w] -> image [1, 3, H, W] in [-1, 1]."""

    inputs = ("summed",)
    outputs = ("image",)

    def __init__(self, config: ImageTokenizerConfig, grid: Size) -> None:
        super().__init__()
        with torch.device("meta"):
            self.decoder = Decoder(config)
        self.config, self.grid = config, grid
        self.weights = tuple(self.decoder.state_dict())

    def input_shapes(self) -> Shapes:
        return {"summed": (1, self.config.bits, *self.grid)}

    def forward(self, summed: Tensor, weights: Weights) -> Tensor:
        image: Tensor = functional_call(self.decoder, weights, (summed,))
        return image.clamp(-1, 1)


class ImageEncoder(nn.Module):
    """Image [1, 3, H, W] in [-1, 1] -> latent [1, bits, h, w], before quantisation."""

    inputs = ("image",)
    outputs = ("latent",)

    def __init__(self, config: ImageTokenizerConfig, grid: Size) -> None:
        super().__init__()
        with torch.device("meta"):
            self.encoder = Encoder(config)
        self.config, self.grid = config, grid
        self.weights = tuple(self.encoder.state_dict())

    def input_shapes(self) -> Shapes:
        p = self.config.patch_size
        return {"image": (1, 3, self.grid[0] * p, self.grid[1] * p)}

    def forward(self, image: Tensor, weights: Weights) -> Tensor:
        latent: Tensor = functional_call(self.encoder, weights, (image,))
        return latent
