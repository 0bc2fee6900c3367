"""Checkpoints without a download: random weights in the real shapes, each tensor made when it is asked for.

For timings and tests. Scaled so that activations stay finite through the whole depth, in fp16 too.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ...families import family_of, named_transformer
from ...families.base import ImageTokenizerShape, TransformerShape, to_json
from ..models.common.qwen2_encoder import qwen2_vl_text
from ..models.common.tensor_shapes import Shapes
from ..models.registry import adapter_of
from .checkpoint import Checkpoint, image_tokenizer_shapes, transformer_shapes
from .tensor_files import digest
from .text_encoders import plain_format, text_encoder_shapes

if TYPE_CHECKING:
    from transformers import PretrainedConfig, T5Config

# Numbers drawn once per seed and repeated. A prime near 2^20: no row length divides it, so rows differ.
BLOCK = 1_048_573
MODULATION_GAIN = 0.1  # small residual gates, as a trained model has


class RandomWeights(Mapping[str, Tensor]):
    """Tensors by name, a function of (seed, name, shape); nothing is kept but one block of random numbers."""

    def __init__(self, shapes: Shapes, seed: int = 0, dtype: torch.dtype = torch.float16) -> None:
        self._shapes, self._dtype = shapes, dtype
        self._block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(seed)).repeat(2)

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        mean, spread = _distribution(name, shape)
        size = math.prod(shape)
        source = "shared.weight" if name == "encoder.embed_tokens.weight" else name  # tied in T5
        start = zlib.crc32(source.encode()) % BLOCK
        block = (self._block[start : start + min(size, BLOCK)] * spread + mean).to(self._dtype)
        tiled = np.resize(block.view(torch.uint8).numpy(), size * self._dtype.itemsize)  # bytes: numpy has no bfloat16
        return torch.from_numpy(tiled).view(self._dtype).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    @property
    def shapes(self) -> Shapes:
        """Shapes without making the tensors."""
        return dict(self._shapes)


def random_checkpoint(
    name: str, seed: int = 0, *, text_encoder: bool = False, dtype: torch.dtype = torch.float16
) -> Checkpoint:
    """A published size of any family with random weights; on request with a text encoder shaped as the published one.

    Raises:
        CheckpointError: no such size.
    """
    model = named_transformer(name)
    family, adapter = family_of(model), adapter_of(model)
    encoder = PUBLISHED_ENCODERS[adapter.text_encoders[0]]() if text_encoder and adapter.text_encoders else None
    return random_checkpoint_for(model, family.image_tokenizer_for(model), encoder, name=name, seed=seed, dtype=dtype)


def random_checkpoint_for(
    transformer: TransformerShape,
    image_tokenizer: ImageTokenizerShape,
    text_encoder: PretrainedConfig | None = None,
    *,
    name: str = "random",
    seed: int = 0,
    dtype: torch.dtype = torch.float16,
    tokenizer_file: Path | None = None,
) -> Checkpoint:
    """Random weights for any configuration. Without a text encoder its weights are empty."""
    adapter = adapter_of(transformer)
    image_shapes = image_tokenizer_shapes(image_tokenizer, adapter)
    encoder_shapes = text_encoder_shapes(text_encoder) if text_encoder is not None else {}
    preface = [to_json(transformer), to_json(image_tokenizer), {k: list(v) for k, v in encoder_shapes.items()}]
    return Checkpoint(
        name=name,
        transformer=transformer,
        transformer_weights=RandomWeights(transformer_shapes(transformer), seed, dtype),
        image_tokenizer=image_tokenizer,
        image_tokenizer_weights=RandomWeights(image_shapes, seed, dtype),
        text_encoder=text_encoder,
        text_encoder_weights=RandomWeights(encoder_shapes, seed, dtype),
        tokenizer_file=tokenizer_file,
        prompt_format=plain_format(adapter.text_encoders),
        digest=digest((), json.dumps(["random", seed, str(dtype), *preface], sort_keys=True)),
    )


def flan_t5_xl() -> T5Config:
    """The published text encoder's sizes (google/flan-t5-xl, encoder half)."""
    from transformers import T5Config  # seconds to import

    return T5Config(
        vocab_size=32128,
        d_model=2048,
        d_kv=64,
        d_ff=5120,
        num_layers=24,
        num_heads=32,
        feed_forward_proj="gated-gelu",
    )


PUBLISHED_ENCODERS: dict[str, Callable[[], PretrainedConfig]] = {"t5": flan_t5_xl, "qwen2": qwen2_vl_text}


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation. A matrix keeps the variance of its input: 1 / sqrt(fan in)."""
    kind = name.rsplit(".", 1)[-1]
    if kind == "zero_k_bias":
        return 0.0, 0.0
    if kind == "scale_mul_1H11":
        return math.log(4.0), 0.0
    if kind.endswith("bias"):
        return 0.0, 0.02
    if len(shape) == 1:  # every other vector is the weight of a norm
        return 1.0, 0.02
    if name.endswith(("embed_tokens.weight", "shared.weight", "cfg_uncond")):
        return 0.0, 1.0  # features, not a matrix to multiply by
    gain = 1 / math.sqrt(shape[1] * math.prod(shape[2:]) if kind == "weight" else shape[-1])
    if kind == "ada_gss" or ("ada_lin" in name and kind == "weight"):
        return 0.0, MODULATION_GAIN * (1.0 if kind == "ada_gss" else gain)
    if name.endswith("SelfAttention.q.weight"):
        return 0.0, gain / 8  # T5 attends without 1 / sqrt(head size)
    return 0.0, gain
