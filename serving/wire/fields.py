"""Fields of a request: one table says what each may hold, from which they are read, and OpenAPI describes them."""

from __future__ import annotations

import difflib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...core.arguments import shown
from ...core.noise import MAX_SEED
from ...runtime.editing.source_image import FITS
from ...runtime.requests.params import MAX_TOP_K, MIN_TAU
from .answers import ApiError, invalid

MAX_TEXT = 1 << 16  # characters, as the pipeline has it in bytes
MAX_DIGITS = 40  # of a number in text
Schema = dict[str, Any]


class Field(ABC):
    """A field: `read` takes what JSON holds, `from_text` what a form holds."""

    @property
    @abstractmethod
    def expected(self) -> str:
        """What it takes, in words."""

    @property
    @abstractmethod
    def schema(self) -> Schema:
        """What it takes, as a JSON schema."""

    @abstractmethod
    def read(self, value: Any) -> Any:
        """The value, checked.

        Raises:
            ValueError: it is another kind of value, or out of range.
        """

    def from_text(self, text: str) -> Any:
        """What the text of a form stands for; it is read afterwards."""
        return text


@dataclass(frozen=True)
class Text(Field):
    longest: int = MAX_TEXT
    about: str = ""

    @property
    def expected(self) -> str:
        return f"text of at most {self.longest} characters"

    @property
    def schema(self) -> Schema:
        return _described({"type": "string", "maxLength": self.longest}, self.about)

    def read(self, value: Any) -> str:
        if not isinstance(value, str) or len(value) > self.longest:
            raise ValueError
        return value


@dataclass(frozen=True)
class Choice(Field):
    values: tuple[str, ...]
    about: str = ""

    @property
    def expected(self) -> str:
        return " or ".join(repr(value) for value in self.values)

    @property
    def schema(self) -> Schema:
        return _described({"type": "string", "enum": list(self.values)}, self.about)

    def read(self, value: Any) -> str:
        if value not in self.values:
            raise ValueError
        return str(value)


@dataclass(frozen=True)
class Whole(Field):
    low: int
    high: int
    about: str = ""

    @property
    def expected(self) -> str:
        return f"a whole number from {self.low} to {self.high}"

    @property
    def schema(self) -> Schema:
        return _described({"type": "integer", "minimum": self.low, "maximum": self.high}, self.about)

    def read(self, value: Any) -> int:
        if isinstance(value, float) and value.is_integer():  # JSON does not tell 1 from 1.0
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not self.low <= value <= self.high:
            raise ValueError
        return value

    def from_text(self, text: str) -> int:
        if len(text) > MAX_DIGITS or not text.strip().lstrip("+-").isdecimal():
            raise ValueError
        return int(text)


