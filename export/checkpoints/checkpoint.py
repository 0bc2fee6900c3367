"""A published model on disk, read, checked and gathered in one noun: transformer, image tokenizer, text encoder.

Tensors keep their official names and the type they are stored in. Knows nothing of graphs or engines.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...engines.bundle.manifest import HubSource
from ...errors import CheckpointError
from ...families import family_of
from ...families.base import Family, ImageTokenizerShape, PromptFormat, TransformerShape, to_json
from ..models.common.tensor_shapes import Shapes, module_shapes, shapes_of, without_derived
from ..models.registry import ADAPTERS, adapter_of
from ..models.transformer.adapter import ModelAdapter
from .stored_numbers import plain_numbers
from .tensor_files import check_finite, check_state, digest, read_json, read_shards, read_tensors, shard_files
from .text_encoders import load_text_encoder, text_encoder_files
from .tokenizer_files import read_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Weights = Mapping[str, Tensor]
Adapter = ModelAdapter[Any, Any]  # of whichever family

PUBLISHED_TOKENIZERS = (
    f"{name}.pth" for adapter in ADAPTERS.values() for row in adapter.published for name in row.image_tokenizers
)
IMAGE_TOKENIZER_FILES = ("image_tokenizer.safetensors", "image_tokenizer.pth", *PUBLISHED_TOKENIZERS)
CLASS_NAMES = "class_names.json"
TRANSFORMER_WRAPPERS = ("trainer", "gpt_fsdp", "gpt_wo_ddp")
TOKENIZER_WRAPPERS = ("trainer", "vae_local", "vae")
# Stored beside the tokenizer, and of no use for decoding: a constant of the quantiser, the training losses.
TOKENIZER_EXTRAS = re.compile(r"quantizer?\.lfq\.mask$|(image_disc|video_disc|discriminator|disc|loss|perceptual\w*)\.")


@dataclass(frozen=True)
class Checkpoint:
    """Everything an export starts from. Weights may be a mapping that makes each tensor when it is asked for.

    `digest` identifies the weights and the configuration, not where they lie.
    """

    name: str
    transformer: TransformerShape  # the family's own configuration
    transformer_weights: Weights
    image_tokenizer: ImageTokenizerShape
    image_tokenizer_weights: Weights
    text_encoder: PretrainedConfig | None
    text_encoder_weights: Weights
    tokenizer_file: Path | None  # tokenizer.json of the text encoder; None for random weights
    digest: str
    class_names: Path | None = None  # JSON list of names, one entry for each class
    prompt_format: PromptFormat = field(default_factory=PromptFormat)
    hub_sources: tuple[HubSource, ...] = ()  # repositories of the hub that its parts came from

    @property
    def prefix_length(self) -> int:
        """Tokens of what goes before every prompt."""
        prefix = self.prompt_format.prefix
        if not prefix or self.tokenizer_file is None:
            return 0
        return len(read_tokenizer(self.tokenizer_file).encode(prefix, add_special_tokens=False).ids)

    @property
    def family(self) -> Family[Any]:
        return family_of(self.transformer)

    def __post_init__(self) -> None:
        adapter_of(self.transformer).check_parts(self.transformer, self.image_tokenizer)
        if self.text_encoder is None:
            return
        width = self.text_encoder.hidden_size
        if width != self.transformer.text_width:
            raise CheckpointError(
                f"the transformer reads text features of width {self.transformer.text_width}, "
                f"the text encoder gives {width}",
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
    `text_encoder/` where the family reads prompts, and optionally `config.json` and `class_names.json`; the keyword
    paths come before what it holds.

    Raises:
        CheckpointError: a part is missing, unreadable, or does not fit the others.
        NumericsError: a weight is not finite.
    """
    source = Path(source)
    folder = source if source.is_dir() else None
    tokenizer_path = image_tokenizer or _part(folder, *IMAGE_TOKENIZER_FILES)
    model, model_weights = load_transformer(source)
    images, image_weights = load_image_tokenizer(tokenizer_path, adapter_of(model))
    files = [*_transformer_files(source), Path(tokenizer_path)]
    encoder: PretrainedConfig | None = None
    encoder_weights: Weights = {}
    tokenizer_file, prompt_format = None, PromptFormat()
    if family_of(model).draws == "prompt":
        encoder_path = text_encoder or _part(folder, "text_encoder")
        encoder, encoder_weights, tokenizer_file, prompt_format = load_text_encoder(encoder_path, adapter_of(model))
        files += text_encoder_files(encoder_path)
    elif text_encoder is not None:
        raise CheckpointError(
            f"{family_of(model).name} models read no prompts", expected="no text encoder", fix="leave it away"
        )
    return Checkpoint(
        name=name or source.resolve().stem,
        transformer=model,
        transformer_weights=model_weights,
        image_tokenizer=images,
        image_tokenizer_weights=image_weights,
        text_encoder=encoder,
        text_encoder_weights=encoder_weights,
        tokenizer_file=tokenizer_file,
        digest=digest(files, json.dumps([to_json(noun) for noun in (model, images, prompt_format)], sort_keys=True)),
        class_names=_class_names(source, model),
        prompt_format=prompt_format,
    )


