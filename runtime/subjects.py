"""What images are drawn of: prompts or class labels, as the bundle's family draws. Checks them, and makes input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from ..engines.bundle import Bundle
from ..engines.manifest import Manifest
from ..errors import BundleError, InputError
from ..families import family_named
from .generation import ImageInput, LabelInput, SamplingSettings, TextInput
from .prompt import PromptTokenizer

Subject = str | int  # a prompt, or the number of a class
Label = int | str


def draws_labels(manifest: Manifest) -> bool:
    """Whether images are drawn of class labels rather than prompts."""
    return family_named(manifest.family).draws == "class label"


class Subjects:
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

    def of(self, prompt: str | Sequence[str] | None, labels: Label | Sequence[Label] | None = None) -> list[Subject]:
        """The subjects of a call, one image each.

        Raises:
            InputError: neither or both were given, not what the family draws from, none at all, or an unknown class.
        """
        given, refused = (labels, prompt) if self._labels else (prompt, labels)
        kind = "class label" if self._labels else "prompt"
        if given is None or refused is not None:
            argument = "class_labels=[207]" if self._labels else "a prompt"
            other = "a prompt" if self._labels else "class labels"
            raise InputError(
                f"{other} given" if refused is not None else f"no {kind} given",
                expected=f"{argument}: {self._manifest.family} models draw from {kind}s",
            )
        items: list[Any] = list(given) if isinstance(given, list | tuple) else [given]
        if not items:
            raise InputError(f"the list of {kind}s is empty", expected=f"at least one {kind}")
        return [self._class_number(item) for item in items] if self._labels else items

    def given(self, subject: Subject, negative: str | None, settings: SamplingSettings) -> ImageInput:
        """What the workspace is given for a subject.

        Raises:
            InputError: no text encoder, a text too long for the bundle, or a negative prompt that has no effect.
        """
        if self._labels:
            if negative is not None:
                raise InputError(f"{self._manifest.family} models read no negative prompt", fix="leave it away")
            assert isinstance(subject, int)
            return LabelInput(subject)
        if self.tokenizer is None:
            raise InputError(
                "this bundle has no text encoder, so it cannot read a prompt",
                fix="build it from a checkpoint with a text encoder",
            )
        if negative is not None and settings.rows == 1:
            raise InputError(
                f"negative_prompt has no effect at guidance_scale {settings.guidance_off:g}",
                fix="raise guidance_scale, or drop the prompt",
            )
        if negative is not None and not self._reads_negative:
            raise InputError(
                f"{self._manifest.family} models read no negative prompt",
                expected="guidance away from no text at all, as they were trained",
                fix="leave it away",
            )
        encoded = self.tokenizer.encode(negative) if negative is not None else None
        return TextInput(self.tokenizer.encode(subject), encoded)  # type: ignore[arg-type]

    @property
    def _reads_negative(self) -> bool:
        m = self._manifest
        return any(t.name == "uncond" for found in m.sets for t in m.engines[found.condition].inputs)

    def _class_number(self, label: Label) -> int:
        classes = self._manifest.transformer.classes  # type: ignore[attr-defined]  # families of labels have them
        if isinstance(label, str) and not label.strip().isdigit():
            return self._named(label)
        number = int(label) if isinstance(label, str | int | np.integer) and not isinstance(label, bool) else -1
        if not 0 <= number < classes:
            raise InputError(f"class {label!r} is out of range", expected=f"a whole number from 0 to {classes - 1}")
        return number

    def _named(self, name: str) -> int:
        wanted = name.strip().casefold()
        exact = [i for i, names in enumerate(self._names) if wanted in names]
        if len(exact) == 1:
            return exact[0]
        near = [f"{i} ({names[0]})" for i, names in enumerate(self._names) if any(wanted in n for n in names)][:5]
        raise InputError(
            f"no class is named {name!r}" if not exact else f"{len(exact)} classes are named {name!r}",
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
    classes = bundle.manifest.transformer.classes if draws_labels(bundle.manifest) else 0  # type: ignore[attr-defined]
    if len(entries) != classes:
        raise BundleError(
            f"{path} has {len(entries)} entries",
            expected=f"one for each of {classes} classes",
            fix="rebuild the bundle",
        )
    return [[part.strip().casefold() for part in entry.split(",")] for entry in entries]
