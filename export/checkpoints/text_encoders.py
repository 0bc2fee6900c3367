"""Published text encoders on disk and as step graphs, by the kind that their config.json names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...core.precision import Precision
from ...errors import CheckpointError
from ...families.base import PromptFormat
from ..models.common.coders import TextEncoder, text_encoder_role
from ..models.common.qwen2_encoder import Qwen2Encoder, qwen2_role
from ..models.common.tensor_shapes import Shapes, module_shapes, shapes_of
from ..models.common.weights import Role
from .published import CONFIG, FOLDER_WEIGHTS, PREFIX_FILE, SETTINGS_FILE, TOKENIZER_FILE
from .stored_numbers import PlainTensors, Scaled, plain_numbers
from .tensor_files import check_finite, check_state, read_json, read_shards, read_tensors, weight_files
from .text_encoder_configs import QWEN2_SIZES, T5_SIZES, Entries, qwen2_config, t5_config
from .tokenizer_files import read_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from ..models.transformer.adapter import ModelAdapter


@dataclass(frozen=True)
class TextEncoderKind:
    """One architecture: its class in transformers, its step module, and the roles of the tensors that it reads.

    configure: config.json and the tensors' shapes -> its configuration; sized_by: the tensors that it goes by.
    prefixes, others: of its tensors in files of models that hold it, and what names tensors there that are not its own.
    tied: names of one tensor.
    has_prefix: models read with it were trained on prompts behind a fixed text, which the folder must then hold, and
    on the features of padding.
    """

    model: str
    step: type[nn.Module]
    role: Callable[[Precision], Callable[[str], Role]]
    configure: Callable[[Entries, Shapes], Any]
    sized_by: tuple[str, ...]
    prefixes: tuple[str, ...] = ()
    others: re.Pattern[str] = re.compile(r"$^")
    tied: tuple[str, ...] = ()
    has_prefix: bool = False


KINDS: dict[str, TextEncoderKind] = {
    "t5": TextEncoderKind(
        "T5EncoderModel",
        TextEncoder,
        text_encoder_role,
        t5_config,
        sized_by=T5_SIZES,
        others=re.compile(r"(decoder|lm_head)\."),
        tied=("shared.weight", "encoder.embed_tokens.weight"),
    ),
    "qwen2": TextEncoderKind(
        "Qwen2Model",
        Qwen2Encoder,
        lambda _: qwen2_role,
        qwen2_config,
        sized_by=QWEN2_SIZES,
        prefixes=("model.language_model.", "model."),
        others=re.compile(r"(model\.)?visual\.|lm_head\.|.*rotary_emb\.inv_freq$"),
        has_prefix=True,
    ),
}
HOLDERS = {"qwen2_vl": "qwen2"}  # models that hold one of a kind as their language half


def kind_of(config: PretrainedConfig) -> TextEncoderKind:
    """The kind of a text encoder's configuration."""
    return KINDS[config.model_type]


def load_text_encoder(
    folder: Path, adapter: ModelAdapter[Any, Any] | None = None
) -> tuple[Any, Mapping[str, Tensor], Path, PromptFormat]:
    """Read a text encoder from a folder in the transformers layout: configuration, weights, the path of its
    `tokenizer.json`, and how prompts are made into its input. Of a Qwen2-VL model the language half is read.

    Raises:
        CheckpointError: a file is missing or damaged, or the model is of another kind than the family reads.
        NumericsError: a weight is not finite.
    """
    folder = Path(folder)
    data = _description(folder)
    kind = _checked_kind(data, folder, tuple(KINDS) if adapter is None else adapter.text_encoders)
    entries = Entries(data, str(folder / CONFIG))
    entries.plain()
    state = _own_tensors(_stored_tensors(folder), kind, folder)
    _check_complete(state, kind.sized_by, folder)
    config = kind.configure(entries, shapes_of(state.stored))
    expected = text_encoder_shapes(config)
    _check_complete(state, expected, folder)
    check_state(state.stored, expected, folder)
    weights = state.only(expected)
    check_finite(weights, folder)
    prompt_format = _prompt_format(folder) if kind.has_prefix else PromptFormat()
    return config, weights, folder / TOKENIZER_FILE, prompt_format