@dataclass(frozen=True)
class Real(Field):
    low: float
    high: float
    about: str = ""

    @property
    def expected(self) -> str:
        return f"a number from {self.low:g} to {self.high:g}"

    @property
    def schema(self) -> Schema:
        return _described({"type": "number", "minimum": self.low, "maximum": self.high}, self.about)

    def read(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not self.low <= value <= self.high:
            raise ValueError
        return value

    def from_text(self, text: str) -> float:
        value = float(text) if len(text) <= MAX_DIGITS else math.nan
        if not math.isfinite(value):
            raise ValueError
        return value


@dataclass(frozen=True)
class Flag(Field):
    about: str = ""

    @property
    def expected(self) -> str:
        return "true or false"

    @property
    def schema(self) -> Schema:
        return _described({"type": "boolean"}, self.about)

    def read(self, value: Any) -> bool:
        if not isinstance(value, bool):
            raise ValueError
        return value

    def from_text(self, text: str) -> bool:
        return {"true": True, "false": False}[text.strip().lower()]


@dataclass(frozen=True)
class Label(Field):
    about: str = ""

    @property
    def expected(self) -> str:
        return "a class by number or name"

    @property
    def schema(self) -> Schema:
        kinds = [{"type": "integer", "minimum": 0, "maximum": MAX_TOP_K}, {"type": "string", "maxLength": 1000}]
        return _described({"anyOf": kinds}, self.about)

    def read(self, value: Any) -> int | str:
        if isinstance(value, bool) or not isinstance(value, int | str) or len(str(value)[:1001]) > 1000:
            raise ValueError
        return value


NO_EFFECT = "Accepted, without effect."
COMMON: dict[str, Field] = {
    "prompt": Text(about="What the image shows. Models that draw classes take a class here too."),
    "model": Text(256, "A model or alias of /v1/models; may be left away where there is one model."),
    "n": Whole(1, 10, "Images."),
    "size": Text(32, "`auto`, or the model's own size as WIDTHxHEIGHT: it was built for one."),
    "output_format": Choice(("png", "jpeg", "webp"), "png by default."),
    "output_compression": Whole(0, 100, "Quality of JPEG and WebP; 0 counts as 1. A WebP of 100 is lossless."),
    "response_format": Choice(("b64_json",), "Images are always sent as base64."),
    "background": Choice(("auto", "opaque"), "Images are always opaque."),
    "stream": Flag("Send events, the last of which holds the image."),
    "partial_images": Whole(0, 3, "Previews in a stream, spread over the scales."),
    "previews": Choice(("all",), "A preview of every scale, in place of partial_images."),
    "seed": Whole(0, MAX_SEED, "Of the first image; the next ones count up. Drawn where absent, always told."),
    "guidance_scale": Real(0, 100, "Classifier-free guidance; the model's own by default."),
    "tau": Real(MIN_TAU, 100, "Sampling temperature, of models that have one."),
    "top_p": Real(0, 1, "The rarest values go, as long as they sum to at most 1 - top_p."),
    "top_k": Whole(0, MAX_TOP_K, "So many codes are sampled from, 0 for all; of models that leave it to the caller."),
    "negative_prompt": Text(about="What to steer away from."),
    "class_label": Label("Of models that draw classes."),
    "quality": Text(64, NO_EFFECT),
    "style": Text(64, NO_EFFECT),
    "user": Text(1024, NO_EFFECT),
    "safety_identifier": Text(1024, NO_EFFECT),
    "moderation": Text(64, NO_EFFECT),
}
EDITS: dict[str, Field] = {
    **COMMON,
    "keep_scales": Whole(1, 64, "Without a mask: how many scales are the image's."),
    "fit": Choice(FITS, "An image of another aspect ratio: exact refuses it, crop cuts it around its centre."),
}
FILES = {"image": "image", "image[]": "image", "mask": "mask"}  # part of a form -> what it holds
ELSEWHERE = {
    "num_images": "n",
    "num_images_per_prompt": "n",
    "cfg_scale": "guidance_scale",
    "steps": "",
    "num_inference_steps": "",
    "temperature": "tau",
    "generator": "seed",
    "width": "size",
    "height": "size",
}  # names that other programs have


def read_json(body: bytes) -> dict[str, Any]:
    """The object of a JSON body.

    Raises:
        ApiError: no JSON, or another kind of value.
    """
    try:
        found = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError among them
        raise invalid(f"the body is no JSON: {error}", None, 'an object as {"prompt": "a red circle"}') from None
    if not isinstance(found, dict):
        raise invalid(f"the body is a JSON {_kind(found)}", None, 'an object as {"prompt": "a red circle"}')
    return found


def read_fields(given: Mapping[str, Any], fields: Mapping[str, Field], from_form: bool = False) -> dict[str, Any]:
    """What was given, checked; null and an empty field of a form are as good as nothing.

    Raises:
        ApiError: a field that is not known, or a value that it does not take.
    """
    found: dict[str, Any] = {}
    for name, value in given.items():
        if name not in fields:
            raise _unknown(name, fields)
        if value is None or (from_form and value == "" and not isinstance(fields[name], Text)):
            continue
        field = fields[name]
        try:
            found[name] = field.read(field.from_text(value) if from_form else value)
        except (ValueError, KeyError):
            raise invalid(f"{name} {shown(value)} not understood", name, field.expected) from None
    return found


def _unknown(name: str, fields: Mapping[str, Field]) -> ApiError:
    near = difflib.get_close_matches(name, fields, 1)
    meant = ELSEWHERE.get(name, near[0] if near else "")
    said = f"did you mean {meant}?" if meant else "leave it away"
    problem, expected = f"parameter {shown(name)} is not known", f"some of {', '.join(fields)}"
    return ApiError(400, "unknown_parameter", problem, expected=expected, fix=said, param=name)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _kind(value: Any) -> str:
    kinds = {list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return kinds.get(type(value), "null")


def _described(schema: Schema, about: str) -> Schema:
    return {**schema, "description": about} if about else schema
