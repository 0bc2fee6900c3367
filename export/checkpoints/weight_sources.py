"""The tensors of a bundle's weight file: which a checkpoint gives, under which names, in which roles."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from ...core.precision import Precision
from ...engines.bundle.manifest import EDGE_INSIDE, EDGE_OUTSIDE, FileRecord
from ...engines.bundle.weight_file import write_weights
from ...engines.spec import TensorSpec
from ...families.base import ImageTokenizerShape, TransformerShape
from ..models.common.quantise import quantise_sources
from ..models.common.weights import WeightSource, plain_weights
from ..models.registry import adapter_of
from .checkpoint import Checkpoint, image_tokenizer_shapes
from .preview import GRID as PREVIEW_GRID
from .preview import fit_preview
from .text_encoders import kind_of, text_encoder_shapes


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
        role = kind_of(checkpoint.text_encoder).role(precision)
        sources |= plain_weights("text_encoder", text_shapes, checkpoint.text_encoder_weights, role)
    return sources


def model_sources(
    transformer: TransformerShape,
    transformer_state: Mapping[str, Tensor],
    images: ImageTokenizerShape,
    images_state: Mapping[str, Tensor],
    with_encoder: bool,
) -> dict[str, WeightSource]:
    """The weights of transformer and image coders. Shapes and roles come from the configurations; a state may be
    empty where nothing is fetched.
    """
    adapter = adapter_of(transformer)
    wanted = adapter.kept_shapes(image_tokenizer_shapes(images, adapter), with_encoder)
    sources = adapter.weights(transformer, transformer_state, images, images_state)
    return sources | plain_weights("image_tokenizer", wanted, images_state, adapter.image_role)


def stored_specs(sources: Mapping[str, WeightSource], precision: Precision) -> dict[str, TensorSpec]:
    """Element type and shape of every tensor in the file. The sources are quantised already, where they are to be."""
    return {
        name: TensorSpec(name, source.role.stored_dtype(precision), source.shape) for name, source in sources.items()
    }


def write_sources(path: Path, sources: Mapping[str, WeightSource], precision: Precision) -> FileRecord:
    """Write the weight file, one tensor in memory at a time. The sources are what engines take before quantisation."""
    sources = quantise_sources(sources, precision)
    specs = stored_specs(sources, precision)
    return write_weights(path, specs, lambda name: as_stored(sources[name].fetch(), specs[name].dtype))


def as_stored(tensor: Tensor, dtype: str) -> NDArray[Any]:
    """The tensor's bits as numpy holds them: uint16 for bfloat16, uint8 for float8."""
    converted = tensor.to(getattr(torch, dtype)).contiguous()
    bits = {"bfloat16": torch.uint16, "float8_e4m3fn": torch.uint8}.get(dtype)
    array: NDArray[Any] = (converted if bits is None else converted.view(bits)).numpy()
    return array


def edge_weights() -> dict[str, WeightSource]:
    """What tells a stripe of a tiled decoder whether the image goes on beyond its end."""
    return {
        EDGE_INSIDE: WeightSource((1,), lambda: torch.ones(1)),
        EDGE_OUTSIDE: WeightSource((1,), lambda: torch.zeros(1)),
    }


def preview_weights(checkpoint: Checkpoint) -> dict[str, WeightSource]:
    """The linear map from codes to colour that previews are drawn with, fitted to the image decoder."""
    config, adapter = checkpoint.image_tokenizer, adapter_of(checkpoint.transformer)
    decoder = adapter.decoder(config, (PREVIEW_GRID, PREVIEW_GRID))
    prefix = adapter.decoder_prefix.removeprefix("image_tokenizer.")
    weights = {name: checkpoint.image_tokenizer_weights[prefix + name].float() for name in decoder.weights}
    weight, bias = fit_preview(lambda codes: decoder(codes, weights=weights), config.code_channels, config.patch_size)
    return {
        "preview.weight": WeightSource((3, config.code_channels), lambda: weight),
        "preview.bias": WeightSource((3,), lambda: bias),
    }
