"""What images are drawn of: prompts or class labels, as the bundle's family draws. Checks them, and makes input."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

import msgspec
import numpy as np

from ...core.arguments import shown
from ...engines.bundle.bundle import Bundle
from ...engines.bundle.manifest import Manifest
from ...errors import BundleError, InputError, UnknownWordsWarning
from ...families import family_named
from .prompt import PromptTokenizer, TokenizedPrompt
from .settings import SamplingSettings

MOST_WORDS = 8  # that a warning names
LONGEST_NUMBER = 20  # digits: what is longer is no class, and Python may refuse to read it
Read = TypeVar("Read")
UNCONDITIONAL = "unconditional"
"""In place of a class label: an image of no class in particular."""
Subject = str | int  # a prompt, or the number of a class; UNCONDITIONAL of none
Label = int | str


def draws_labels(manifest: Manifest) -> bool:
    """Whether images are drawn of class labels rather than prompts."""
    return family_named(manifest.family).draws == "class label"


class ConditioningInputs:
    """Reads prompts or labels for one bundle."""

    def __init__(self, bundle: Bundle) -> None:
        m = self._manifest = bundle.manifest
        self._labels = draws_labels(m)
        self.tokenizer: PromptTokenizer | None = None
        if m.text_tokenizer is not None and m.text_encoder:
            path, content = bundle.path / m.text_tokenizer.file, bundle.read(m.text_tokenizer)
            self.tokenizer = PromptTokenizer(path, m.text_length, m.prompt_format, content)
            _check_prefix(m, self.tokenizer.prefix_length)
        self._names = _read_names(bundle)

    def of(self, prompt: str | Iterable[str] | None, labels: Label | Iterable[Label] | None = None) -> list[Subject]:
        """The subjects of a call, one image each. Several may come as a list, an array, or whatever gives one by one.
        A label may be UNCONDITIONAL.

        Raises:
            InputError: neither or both were given, not what the family draws from, none at all, or an unknown class.
        """
        given, refused = (labels, prompt) if self._labels else (prompt, labels)
        kind = "class label" if self._labels else "prompt"
        if given is None or refused is not None:
            argument = "class_labels=[207]" if self._labels else "a prompt"
            other = "a prompt" if self._labels else "class labels"
            problem = f"no {kind} given" if refused is None else f"{other} given"
            raise InputError(
                problem if given is None else f"a prompt and class labels given: {other} cannot be drawn from",
                expected=f"{argument}: {self._manifest.family} models draw from {kind}s",
                fix="" if given is None else f"leave {other} away",
            )
        items = _listed(given)
        if not items:
            raise InputError(f"the list of {kind}s is empty", expected=f"at least one {kind}")
        return self._each(items, self._class_number) if self._labels else items

    def one(self, prompt: object, label: object = None) -> list[Subject]:
        """The only subject of a call that draws one image.

        Raises:
            InputError: as `of`, or a list.
        """
        for name, value in (("prompt", prompt), ("class_label", label)):
            if _is_several(value):
                raise InputError(
                    f"{name} {shown(value)} is a {type(value).__name__}",
                    expected="a single one: a stream draws one image",
                    fix="open a stream for each, or call the pipeline with all of them",
                )
        return self.of(prompt, label)  # type: ignore[arg-type]  # what is neither is told so

    def steered(self, subjects: Sequence[Subject]) -> bool:
        """Whether guidance has an effect: not where all images are of no class, which it steers away from."""
        return not self._labels or any(subject != UNCONDITIONAL for subject in subjects)

    def given(self, subject: Subject, negative: str | None, settings: SamplingSettings) -> ImageInput:
        """As `inputs`, for one subject."""
        return self.inputs([subject], [negative], [settings])[0]

    def inputs(
        self, subjects: Sequence[Subject], negatives: Sequence[str | None], settings: Sequence[SamplingSettings]
    ) -> list[ImageInput]:
        """What the workspace is given for each subject, with its own negative prompt and settings.

        Warns once of every text that holds unknown words.

        Raises:
            InputError: no text encoder, a text too long for the bundle, or a negative prompt that has no effect.
                Of several subjects it says which one is meant.
        """
        for negative, own in zip(negatives, settings, strict=True):
            if negative is not None:
                self._check_negative(negative, own)
        if self._labels:
            return [LabelInput(self._row(subject)) for subject in subjects]
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise InputError(
                "this bundle has no text encoder, so it cannot read a prompt",
                fix="build it from a checkpoint with a text encoder",
            )
        encoded = {
            negative: tokenizer.encode(negative, "negative prompt")
            for negative in dict.fromkeys(negatives)
            if negative is not None
        }
        prompts = self._each(subjects, tokenizer.encode)
        for subject, prompt in dict(zip(subjects, prompts, strict=True)).items():
            _warn_of_unknown(prompt, "prompt", of=str(subject) if len(subjects) > 1 else "")
        for negative, found in encoded.items():
            _warn_of_unknown(found, "negative prompt", of=negative if len(encoded) > 1 else "")
        return [
            TextInput(prompt, None if negative is None else encoded[negative])
            for prompt, negative in zip(prompts, negatives, strict=True)
        ]

    def _row(self, label: Subject) -> int:
        """The row of a class in the class embedding; that of no class lies behind all others."""
        return self._manifest.transformer.classes if label == UNCONDITIONAL else int(label)

    def _check_negative(self, negative: str, settings: SamplingSettings) -> None:
        if self._labels:
            raise InputError(f"{self._manifest.family} models read no negative prompt", fix="leave it away")
        if settings.rows == 1:
            raise InputError(
                f"negative_prompt has no effect at guidance_scale {settings.guidance_off:g}",
                fix="raise guidance_scale, or drop the prompt",
            )
        if not self._reads_negative:
            raise InputError(
                f"{self._manifest.family} models read no negative prompt",
                expected="guidance away from no text at all, as they were trained",
                fix="leave it away",
            )

    def _each(self, items: Sequence[Any], read: Callable[[Any], Read]) -> list[Read]:
        """All items, read. An error says which one is meant, by its place and its first words."""
        found = []
        for place, item in enumerate(items, start=1):
            try:
                found.append(read(item))
            except InputError as error:
                if len(items) == 1:
                    raise
                kind = "class label" if self._labels else "prompt"
                problem = f"{kind} {place} of {len(items)}, {shown(item)}: {error.problem}"
                raise InputError(problem, expected=error.expected, fix=error.fix) from error
        return found

    @property
    def _reads_negative(self) -> bool:
        m = self._manifest
        return any(t.name == "uncond" for found in m.sets for t in m.engines[found.conditioning].inputs)

    def _class_number(self, label: Label) -> Subject:
        classes = self._manifest.transformer.classes
        if isinstance(label, str) and label.strip().casefold() == UNCONDITIONAL:
            return UNCONDITIONAL
        if isinstance(label, str) and not (label.strip().isdecimal() and len(label) < LONGEST_NUMBER):
            return self._named(label)
        number = int(label) if isinstance(label, str | int | np.integer) and not isinstance(label, bool) else -1
        if not 0 <= number < classes:
            expected = f'a whole number from 0 to {classes - 1}, or "{UNCONDITIONAL}"'
            raise InputError(f"class {shown(label)} is out of range", expected=expected)
        return number

    def _named(self, name: str) -> int:
        wanted = name.strip().casefold()
        exact = [i for i, names in enumerate(self._names) if wanted in names]
        if len(exact) == 1:
            return exact[0]
        near = [f"{i} ({names[0]})" for i, names in enumerate(self._names) if any(wanted in n for n in names)][:5]
        raise InputError(
            f"no class is named {shown(name)}" if not exact else f"{len(exact)} classes are named {shown(name)}",
            expected="a class number, or a name of the bundle's class_names.json"
            if self._names
            else "a class number: this bundle has no class names",
            fix=f"did you mean {', '.join(near)}?" if near else "give the number",
        )


def _check_prefix(manifest: Manifest, prefix_length: int) -> None:
    """The prefix and the longest prompt fill the text encoder's input.

    Raises:
        BundleError: they do not.
    """
    _, length = manifest.engines[manifest.text_encoder].tensor("ids").shape
    if prefix_length + manifest.text_length != length:
        raise BundleError(
            f"the bundle is inconsistent: a prefix of {prefix_length} tokens and prompts of {manifest.text_length}",
            expected=f"{length} together, for its text encoder",
            fix="rebuild the bundle",
        )


def _is_several(given: object) -> bool:
    if isinstance(given, np.ndarray):
        return given.ndim > 0
    return isinstance(given, Iterable) and not isinstance(given, str | bytes | bytearray)


def _listed(given: Any) -> list[Any]:
    """One subject or several, as a list: lists, tuples, arrays, generators."""
    if isinstance(given, Mapping | Set):
        raise InputError(f"{shown(given)} is a {type(given).__name__}", expected="one or several in order, as a list")
    if isinstance(given, np.ndarray):
        return list(np.atleast_1d(given).tolist())
    return list(given) if _is_several(given) else [given]


def _warn_of_unknown(prompt: TokenizedPrompt, kind: str, of: str = "") -> None:
    """`of` names the prompt where there are several."""
    if not prompt.unknown:
        return
    named, more = prompt.unknown[:MOST_WORDS], len(prompt.unknown) - MOST_WORDS
    words = ", ".join(repr(word) for word in named) + (f" and {more} more" if more > 0 else "")
    where = f" ({kind} {shown(of)})" if of else f" ({kind})"
    effect = "the image cannot follow them" if prompt.is_known else f"nothing of the {kind} is known"
    warning = UnknownWordsWarning(f"the tokenizer does not know: {words}{where}; {effect}")
    warnings.warn(warning, stacklevel=_levels_to_caller())


def _levels_to_caller() -> int:
    """Levels of the stack from whoever asks to the first that is not of this package."""
    frame: FrameType | None = sys._getframe(1)
    level, package = 1, __name__.partition(".")[0]
    while frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == package:
        frame, level = frame.f_back, level + 1
    return level


def _read_names(bundle: Bundle) -> list[list[str]]:
    """Names of every class, the first one first; empty where the checkpoint had none."""
    record = bundle.manifest.class_names
    if record is None:
        return []
    path = bundle.path / record.file
    try:
        entries = msgspec.json.decode(bundle.read(record), type=list[str])
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is no list of names: {error}", fix="rebuild the bundle") from error
    classes = bundle.manifest.transformer.classes
    if len(entries) != classes:
        raise BundleError(
            f"{path} has {len(entries)} entries",
            expected=f"one for each of {classes} classes",
            fix="rebuild the bundle",
        )
    return [[part.strip().casefold() for part in entry.split(",")] for entry in entries]


@dataclass(frozen=True)
class TextInput:
    """Tokenized prompts of one image. Without a negative prompt the learned unconditional text stands in."""

    prompt: TokenizedPrompt
    negative: TokenizedPrompt | None = None


@dataclass(frozen=True)
class LabelInput:
    """The class that one image is drawn of."""

    label: int  # the number of classes stands for none


ImageInput = TextInput | LabelInput
