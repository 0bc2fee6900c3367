"""Published text encoders on disk and as step graphs, by the kind that their config.json names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor, nn

from ..errors import CheckpointError
from ..families.family import PromptFormat
from ..precision import Precision
from .coders import TextEncoder, text_encoder_role
from .qwen2_encoder import Qwen2Encoder, qwen2_role, text_half
from .tensor_files import check_finite, read_json
from .weights import Role

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from .wiring import Wiring

PREFIX_FILE = "prefix.txt"
SETTINGS_FILE = "tokenizer_config.json"


@dataclass(frozen=True)
class TextEncoderKind:
    """One architecture: its class in transformers, its step module, and the roles of the tensors that it reads.

    `has_prefix`: models read with it were trained on prompts behind a fixed text, which the folder must then hold, and
    on the features of padding.
    """

    model: str
    step: type[nn.Module]
    role: Callable[[Precision], Callable[[str], Role]]
    has_prefix: bool = False


KINDS: dict[str, TextEncoderKind] = {
    "t5": TextEncoderKind("T5EncoderModel", TextEncoder, text_encoder_role),
    "qwen2": TextEncoderKind("Qwen2Model", Qwen2Encoder, lambda _: qwen2_role, has_prefix=True),
}
HOLDERS = {"qwen2_vl": "qwen2"}  # models that hold one of a kind as their language half


def kind_of(config: PretrainedConfig) -> TextEncoderKind:
    """The kind of a text encoder's configuration."""
    return KINDS[config.model_type]


def load_text_encoder(folder: Path, wiring: Wiring | None = None) -> tuple[Any, dict[str, Tensor], Path, PromptFormat]:
    """Read a text encoder from a folder in the transformers layout: configuration, weights, the path of its
    `tokenizer.json`, and how prompts are made into its input. Of a Qwen2-VL model the language half is read.

    Raises:
        CheckpointError: a file is missing or damaged, or the model is of another kind than the family reads.
        NumericsError: a weight is not finite.
    """
    folder = Path(folder)
    kind = _checked_kind(folder, tuple(KINDS) if wiring is None else wiring.text_encoders)
    import transformers  # seconds to import: not paid by those who need no text encoder
    from transformers.utils import logging

    logging.disable_progress_bar()  # a bar of its own across the build's
    logging.set_verbosity_error()  # a table of the tensors that are not read; what is missing is looked at below
    load: Callable[..., Any] = getattr(transformers, kind.model).from_pretrained
    try:
        half = text_half(folder) if kind.model == "Qwen2Model" else {}
        model, info = load(folder, local_files_only=True, output_loading_info=True, dtype="auto", **half)
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
    return (
        model.config,
        weights,
        folder / "tokenizer.json",
        _prompt_format(folder) if kind.has_prefix else PromptFormat(),
    )


def plain_format(kinds: tuple[str, ...]) -> PromptFormat:
    """What is known of prompts without a text encoder's files."""
    return PromptFormat(keeps_padding=any(KINDS[kind].has_prefix for kind in kinds))


def text_encoder_files(folder: Path) -> list[Path]:
    """What a checkpoint's digest covers."""
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return [folder / "config.json", folder / "tokenizer.json", *weights]  # a prompt's format is digested as it is read


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
    found = read_json(folder / "config.json").get("model_type")
    kind = HOLDERS.get(str(found), found)
    if kind not in kinds:
        expected = " or ".join(repr(name) for name in kinds)
        raise CheckpointError(f"the text encoder in {folder} is of type {found!r}", expected=expected)
    if "model" not in read_json(folder / "tokenizer.json"):
        raise CheckpointError(f"{folder / 'tokenizer.json'} describes no tokenizer", fix="fetch the file again")
    return KINDS[kind]


def _prompt_format(folder: Path) -> PromptFormat:
    """The folder's prefix, and the padding of its tokenizer."""
    if not (folder / SETTINGS_FILE).is_file():
        raise CheckpointError(
            f"the text encoder in {folder} has no {SETTINGS_FILE}",
            expected="pad_token and padding_side: the model reads the features of padding",
            fix="copy the whole folder of the published text encoder",
        )
    settings = read_json(folder / SETTINGS_FILE)
    token, side = settings.get("pad_token"), settings.get("padding_side", "right")
    token = token.get("content") if isinstance(token, dict) else token
    number = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id(token) if isinstance(token, str) else None
    if number is None or side not in ("left", "right"):
        raise CheckpointError(
            f"{folder / SETTINGS_FILE} has pad_token {token!r} and padding_side {side!r}",
            expected="a token of tokenizer.json, and left or right",
            fix="fetch the folder again",
        )
    return PromptFormat(_prefix(folder), number, side == "left", keeps_padding=True)


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
