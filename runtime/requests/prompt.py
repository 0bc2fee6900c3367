"""From prompt to token ids, through the tokenizer that came with the checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer
from tokenizers.models import Unigram

from ...errors import BundleError, InputError
from ...families.base import PromptFormat

SPACE = "\u2581"  # a token of its own before what is unknown, in vocabularies of SentencePiece
MAX_PROMPT_BYTES = 64 * 1024  # beyond this nobody typed it, and tokenizing it only costs time


@dataclass(frozen=True)
class TokenizedPrompt:
    """ids and mask, both int64 [1, P + T]: a prefix of P tokens, and T of which `length` count; others are padding.

    `unknown` are the pieces of the text that the tokenizer has no token for; `is_known` says that it knows any of it.
    """

    ids: NDArray[np.int64]
    mask: NDArray[np.int64]
    length: int
    unknown: tuple[str, ...] = ()
    is_known: bool = True


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
        self._unknown_id = _unknown_id(self._tokenizer)

    @property
    def prefix_length(self) -> int:
        """Tokens before every prompt."""
        return len(self._prefix)

    def encode(self, prompt: str, what: str = "prompt") -> TokenizedPrompt:
        """Tokenize one prompt; `what` names it in errors.

        Raises:
            InputError: empty, not text, or longer than the engines' static text length; nothing is cut silently.
        """
        _check_text(prompt, what)
        encoding = self._tokenizer.encode(prompt)
        ids = encoding.ids
        count = len(ids)
        if count > self._length:
            raise InputError(
                f"the {what} has {count} tokens",
                expected=f"at most {self._length}, the text length this bundle was built for",
                fix=f"shorten the {what}, or rebuild with a larger --text-length",
            )
        padding = [self._format.pad_id] * (self._length - count)
        counted, uncounted = [1] * count, [0] * len(padding)
        if self._format.pad_left:
            ids, mask = padding + ids, uncounted + counted
        else:
            ids, mask = ids + padding, counted + uncounted
        ids, mask = self._prefix + ids, [1] * len(self._prefix) + mask
        arrays = np.array([ids], np.int64), np.array([mask], np.int64)
        return TokenizedPrompt(*arrays, count, *self._unknown(prompt, encoding))

    def _unknown(self, prompt: str, encoding: Encoding) -> tuple[tuple[str, ...], bool]:
        """Pieces of the prompt without a token, each once, and whether any other piece has one."""
        pieces: dict[str, None] = {}
        is_known = False
        for token, text, (start, end), is_special in zip(
            encoding.ids, encoding.tokens, encoding.offsets, encoding.special_tokens_mask, strict=True
        ):
            if token == self._unknown_id:
                pieces[prompt[start:end].strip() or text] = None
            elif not is_special and text != SPACE:
                is_known = True
        return tuple(pieces), is_known


def _unknown_id(tokenizer: Tokenizer) -> int | None:
    """The token of what has none; None where there is no such thing, as in vocabularies of bytes."""
    if isinstance(tokenizer.model, Unigram):  # does not tell
        found = json.loads(tokenizer.to_str())["model"].get("unk_id")
    else:
        found = tokenizer.token_to_id(getattr(tokenizer.model, "unk_token", None) or "")
    return found if isinstance(found, int) else None


def _check_text(prompt: object, what: str) -> None:
    if not isinstance(prompt, str):
        expected = "text, or a list of texts" if what == "prompt" else "text"
        raise InputError(f"the {what} is a {type(prompt).__name__}", expected=expected)
    if not prompt.strip():
        raise InputError(f"the {what} is empty", expected="some text that describes the image")
    try:
        size = len(prompt.encode())
    except UnicodeEncodeError as error:
        raise InputError(f"the {what} is not valid Unicode: {error.reason}", fix="remove lone surrogates") from error
    if size > MAX_PROMPT_BYTES:
        raise InputError(f"the {what} has {size} bytes", expected=f"at most {MAX_PROMPT_BYTES}", fix="shorten it")
