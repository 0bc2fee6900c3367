"""The tensors of a bundle's weight file: which a checkpoint gives, under which names, in which roles."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..config import ImageTokenizerConfig, TransformerConfig
from ..engines.manifest import EDGE_INSIDE, EDGE_OUTSIDE
from ..precision import Precision
from .checkpoint import Checkpoint, image_tokenizer_shapes
from .coders import image_tokenizer_role, text_encoder_role
from .image_tokenizer import Decoder
from .preview import fit_preview
from .random_weights import text_encoder_shapes
from .weights import WeightSource, plain_weights, transformer_weights


def engine_weights(checkpoint: Checkpoint, with_encoder: bool, precision: Precision) -> dict[str, WeightSource]:
    """What engines are bound to, before quantisation; nothing is read yet."""
    sources = model_sources(
        checkpoint.transformer,
        checkpoint.transformer_weights,
        checkpoint.image_tokenizer,
        checkpoint.image_tokenizer_weights,
        with_encoder,
    )
    if checkpoint.text_encoder is not None:
        text_shapes = text_encoder_shapes(checkpoint.text_encoder)
        role = text_encoder_role(precision)
        sources |= plain_weights("text_encoder", text_shapes, checkpoint.text_encoder_weights, role)
    return sources


def model_sources(
    transformer: TransformerConfig,
    transformer_state: Mapping[str, Tensor],
    images: ImageTokenizerConfig,
    images_state: Mapping[str, Tensor],
    with_encoder: bool,
) -> dict[str, WeightSource]:
    """The weights of transformer and image coders. Shapes and roles come from the configurations; a state may be
    empty where nothing is fetched.
    """
    parts = ("decoder.", "encoder.") if with_encoder else ("decoder.",)
    wanted = {name: shape for name, shape in image_tokenizer_shapes(images).items() if name.startswith(parts)}
    sources = transformer_weights(transformer, transformer_state)
    return sources | plain_weights("image_tokenizer", wanted, images_state, image_tokenizer_role)


def edge_weights() -> dict[str, WeightSource]:
    """What tells a stripe of a tiled decoder whether the image goes on beyond its end."""
    return {
        EDGE_INSIDE: WeightSource((1,), lambda: torch.ones(1)),
        EDGE_OUTSIDE: WeightSource((1,), lambda: torch.zeros(1)),
    }


def preview_weights(checkpoint: Checkpoint) -> dict[str, WeightSource]:
    """The linear map from codes to colour that previews are drawn with, fitted to the image decoder."""
    config = checkpoint.image_tokenizer
    decoder = Decoder(config).eval()
    prefix = "decoder."
    decoder.load_state_dict({n: checkpoint.image_tokenizer_weights[prefix + n].float() for n in decoder.state_dict()})
    weight, bias = fit_preview(decoder, config.bits, config.patch_size)
    return {
        "preview.weight": WeightSource((3, config.bits), lambda: weight),
        "preview.bias": WeightSource((3,), lambda: bias),
    }
