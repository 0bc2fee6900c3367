"""Files of prompts: a text file with one a line, or JSON Lines whose objects bring settings of their own.

Everything in a file is checked before anything is drawn, and an error names the line.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FastvarError, InputError

if TYPE_CHECKING:
    from ..runtime.pipeline import Pipeline
    from ..runtime.requests.params import SamplingParams

STDIN = Path("-")
JSON_SUFFIXES = (".jsonl", ".ndjson")
COMMENT = "#"
MOST_BYTES = 64 << 20
MIN_DIGITS = 4  # of a line's number in the name of an image
SUBJECTS = ("prompt", "class_label")
_EXPECTED = "a text file with a prompt a line, or JSON Lines"


@dataclass(frozen=True)
class PromptLine:
    """What a line asks for: a prompt or a class, and what it says of its sampling, by the names of `SamplingParams`."""

    file: str
    number: int  # from 1
    subject: str | int
    kind: str | None  # "prompt" or "class_label", where the line says which it is
    settings: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """A block whose errors name this line."""
        try:
            yield
        except FastvarError as error:
            problem = f"{self.file}, line {self.number}: {error.problem}"
            raise type(error)(problem, expected=error.expected, fix=error.fix) from error

    def prefix(self, lines: Sequence[PromptLine]) -> str:
        """How names of its images begin: the line's number, in as many digits for all lines of the file."""
        digits = max(MIN_DIGITS, len(str(lines[-1].number)))
        return f"{self.number:0{digits}d}-"


def read_prompt_file(path: Path) -> tuple[PromptLine, ...]:
    """The lines that ask for something; "-" is stdin.

    A file is JSON Lines by its suffix, .jsonl or .ndjson, or because it begins with `{`. Of a text file, lines that
    begin with `#` do not count. Blank lines count in neither.

    Raises:
        InputError: not a readable text file, nothing in it, or a line that is not understood; says which.
    """
    name = "stdin" if path == STDIN else str(path)
    lines = re.split(r"\r?\n", _text(path, name))
    first = next((line for line in lines if line.strip()), "")
    is_json = path.suffix.lower() in JSON_SUFFIXES or first.lstrip().startswith("{")
    found = []
    for number, line in enumerate((line.strip() for line in lines), start=1):
        if line and is_json:
            found.append(_from_json(name, number, line))
        elif line and not line.startswith(COMMENT):
            found.append(PromptLine(name, number, line, None))
    if not found:
        raise InputError(f"{name} holds no prompt", expected="one a line")
    return tuple(found)


def plain_prompts(path: Path) -> tuple[str, ...]:
    """The prompts of a file, for who draws all of them alike.

    Raises:
        InputError: as `read_prompt_file`; a class label, or settings of a line's own.
    """
    lines = read_prompt_file(path)
    for line in lines:
        with line.blamed():
            if line.settings:
                raise InputError(
                    f"settings of its own: {', '.join(line.settings)}", expected="a prompt alone", fix="leave them away"
                )
            if not isinstance(line.subject, str) or line.kind == "class_label":
                raise InputError(f"the class label {line.subject!r}", expected="a prompt")
    return tuple(str(line.subject) for line in lines)


def params_of(lines: Sequence[PromptLine], given: SamplingParams) -> list[SamplingParams]:
    """How each line is sampled: what it does not say, the command line says.

    Raises:
        InputError: an unknown setting, or a value of another kind or out of range; says in which line.
    """
    found = []
    for line in lines:
        with line.blamed():
            found.append(given.changed(**line.settings))
    return found


def subject_of(line: PromptLine, labels: bool) -> dict[str, Any]:
    """The argument of the pipeline that a line is for; `labels`: its model draws classes.

    Raises:
        InputError: the line says that it is the other.
    """
    kind = "class_label" if labels else "prompt"
    if line.kind not in (None, kind):
        raise InputError(
            f"a {line.kind.replace('_', ' ') if line.kind else ''} given", expected=f'"{kind}", as this model draws'
        )
    return {"class_labels" if labels else "prompt": line.subject}


