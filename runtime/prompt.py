"""From prompt to token ids, through the tokenizer that came with the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ..errors import BundleError, InputError
from ..families.family import PromptFormat

MAX_PROMPT_BYTES = 64 * 1024  # beyond this nobody typed it, and tokenizing it only costs time


@dataclass(frozen=True)
class TokenizedPrompt:
    """ids and mask, both int64 [1, P + T]: a prefix of P tokens, and T of which `length` count; others are padding."""

    ids: NDArray[np.int64]
    mask: NDArray[np.int64]
    length: int


class PromptTokenizer:
    """Wraps tokenizer.json of the bundle: its content where that has been read, else the file."""

    def __init__(
        self, path: Path, text_length: int, prompt_format: PromptFormat | None = None, content: bytes | None = None
    ) -> None:
        try:
            self._tokenizer = Tokenizer.from_buffer(path.read_bytes() if content is None else content)
        except Exception as error:
            raise BundleError(f"cannot read {path}: {error}", fix="rebuild the bundle") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._length, self._format = text_length, prompt_format or PromptFormat()
        self._prefix = self._tokenizer.encode(self._format.prefix, add_special_tokens=False).ids

    @property
    def prefix_length(self) -> int:
        """Tokens before every prompt."""
        return len(self._prefix)

    def encode(self, prompt: str) -> TokenizedPrompt:
        """Tokenize one prompt.

        Raises:
            InputError: empty, not text, or longer than the engines' static text length; nothing is cut silently.
        """
        _check_text(prompt)
        ids = self._tokenizer.encode(prompt).ids
        count = len(ids)
        if count > self._length:
            raise InputError(
                f"the prompt has {count} tokens",
                expected=f"at most {self._length}, the text length this bundle was built for",
                fix="shorten the prompt, or rebuild with a larger --text-length",
            )
        padding = [self._format.pad_id] * (self._length - count)
        counted, uncounted = [1] * count, [0] * len(padding)
        if self._format.pad_left:
            ids, mask = padding + ids, uncounted + counted
        else:
            ids, mask = ids + padding, counted + uncounted
        ids, mask = self._prefix + ids, [1] * len(self._prefix) + mask
        return TokenizedPrompt(np.array([ids], np.int64), np.array([mask], np.int64), count)


def _check_text(prompt: str) -> None:
    if not isinstance(prompt, str):
        raise InputError(f"the prompt is a {type(prompt).__name__}", expected="text, or a list of texts")
    if not prompt.strip():
        raise InputError("the prompt is empty", expected="some text that describes the image")
    try:
        size = len(prompt.encode())
    except UnicodeEncodeError as error:
        raise InputError(f"the prompt is not valid Unicode: {error.reason}", fix="remove lone surrogates") from error
    if size > MAX_PROMPT_BYTES:
        raise InputError(f"the prompt has {size} bytes", expected=f"at most {MAX_PROMPT_BYTES}", fix="shorten it")