def text_encoder_shapes(config: PretrainedConfig) -> Shapes:
    """Name and shape of every tensor of a text encoder."""
    import transformers  # seconds to import: not paid by those who need no text encoder

    return module_shapes(getattr(transformers, kind_of(config).model), config)


def _check_complete(state: Mapping[str, Tensor], names: Iterable[str], folder: Path) -> None:
    missing = sorted(name for name in names if name not in state)
    if missing:
        raise CheckpointError(
            f"the text encoder in {folder} lacks {len(missing)} tensors: {', '.join(missing[:5])}",
            expected="every weight of the encoder that config.json describes",
            fix="fetch the folder again",
        )


def _stored_tensors(folder: Path) -> PlainTensors:
    """All tensors of the folder, quantised ones multiplied out."""
    file = _weight_file(folder)
    try:
        state = read_shards(file) if file.suffix == ".json" else read_tensors(file)
    except CheckpointError as error:
        raise CheckpointError(
            f"the text encoder in {folder} cannot be read: {error.problem}", expected=error.expected, fix=error.fix
        ) from error
    return plain_numbers(state, file)


def _weight_file(folder: Path) -> Path:
    """What holds the weights: one file, or the index of several."""
    found = next((folder / name for name in FOLDER_WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise CheckpointError(
            f"the text encoder in {folder} cannot be read: it has no weights",
            expected=" or ".join(FOLDER_WEIGHTS),
            fix="copy the whole folder of the published text encoder",
        )
    return found


def _own_tensors(state: PlainTensors, kind: TextEncoderKind, folder: Path) -> PlainTensors:
    """The encoder's tensors by their own names, without those of the rest of a model that holds it."""
    own: dict[str, Tensor | Scaled] = {}
    for name, tensor in state.stored.items():
        if kind.others.match(name):
            continue
        plain = next((name.removeprefix(prefix) for prefix in kind.prefixes if name.startswith(prefix)), name)
        if plain in own:
            raise CheckpointError(f"the text encoder in {folder} has two tensors {plain}", fix="fetch the folder again")
        own[plain] = tensor
    held = PlainTensors(own)
    tied = [name for name in kind.tied if name in own]
    if any(not torch.equal(held[name], held[tied[0]]) for name in tied[1:]):
        raise CheckpointError(
            f"the text encoder in {folder} has different tensors {' and '.join(kind.tied)}",
            expected="one embedding under both names",
            fix="fetch the folder again",
        )
    return PlainTensors(own | {name: own[tied[0]] for name in kind.tied if tied})


def plain_format(kinds: tuple[str, ...]) -> PromptFormat:
    """What is known of prompts without a text encoder's files."""
    return PromptFormat(keeps_padding=any(KINDS[kind].has_prefix for kind in kinds))


def text_encoder_files(folder: Path) -> list[Path]:
    """What a checkpoint's digest covers; a prompt's format is digested as it is read."""
    return [folder / CONFIG, folder / TOKENIZER_FILE, *weight_files(_weight_file(folder))]


def _description(folder: Path) -> dict[str, Any]:
    """config.json of a folder that holds all that it must."""
    if not folder.is_dir():
        raise CheckpointError(
            f"no text encoder folder {folder}",
            expected="a folder with config.json, tokenizer.json and the weights",
            fix="check the path",
        )
    for name in (CONFIG, TOKENIZER_FILE):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"the text encoder in {folder} has no {name}",
                expected="config.json, tokenizer.json and the weights",
                fix="copy the whole folder of the published text encoder",
            )
    if "model" not in read_json(folder / TOKENIZER_FILE):
        raise CheckpointError(f"{folder / TOKENIZER_FILE} describes no tokenizer", fix="fetch the file again")
    return read_json(folder / CONFIG)


def _checked_kind(data: Mapping[str, Any], folder: Path, kinds: tuple[str, ...]) -> TextEncoderKind:
    found = data.get("model_type")
    kind = HOLDERS.get(str(found), str(found))
    if kind not in kinds:
        expected = " or ".join(repr(name) for name in kinds)
        raise CheckpointError(f"the text encoder in {folder} is of type {str(found)[:80]!r}", expected=expected)
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
    number = read_tokenizer(folder / TOKENIZER_FILE).token_to_id(token) if isinstance(token, str) else None
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
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", expected="text in UTF-8") from error