def subjects_of(lines: Sequence[PromptLine], labels: bool) -> dict[str, Any]:
    """The argument of the pipeline that several lines are for, as a list."""
    each = [subject_of(line, labels) for line in lines]
    return {name: [one[name] for one in each] for name in each[0]}


def check_lines(pipe: Pipeline, lines: Sequence[PromptLine], params: Sequence[SamplingParams]) -> None:
    """Whether the pipeline can draw all lines, before it draws the first.

    Raises:
        InputError, BundleError: what a call would raise; says for which line.
    """
    from ..runtime.requests.inputs import draws_labels

    labels = draws_labels(pipe.manifest)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of unknown words, which are told when the line is drawn
        for line, asked in zip(lines, params, strict=True):
            with line.blamed():
                pipe.requests.generation(**subject_of(line, labels), params=asked)


def _text(path: Path, name: str) -> str:
    try:
        data = _read(path)
        if len(data) > MOST_BYTES:
            raise InputError(f"{name} has more than {MOST_BYTES >> 20} MiB", expected=_EXPECTED)
        return data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise InputError(f"cannot read prompts from {name}: {reason}", expected=_EXPECTED) from error


def _read(path: Path) -> bytes:
    if path != STDIN:
        with path.open("rb") as handle:
            return handle.read(MOST_BYTES + 1)
    if sys.stdin is None:
        raise InputError("stdin is closed", expected="prompts, one a line")
    return sys.stdin.buffer.read(MOST_BYTES + 1)


def _from_json(file: str, number: int, text: str) -> PromptLine:
    with PromptLine(file, number, text, None).blamed():
        try:
            entries = json.loads(text, object_pairs_hook=_Pairs, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            raise InputError(f"not JSON: {error}", expected=f"an object a line, {_example()}") from error
        if not isinstance(entries, _Pairs):
            raise InputError(_named(entries), expected=f"an object, {_example()}")
        data = _checked_names(entries)
        kind = _kind(data)
        subject = data.pop(kind)
        if isinstance(subject, bool) or not isinstance(subject, str if kind == "prompt" else str | int):
            expected = "text" if kind == "prompt" else "a number or a name"
            raise InputError(f"{kind} is {_named(subject)}", expected=expected)
        negative = data.get("negative_prompt")
        if negative is not None and not isinstance(negative, str):
            raise InputError(f"negative_prompt is {_named(negative)}", expected="text")
        settings = {name: value for name, value in data.items() if value is not None}
        return PromptLine(file, number, subject, kind, settings)


class _Pairs(list[tuple[str, Any]]):
    """An object as its names and values stand in the text."""


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")


def _checked_names(entries: _Pairs) -> dict[str, Any]:
    """Known names, each once."""
    from ..runtime.requests.params import ALIASES, SamplingParams

    known = (*SUBJECTS, *(entry.name for entry in fields(SamplingParams)), *ALIASES)
    names = [name for name, _ in entries]
    if unknown := sorted(set(names) - set(known)):
        raise InputError(
            f"unknown field {', '.join(map(repr, unknown))}",
            expected=f"some of {', '.join(known)}",
            fix="check the spelling",
        )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{', '.join(twice)} given twice", fix="leave one away")
    return dict(entries)


def _kind(data: dict[str, Any]) -> str:
    given = [name for name in SUBJECTS if name in data]
    if len(given) != 1:
        raise InputError(
            "neither prompt nor class_label" if not given else "both prompt and class_label", expected="one of them"
        )
    return given[0]


def _named(value: Any) -> str:
    """What kind of value it is, by the words of JSON."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    kinds = {str: "text", int: "a number", float: "a number", _Pairs: "an object"}
    return kinds.get(type(value), "a list")


def _example() -> str:
    return '{"prompt": "a red circle", "seed": 7}'
