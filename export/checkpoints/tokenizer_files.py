"""tokenizer.json of a text encoder: read, and checked against the embedding that its ids are rows of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ...errors import CheckpointError
from ...families.base import PromptFormat
from .tensor_files import read_json


def read_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer from its file.

    Raises:
        CheckpointError: the `tokenizers` library does not read it.
    """
    try:
        return Tokenizer.from_file(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # its errors are bare Exceptions, and its panics are not even those
        raise CheckpointError(
            f"{path} cannot be read: {str(error)[:200]}",
            expected="a tokenizer that the installed version of `tokenizers` knows",
            fix="fetch the file again, or update the package tokenizers",
        ) from error


def check_tokenizer(path: Path, rows: int, prompt_format: PromptFormat) -> None:
    """Every id that the tokenizer, or the padding, may give is a row of an embedding of so many rows.

    Raises:
        CheckpointError: it is not, or the file cannot be read.
    """
    found = [*read_tokenizer(path).get_vocab(with_added_tokens=True).items(), ("padding", prompt_format.pad_id)]
    found += _special_ids(read_json(path).get("post_processor"))
    beyond = sorted((number, token) for token, number in found if not 0 <= number < rows)
    if beyond:
        number, token = beyond[-1]
        raise CheckpointError(
            f"{path} has ids beyond the text encoder's embedding of {rows} rows: {number} ({token[:40]!r}), "
            f"{len(beyond)} in all",
            expected=f"ids from 0 to {rows - 1}",
            fix="give the tokenizer.json that belongs to this text encoder",
        )


def _special_ids(processor: Any) -> Iterator[tuple[str, int]]:
    """What a post-processor puts around a text: by its own numbers, whatever the vocabulary says."""
    if not isinstance(processor, dict):
        return
    for part in processor.get("processors") or []:
        yield from _special_ids(part)
    for name, token in (processor.get("special_tokens") or {}).items():
        yield from ((name, number) for number in token["ids"])
    for name in ("sep", "cls"):
        if isinstance(processor.get(name), list):
            yield str(processor[name][0]), int(processor[name][1])