def _class_names(source: Path, model: TransformerShape) -> Path | None:
    """The file of class names beside the model, if it has one and the family draws classes.

    Raises:
        CheckpointError: it does not name every class.
    """
    path = (source if source.is_dir() else source.parent) / CLASS_NAMES
    if family_of(model).draws != "class label" or not path.is_file():
        return None
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}", expected="a list of names") from error
    if not isinstance(names, list) or len(names) != model.classes or not all(isinstance(n, str) for n in names):
        raise CheckpointError(
            f"{path} does not name the model's {model.classes} classes",
            expected='a JSON list of one string for each class, "golden retriever, retriever" say',
            fix="mend it, or remove it: classes then go by number",
        )
    return path


def load_transformer(path: Path, config: TransformerShape | None = None) -> tuple[TransformerShape, dict[str, Tensor]]:
    """Read a transformer of any family: a `.safetensors` or `.pth` file, or a folder holding one (or its shards).

    Without a configuration, names and shapes of the tensors tell it, and a `config.json` in the folder, or beside the
    file, what they do not tell.
    The constant key biases (`zero_k_bias`) may be missing; they are returned all the same.

    Raises:
        CheckpointError: unreadable, or not the tensors of the configuration.
        NumericsError: a weight is not finite.
    """
    path = Path(path)
    files = _transformer_files(path)
    index = files[0] if files[0].suffix == ".json" else None
    state = plain_numbers(read_shards(index) if index else read_tensors(files[0], TRANSFORMER_WRAPPERS), path)
    adapter = adapter_of(config) if config is not None else _recognised(state, path)
    config = config or adapter.infer_transformer(shapes_of(state), _settings(path, adapter))
    expected = transformer_shapes(config)
    for name, shape in expected.items():
        if name.endswith("zero_k_bias"):
            state.setdefault(name, torch.zeros(shape))
    return config, _checked(without_derived(state, adapter.derived, expected), expected, path)


def load_image_tokenizer(
    path: Path, adapter: Adapter, config: ImageTokenizerShape | None = None
) -> tuple[ImageTokenizerShape, dict[str, Tensor]]:
    """Read a family's image tokenizer from a file: plain, or under `vae`; losses and discriminators are left out.

    Raises:
        CheckpointError: unreadable, or not the tensors of the configuration.
        NumericsError: a weight is not finite.
    """
    path = Path(path)
    stored = read_tensors(path, TOKENIZER_WRAPPERS)
    state = plain_numbers({n: tensor for n, tensor in stored.items() if not TOKENIZER_EXTRAS.match(n)}, path)
    config = config or adapter.infer_image_tokenizer(shapes_of(state))
    return config, _checked(state, image_tokenizer_shapes(config, adapter), path)


def _settings(path: Path, adapter: Adapter) -> dict[str, Any]:
    """What the config.json beside a transformer says; empty where there is none."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    return adapter.family.settings_from_json(read_json(file)) if file.exists() else {}


def _recognised(state: Mapping[str, Tensor], path: Path) -> Adapter:
    """The adapter of the family that a transformer belongs to."""
    for adapter in ADAPTERS.values():
        if adapter.marker in state:
            return adapter
    raise CheckpointError(
        f"{path}: not a transformer of a family that fastvar knows",
        expected=" or ".join(f"{adapter.marker} ({name})" for name, adapter in ADAPTERS.items()),
        fix="check that this is the transformer, not the image tokenizer or the text encoder",
    )


@lru_cache(maxsize=8)
def transformer_shapes(config: TransformerShape) -> Shapes:
    """Name and shape of every tensor of a transformer, buffers included."""
    return module_shapes(adapter_of(config).transformer, config)


@lru_cache(maxsize=8)
def image_tokenizer_shapes(config: ImageTokenizerShape, adapter: Adapter) -> Shapes:
    """Name and shape of every tensor of a family's image tokenizer."""
    return module_shapes(adapter.image_tokenizer, config)


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
        file for file in path.glob("*.pth") if file.name not in IMAGE_TOKENIZER_FILES
    )
    if len(candidates) != 1:
        names = ", ".join(file.name for file in candidates)
        raise CheckpointError(
            f"{path} holds {len(candidates)} files that could be the transformer" + (f": {names}" if names else ""),
            expected="transformer.safetensors, transformer.pth, one *.index.json or one *.pth",
            fix="name the file itself" if candidates else "check the path",
        )
    return [*candidates, *shard_files(candidates[0])] if candidates[0].suffix == ".json" else candidates
