"""A published model on disk, read, checked and gathered in one noun: transformer, image tokenizer, text encoder.

Tensors keep their official names and the type they are stored in. Knows nothing of graphs or engines.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..config import ImageTokenizerConfig, TransformerConfig, to_json, transformer_from_json
from ..errors import CheckpointError
from ..schedule import PIXELS_PER_TOKEN
from .image_tokenizer import ImageTokenizer
from .infinity import InfinityTransformer
from .tensor_files import check_finite, check_state, digest, read_json, read_shards, read_tensors, shard_files

if TYPE_CHECKING:
    from transformers import T5Config

__all__ = [
    "Checkpoint",
    "check_state",
    "image_tokenizer_shapes",
    "infer_image_tokenizer",
    "infer_transformer",
    "load_checkpoint",
    "load_image_tokenizer",
    "load_text_encoder",
    "load_transformer",
    "transformer_shapes",
]

Shapes = dict[str, tuple[int, ...]]
Weights = Mapping[str, Tensor]

TRANSFORMER_WRAPPERS = ("trainer", "gpt_fsdp", "gpt_wo_ddp")
TOKENIZER_WRAPPERS = ("trainer", "vae_local", "vae")
PATCHIFIED_CHANNELS = 56  # 8B: 14 bits in 2 x 2 cells; no other published model predicts 56
# Stored beside the tokenizer, and of no use for decoding: a constant of the quantiser, the training losses.
TOKENIZER_EXTRAS = re.compile(r"quantizer?\.lfq\.mask$|(image_disc|video_disc|discriminator|disc|loss|perceptual\w*)\.")


@dataclass(frozen=True)
class Checkpoint:
    """Everything an export starts from. Weights may be a mapping that makes each tensor when it is asked for.

    `digest` identifies the weights and the configuration, not where they lie.
    """

    name: str
    transformer: TransformerConfig
    transformer_weights: Weights
    image_tokenizer: ImageTokenizerConfig
    image_tokenizer_weights: Weights
    text_encoder: T5Config | None
    text_encoder_weights: Weights
    tokenizer_file: Path | None  # tokenizer.json of the text encoder; None for random weights
    digest: str

    def __post_init__(self) -> None:
        model, images = self.transformer, self.image_tokenizer
        if model.bits != images.bits:
            raise CheckpointError(
                f"the transformer predicts {model.bits} bits a cell, the image tokenizer reads {images.bits}",
                fix="give the image tokenizer that the transformer was trained with",
            )
        if images.patch_size * model.patch != PIXELS_PER_TOKEN:
            raise CheckpointError(
                f"a token would cover {images.patch_size * model.patch} pixels a side",
                expected=f"{PIXELS_PER_TOKEN}: {PIXELS_PER_TOKEN // model.patch} pixels a cell of the image tokenizer",
                fix="give the image tokenizer that the transformer was trained with",
            )
        if self.text_encoder is not None and self.text_encoder.d_model != model.text_width:
            raise CheckpointError(
                f"the transformer reads text features of width {model.text_width}, "
                f"the text encoder gives {self.text_encoder.d_model}",
                fix="give the text encoder that the transformer was trained with",
            )


def load_checkpoint(
    source: Path,
    *,
    image_tokenizer: Path | None = None,
    text_encoder: Path | None = None,
    name: str | None = None,
) -> Checkpoint:
    """Gather a checkpoint from a folder, or from a transformer file and the two other paths.

    The folder holds `transformer.safetensors` or `.pth`, `image_tokenizer.safetensors` or `.pth`,
    `text_encoder/`, and optionally `config.json`; the keyword paths come before what it holds.

    Raises:
        CheckpointError: a part is missing, unreadable, or does not fit the others.
        NumericsError: a weight is not finite.
    """
    source = Path(source)
    folder = source if source.is_dir() else None
    tokenizer_path = image_tokenizer or _part(folder, "image_tokenizer.safetensors", "image_tokenizer.pth")
    encoder_path = text_encoder or _part(folder, "text_encoder")
    model, model_weights = load_transformer(source)
    images, image_weights = load_image_tokenizer(tokenizer_path)
    encoder, encoder_weights, tokenizer_file = load_text_encoder(encoder_path)
    files = [*_transformer_files(source), Path(tokenizer_path), *_text_encoder_files(encoder_path)]
    return Checkpoint(
        name=name or source.resolve().stem,
        transformer=model,
        transformer_weights=model_weights,
        image_tokenizer=images,
        image_tokenizer_weights=image_weights,
        text_encoder=encoder,
        text_encoder_weights=encoder_weights,
        tokenizer_file=tokenizer_file,
        digest=digest(files, json.dumps([to_json(model), to_json(images)], sort_keys=True)),
    )


def load_transformer(
    path: Path, config: TransformerConfig | None = None
) -> tuple[TransformerConfig, dict[str, Tensor]]:
    """Read an Infinity transformer: a `.safetensors` or `.pth` file, or a folder holding one (or its shards).

    Without a configuration, a folder's `config.json` gives it, or else the names and shapes of the tensors.
    The constant key biases (`zero_k_bias`) may be missing; they are returned all the same.

    Raises:
        CheckpointError: unreadable, or not the tensors of the configuration.
        NumericsError: a weight is not finite.
    """
    path = Path(path)
    files = _transformer_files(path)
    if config is None and path.is_dir() and (path / "config.json").exists():
        config = transformer_from_json(read_json(path / "config.json"))
    index = files[0] if files[0].suffix == ".json" else None
    state = read_shards(index) if index else read_tensors(files[0], TRANSFORMER_WRAPPERS)
    config = config or infer_transformer(_shapes(state))
    expected = transformer_shapes(config)
    for name, shape in expected.items():
        if name.endswith("zero_k_bias"):
            state.setdefault(name, torch.zeros(shape))
    return config, _checked(state, expected, path)


def load_image_tokenizer(
    path: Path, config: ImageTokenizerConfig | None = None
) -> tuple[ImageTokenizerConfig, dict[str, Tensor]]:
    """Read an image tokenizer from a file: plain, or under `vae`; losses and discriminators are left out.

    Raises:
        CheckpointError: unreadable, or not the tensors of the configuration.
        NumericsError: a weight is not finite.
    """
    path = Path(path)
    stored = read_tensors(path, TOKENIZER_WRAPPERS)
    state = {name: tensor for name, tensor in stored.items() if not TOKENIZER_EXTRAS.match(name)}
    config = config or infer_image_tokenizer(_shapes(state))
    return config, _checked(state, image_tokenizer_shapes(config), path)


def load_text_encoder(folder: Path) -> tuple[T5Config, dict[str, Tensor], Path]:
    """Read a T5 encoder and the path of its `tokenizer.json` from a folder in the transformers layout.

    Raises:
        CheckpointError: a file is missing or damaged, or the model is no T5.
        NumericsError: a weight is not finite.
    """
    folder = Path(folder)
    _check_text_encoder_folder(folder)
    from transformers import T5EncoderModel  # seconds to import: not paid by those who need no text encoder
    from transformers.utils import logging

    logging.disable_progress_bar()  # a bar of its own across the build's
    try:
        model, info = T5EncoderModel.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, dtype="auto"
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError, UnpicklingError) as error:
        raise CheckpointError(
            f"the text encoder in {folder} cannot be read: {error}", expected="a T5 encoder", fix="fetch it again"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:  # transformers would fill them with random numbers and only warn
        raise CheckpointError(
            f"the text encoder in {folder} lacks {len(missing)} tensors: {', '.join(missing[:5])}",
            expected="every weight of the encoder that config.json describes",
            fix="fetch the folder again",
        )
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    check_finite(weights, folder)
    return model.config, weights, folder / "tokenizer.json"


@lru_cache(maxsize=8)
def transformer_shapes(config: TransformerConfig) -> Shapes:
    """Name and shape of every tensor of a transformer, buffers included."""
    with torch.device("meta"):
        return _module_shapes(InfinityTransformer(config))


@lru_cache(maxsize=8)
def image_tokenizer_shapes(config: ImageTokenizerConfig) -> Shapes:
    """Name and shape of every tensor of an image tokenizer."""
    with torch.device("meta"):
        return _module_shapes(ImageTokenizer(config))


def infer_transformer(shapes: Mapping[str, tuple[int, ...]]) -> TransformerConfig:
    """Sizes of a transformer from its tensors alone. Spatial patchify leaves no trace but 56 channels (8B).

    Raises:
        CheckpointError: the tensors are not those of an Infinity transformer.
    """
    chunked = _indices(shapes, r"block_chunks\.(\d+)\.module\.(\d+)\.")
    chunks, per_chunk = (max(i) + 1 for i in zip(*chunked, strict=True)) if chunked else (1, 0)
    depth = chunks * per_chunk if chunked else 1 + max((i for (i,) in _indices(shapes, r"blocks\.(\d+)\.")), default=-1)
    first = "block_chunks.0.module.0" if chunked else "blocks.0"
    width, code_channels = _dims(shapes, "word_embed.weight", 2, "an Infinity transformer")
    text_length, text_width = _dims(shapes, "cfg_uncond", 2, "an Infinity transformer")
    return TransformerConfig(
        depth=depth,
        width=width,
        heads=_dims(shapes, f"{first}.sa.scale_mul_1H11", 4, "an Infinity transformer")[1],
        mlp_width=_dims(shapes, f"{first}.ffn.fc1.weight", 2, "an Infinity transformer")[0],
        text_width=text_width,
        text_length=text_length,
        code_channels=code_channels,
        chunks=chunks,
        levels=_dims(shapes, "lvl_embed.weight", 2, "an Infinity transformer")[0],
        spatial_patchify=code_channels == PATCHIFIED_CHANNELS,
    )


def infer_image_tokenizer(shapes: Mapping[str, tuple[int, ...]]) -> ImageTokenizerConfig:
    """Sizes of an image tokenizer from its tensors alone.

    Read off the decoder: each of its levels has one residual block more, so none is ever empty.

    Raises:
        CheckpointError: the tensors are not those of such a tokenizer.
    """
    kind = "an image tokenizer"
    base = _dims(shapes, "encoder.conv_in.conv.weight", 4, kind)[0]
    blocks = _indices(shapes, r"decoder\.up\.(\d+)\.block\.(\d+)\.")
    levels = 1 + max((level for level, _ in blocks), default=-1)
    channels = [_dims(shapes, f"decoder.up.{i}.block.0.conv1.conv.weight", 4, kind)[0] for i in range(levels)]
    if not channels or not base or any(c % base for c in channels):
        raise CheckpointError(
            f"not {kind}: levels of {channels} channels over {base} base channels", expected="whole multiples"
        )
    return ImageTokenizerConfig(
        bits=_dims(shapes, "encoder.conv_out.conv.weight", 4, kind)[0],
        base_channels=base,
        channel_multipliers=tuple(c // base for c in channels),
        residual_blocks=max(block for level, block in blocks if level == 0),
    )


def _checked(state: dict[str, Tensor], expected: Shapes, path: Path) -> dict[str, Tensor]:
    check_state(state, expected, path)
    check_finite(state, path)
    return {name: state[name] for name in expected}


def _part(folder: Path | None, *names: str) -> Path:
    found = next((folder / name for name in names if (folder / name).exists()), None) if folder else None
    if found is None:
        what = names[0].split(".")[0]
        raise CheckpointError(
            f"no {what.replace('_', ' ')} " + (f"in {folder}" if folder else "given"),
            expected=" or ".join(names) + " in the checkpoint folder, or its path",
            fix=f"give {what} explicitly",
        )
    return found


def _transformer_files(path: Path) -> list[Path]:
    """What holds the transformer at a path: one file, or an index followed by its shards."""
    if not path.is_dir():
        return [path]
    for name in ("transformer.safetensors", "transformer.pth"):
        if (path / name).exists():
            return [path / name]
    candidates = sorted(path.glob("*.index.json")) or sorted(
        file for file in path.glob("*.pth") if file.name != "image_tokenizer.pth"
    )
    if len(candidates) != 1:
        names = ", ".join(file.name for file in candidates)
        raise CheckpointError(
            f"{path} holds {len(candidates)} files that could be the transformer" + (f": {names}" if names else ""),
            expected="transformer.safetensors, transformer.pth, one *.index.json or one *.pth",
            fix="name the file itself" if candidates else "check the path",
        )
    return [*candidates, *shard_files(candidates[0])] if candidates[0].suffix == ".json" else candidates


def _check_text_encoder_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise CheckpointError(
            f"no text encoder folder {folder}",
            expected="a folder with config.json, tokenizer.json and the weights",
            fix="check the path",
        )
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"the text encoder in {folder} has no {name}",
                expected="config.json, tokenizer.json and the weights",
                fix="copy the whole folder of the published text encoder",
            )
    kind = read_json(folder / "config.json").get("model_type")
    if kind != "t5":
        raise CheckpointError(f"the text encoder in {folder} is of type {kind!r}", expected="'t5'")
    if "model" not in read_json(folder / "tokenizer.json"):
        raise CheckpointError(f"{folder / 'tokenizer.json'} describes no tokenizer", fix="fetch the file again")


def _text_encoder_files(folder: Path) -> list[Path]:
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return [folder / "config.json", folder / "tokenizer.json", *weights]


def _module_shapes(module: nn.Module) -> Shapes:
    return _shapes(module.state_dict())


def _shapes(state: Mapping[str, Any]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _indices(names: Iterable[str], pattern: str) -> set[tuple[int, ...]]:
    matches = (re.match(pattern, name) for name in names)
    return {tuple(int(group) for group in match.groups()) for match in matches if match}


def _dims(shapes: Mapping[str, tuple[int, ...]], name: str, count: int, kind: str) -> tuple[int, ...]:
    shape = shapes.get(name, ())
    if len(shape) != count:
        raise CheckpointError(
            f"not {kind}: " + (f"{name} has shape {list(shape)}" if name in shapes else f"no tensor {name}"),
            expected=f"the official names, {name} of {count} dimensions",
            fix="check that this is the right file; a model of another family is not supported",
        )
    return shape
