"""A published model on disk, read, checked and gathered in one noun: transformer, image tokenizer, text encoder.

Tensors keep their official names and the type they are stored in. Knows nothing of graphs or engines.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...families import family_of
from ...families.base import Family, ImageTokenizerShape, PromptFormat, TransformerShape, to_json
from ..models.common.tensor_shapes import Shapes, module_shapes, shapes_of, without_derived
from ..models.registry import ADAPTERS, adapter_of
from ..models.transformer.adapter import ModelAdapter
from .nesting import StateKeys, read_state
from .parts import Parts, find_parts
from .published import CLASS_NAMES, CONFIG, FOLDER_WEIGHTS
from .stored_numbers import PlainTensors, plain_numbers
from .tensor_files import check_finite, check_state, digest, read_json, weight_files
from .text_encoders import load_text_encoder, text_encoder_files
from .tokenizer_files import read_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Weights = Mapping[str, Tensor]
Adapter = ModelAdapter[Any, Any]  # of whichever family
NO_TEXT_ENCODER: tuple[Any, Weights, Path | None, PromptFormat] = (None, {}, None, PromptFormat())
ConfigT = TypeVar("ConfigT", bound="TransformerShape | ImageTokenizerShape")

_KEYS = [adapter.training_keys for adapter in ADAPTERS.values()]
TRANSFORMER_KEYS = StateKeys(
    tuple(key for keys in _KEYS for key in keys.averaged), tuple(key for keys in _KEYS for key in keys.trained)
)
IMAGE_TOKENIZER_KEYS = StateKeys(trained=tuple(dict.fromkeys(key for keys in _KEYS for key in keys.image_tokenizer)))

# Stored beside the tokenizer, and of no use for decoding: a constant of the quantiser, the training losses.
TOKENIZER_EXTRAS = re.compile(r"quantizer?\.lfq\.mask$|(image_disc|video_disc|discriminator|disc|loss|perceptual\w*)\.")
WITHIN = "vae."  # before the tokenizer's names in a model that holds its discriminator too


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
    origin: tuple[str, ...] = ()  # which files the parts were read from, and under which keys, in plain words

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
    model: str | None = None,
    image_tokenizer: Path | None = None,
    text_encoder: Path | None = None,
    name: str | None = None,
) -> Checkpoint:
    """Gather a checkpoint from a folder, or from a transformer and what lies beside it.

    A folder holds its files under the names that they are published under (`published.py`), or `transformer.*`,
    `image_tokenizer.*` and, where the family reads prompts, `text_encoder/`; optionally `config.json` and
    `class_names.json` beside the transformer. The keyword paths come before what it holds.

    Args:
        source: the folder; or the transformer's file, index or own folder.
        model: which of several models in the folder.
        image_tokenizer: its file, index or folder, where it lies elsewhere.
        text_encoder: its folder, where it lies elsewhere.
        name: what the model is called; as it is published, or as `source`, by default.

    Raises:
        CheckpointError: a part is missing, unreadable, or does not fit the others; several models and no choice.
        NumericsError: a weight is not finite.
    """
    source = Path(source)
    parts = find_parts(source, model)
    tokenizer_path = _weights_of(image_tokenizer or parts.image_tokenizer, parts)
    transformer = read_transformer(parts.transformer)
    adapter = adapter_of(transformer.config)
    images = read_image_tokenizer(tokenizer_path, adapter)
    text, text_path = NO_TEXT_ENCODER, text_encoder or parts.text_encoder
    files = [*weight_files(parts.transformer), *weight_files(tokenizer_path)]
    origin = [f"transformer: {_told(parts, parts.transformer, transformer.nested)}"]
    origin += [f"image tokenizer: {_told(parts, tokenizer_path, images.nested)}"]
    if adapter.family.draws == "prompt":
        text_path = text_path or _missing("text_encoder", parts, parts.text_encoders)
        text = load_text_encoder(text_path, adapter)
        files += text_encoder_files(text_path)
        origin += [f"text encoder: {parts.shown(text_path)}"]
    elif text_encoder is not None:
        raise CheckpointError(
            f"{adapter.family.name} models read no prompts", expected="no text encoder", fix="leave it away"
        )
    encoder, encoder_weights, tokenizer_file, prompt_format = text
    nouns = (transformer.config, images.config, prompt_format)
    return Checkpoint(
        name=name or parts.model or source.resolve().stem,
        transformer=transformer.config,
        transformer_weights=transformer.weights,
        image_tokenizer=images.config,
        image_tokenizer_weights=images.weights,
        text_encoder=encoder,
        text_encoder_weights=encoder_weights,
        tokenizer_file=tokenizer_file,
        digest=digest(files, json.dumps([to_json(noun) for noun in nouns], sort_keys=True)),
        class_names=_class_names(parts.transformer.parent, transformer.config),
        prompt_format=prompt_format,
        origin=tuple(origin),
    )


def _told(parts: Parts, path: Path, nested: str) -> str:
    return parts.shown(path) + (f" ({nested})" if nested else "")


def _weights_of(path: Path | None, parts: Parts) -> Path:
    """The file or index of an image tokenizer, whose folder may be named instead."""
    path = path or _missing("image_tokenizer", parts, parts.image_tokenizers, parts.rivals)
    return next((path / name for name in FOLDER_WEIGHTS if (path / name).is_file()), path)


def _missing(part: str, parts: Parts, names: tuple[str, ...], rivals: tuple[str, ...] = ()) -> NoReturn:
    what = part.replace("_", " ")
    raise CheckpointError(
        f"{parts.folder} holds {len(rivals)} files that could be the {what}: {', '.join(rivals)}"
        if rivals
        else f"no {what} in {parts.folder}",
        expected=" or ".join(names or (part,)) + " in the checkpoint folder, or its path",
        fix=f"give {part} explicitly (--{part.replace('_', '-')})",
    )


def _class_names(folder: Path, model: TransformerShape) -> Path | None:
    """The file of class names beside the model, if it has one and the family draws classes.

    Raises:
        CheckpointError: it does not name every class.
    """
    path = folder / CLASS_NAMES
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


@dataclass(frozen=True)
class Loaded(Generic[ConfigT]):
    """One part that was read: its configuration, its weights, and what it lay under in its file."""

    config: ConfigT
    weights: PlainTensors
    nested: str  # in plain words; empty for a plain state dict


def load_transformer(path: Path, config: TransformerShape | None = None) -> tuple[TransformerShape, Weights]:
    """Configuration and weights of a transformer; see `read_transformer`."""
    found = read_transformer(path, config)
    return found.config, found.weights


def read_transformer(path: Path, config: TransformerShape | None = None) -> Loaded[TransformerShape]:
    """Read a transformer of any family: a file of weights, an index, or a folder holding one model.

    Without a configuration, names and shapes of the tensors tell it, and a `config.json` beside the file what they do
    not tell. Of a training checkpoint averaged weights come first. The constant key biases (`zero_k_bias`) may be
    missing; they are returned all the same.

    Raises:
        CheckpointError: unreadable, or not the tensors of the configuration.
        NumericsError: a weight is not finite.
    """
    path = find_parts(Path(path)).transformer
    nested = read_state(path, TRANSFORMER_KEYS)
    state = plain_numbers(nested.tensors, path)
    adapter = adapter_of(config) if config is not None else recognised(state, path)
    config = config or adapter.infer_transformer(shapes_of(state.stored), _settings(path, adapter))
    expected = transformer_shapes(config)
    biases = {name: torch.zeros(shape) for name, shape in expected.items() if name.endswith("zero_k_bias")}
    stored = without_derived(biases | state.stored, adapter.derived, expected)
    return Loaded(config, _checked(PlainTensors(stored), expected, path), nested.origin)


def load_image_tokenizer(
    path: Path, adapter: Adapter, config: ImageTokenizerShape | None = None
) -> tuple[ImageTokenizerShape, Weights]:
    """Configuration and weights of an image tokenizer; see `read_image_tokenizer`."""
    found = read_image_tokenizer(path, adapter, config)
    return found.config, found.weights


def read_image_tokenizer(
    path: Path, adapter: Adapter, config: ImageTokenizerShape | None = None
) -> Loaded[ImageTokenizerShape]:
    """Read a family's image tokenizer from a file or an index; losses and discriminators are left out.

    Raises:
        CheckpointError: unreadable, or not the tensors of the configuration.
        NumericsError: a weight is not finite.
    """
    path = Path(path)
    nested = read_state(path, IMAGE_TOKENIZER_KEYS)
    tensors = {name: t for name, t in nested.tensors.items() if not TOKENIZER_EXTRAS.match(name)}
    if tensors and all(name.startswith(WITHIN) for name in tensors):
        tensors = {name.removeprefix(WITHIN): tensor for name, tensor in tensors.items()}
        tensors = {name: tensor for name, tensor in tensors.items() if not TOKENIZER_EXTRAS.match(name)}
    state = plain_numbers(tensors, path)
    config = config or adapter.infer_image_tokenizer(shapes_of(state.stored))
    return Loaded(config, _checked(state, image_tokenizer_shapes(config, adapter), path), nested.origin)


def _settings(path: Path, adapter: Adapter) -> dict[str, Any]:
    """What the config.json beside a transformer says; empty where there is none."""
    file = path.parent / CONFIG
    return adapter.family.settings_from_json(read_json(file)) if file.exists() else {}


def recognised(state: Container[str], path: Path) -> Adapter:
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


def _checked(state: PlainTensors, expected: Shapes, path: Path) -> PlainTensors:
    check_state(state.stored, expected, path)
    check_finite(state, path)
    return state.only(expected)
