"""Published text encoders on disk and as step graphs, by the kind that their config.json names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import Tensor, nn

from ..errors import CheckpointError
from .coders import TextEncoder
from .tensor_files import check_finite, read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from .wiring import Wiring

PREFIX_FILE = "prefix.txt"


@dataclass(frozen=True)
class TextEncoderKind:
    """One architecture: its class in transformers, its step module, and the tensors that the module reads.

    `has_prefix`: models read with it were trained on prompts behind a fixed text, which the folder must then hold.
    """

    model: str
    step: type[nn.Module]
    has_prefix: bool = False


KINDS: dict[str, TextEncoderKind] = {"t5": TextEncoderKind("T5EncoderModel", TextEncoder)}


def kind_of(config: PretrainedConfig) -> TextEncoderKind:
    """The kind of a text encoder's configuration."""
    return KINDS[config.model_type]


def load_text_encoder(folder: Path, wiring: Wiring | None = None) -> tuple[Any, dict[str, Tensor], Path, str]:
    """Read a text encoder from a folder in the transformers layout: configuration, weights, the path of its
    `tokenizer.json`, and what goes before every prompt.

    Raises:
        CheckpointError: a file is missing or damaged, or the model is of another kind than the family reads.
        NumericsError: a weight is not finite.
    """
    folder = Path(folder)
    kind = _checked_kind(folder, tuple(KINDS) if wiring is None else wiring.text_encoders)
    import transformers  # seconds to import: not paid by those who need no text encoder
    from transformers.utils import logging

    logging.disable_progress_bar()  # a bar of its own across the build's
    load: Callable[..., Any] = getattr(transformers, kind.model).from_pretrained
    try:
        model, info = load(folder, local_files_only=True, output_loading_info=True, dtype="auto")
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError, UnpicklingError) as error:
        raise CheckpointError(
            f"the text encoder in {folder} cannot be read: {error}",
            expected=f"weights for {kind.model}",
            fix="fetch it again",
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
    return model.config, weights, folder / "tokenizer.json", _prefix(folder) if kind.has_prefix else ""


def text_encoder_files(folder: Path) -> list[Path]:
    """What a checkpoint's digest covers."""
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return [folder / "config.json", folder / "tokenizer.json", *weights]


def _checked_kind(folder: Path, kinds: tuple[str, ...]) -> TextEncoderKind:
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
    if kind not in kinds:
        expected = " or ".join(repr(name) for name in kinds)
        raise CheckpointError(f"the text encoder in {folder} is of type {kind!r}", expected=expected)
    if "model" not in read_json(folder / "tokenizer.json"):
        raise CheckpointError(f"{folder / 'tokenizer.json'} describes no tokenizer", fix="fetch the file again")
    return KINDS[kind]


def _prefix(folder: Path) -> str:
    path = folder / PREFIX_FILE
    if not path.is_file():
        raise CheckpointError(
            f"the text encoder in {folder} has no {PREFIX_FILE}",
            expected="the instruction that the published sampling program puts before every prompt; the model was "
            "trained with it",
            fix=f"copy it into {PREFIX_FILE}; leave the file empty for none",
        )
    return path.read_text(encoding="utf-8")
