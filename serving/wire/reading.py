"""From a request's body to the images that it asks for, all checked before anything waits or is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request

from ...errors import FastvarError
from ...profiling.formatting import pixels
from ...runtime.pipeline import Pipeline
from ...runtime.requests.inputs import TextInput, draws_labels
from ...runtime.requests.params import SamplingParams
from ...runtime.requests.passes import ImageRequest
from . import answers
from .answers import invalid, missing
from .encoding import Encoding
from .fields import COMMON, EDITS, FILES, read_fields, read_json
from .uploads import decoded, only

MOST_PARTS = 64  # of a form
PART_BYTES = 1 << 18  # of a field that is no file
SAMPLING = ("seed", "guidance_scale", "tau", "top_p", "top_k", "negative_prompt")
Files = Mapping[str, list[bytes]]


@dataclass(frozen=True)
class Asked:
    """A request, checked. `watched`: scales whose previews are wanted; `unknown`: words that the tokenizer lacks."""

    requests: list[ImageRequest]
    encoding: Encoding
    streams: bool
    watched: frozenset[int]
    unknown: tuple[str, ...]
    is_edit: bool


def takes_images(path: str) -> bool:
    """Whether requests there are forms with images."""
    return path.endswith("/edits")


async def read_body(request: Request) -> tuple[dict[str, Any], Files]:
    """Fields and files, as they were sent; the fields are checked for kind and range.

    Raises:
        ApiError: the body is of another kind, or a field is not known or not understood.
    """
    is_edit = takes_images(request.url.path)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    expected = "multipart/form-data" if is_edit else "application/json"
    if kind != expected:
        problem = f"the content type is {kind!r}" if kind else "there is no content type"
        raise invalid(problem, None, expected, f"send {expected}")
    if not is_edit:
        return read_fields(read_json(await request.body()), COMMON), {}
    async with request.form(max_files=MOST_PARTS, max_fields=MOST_PARTS, max_part_size=PART_BYTES) as form:
        fields, files = await _sorted(form)
    return read_fields(fields, EDITS, from_form=True), files


async def _sorted(form: FormData) -> tuple[dict[str, str], Files]:
    """Texts and files of a form.

    Raises:
        ApiError: a field that is sent twice, or a text where a file belongs.
    """
    texts: dict[str, str] = {}
    files: dict[str, list[bytes]] = {}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            if name not in FILES:
                raise invalid(f"a file is sent as {name!r}", name, f"files as {', '.join(FILES)}")
            files.setdefault(FILES[name], []).append(await value.read())
        elif name in FILES:
            raise invalid(f"{name} is text", name, "a file, with its name in the part's header")
        elif name in texts:
            raise invalid(f"{name} is sent twice", name, "every field once")
        else:
            texts[name] = value
    return texts, files


def checked(pipe: Pipeline, fields: dict[str, Any], files: Files, is_edit: bool) -> Asked:
    """What the bundle makes of it.

    Raises:
        ApiError: the bundle cannot draw that.
    """
    known = {**EDITS, "image": None, "mask": None} if is_edit else COMMON
    try:
        return _checked(pipe, fields, files, is_edit)
    except FastvarError as error:
        raise answers.refused(error, known) from error


def _checked(pipe: Pipeline, fields: dict[str, Any], files: Files, is_edit: bool) -> Asked:
    _check_size(pipe, fields.get("size"))
    streams = fields.get("stream", False)
    if not streams and (fields.get("partial_images") or fields.get("previews")):
        name = "previews" if fields.get("previews") else "partial_images"
        raise invalid(f"{name} without stream", name, "stream: true", "ask for a stream, or leave it away")
    encoding = Encoding.asked(fields.get("output_format"), fields.get("output_compression"))
    params = SamplingParams(num_images=fields.get("n", 1), **{name: fields.get(name) for name in SAMPLING})
    subject = _subject(pipe, fields)
    requests = (
        _edits(pipe, fields, files, subject, params) if is_edit else pipe.requests.generation(**subject, params=params)
    )
    scales = [step.index for step in pipe.manifest.plan.steps]
    watched = scales if fields.get("previews") else spread(scales, fields.get("partial_images", 0))
    given = requests[0].given
    unknown = given.prompt.unknown if isinstance(given, TextInput) else ()
    return Asked(requests, encoding, streams, frozenset(watched if streams else ()), unknown, is_edit)


def _edits(
    pipe: Pipeline, fields: dict[str, Any], files: Files, subject: dict[str, Any], params: SamplingParams
) -> list[ImageRequest]:
    if "image" not in files:
        raise missing("image", "a PNG, JPEG or WebP file", "send it as a part named image")
    own = {name: fields[name] for name in ("fit",) if name in fields}
    image = decoded(only(files["image"], "image"), "image")
    if "mask" not in files:
        keep = fields.get("keep_scales")
        return pipe.requests.upscaling(image, **subject, params=params, keep_scales=keep, **own)
    if "keep_scales" in fields:
        raise invalid("keep_scales with a mask", "keep_scales", "it where an image is enlarged, without a mask")
    mask = decoded(only(files["mask"], "mask"), "mask")
    return pipe.requests.inpainting(image, mask, **subject, params=params, **own)


def _check_size(pipe: Pipeline, size: str | None) -> None:
    own = pixels(pipe.size)
    if size not in (None, "auto", own):
        fix = f"say {own} or auto, or ask a model of that size"
        raise invalid(f"size {size!r}, but the model draws {own}", "size", f"auto or {own}", fix)


def _subject(pipe: Pipeline, fields: dict[str, Any]) -> dict[str, Any]:
    """What is drawn, as an argument of the pipeline. A prompt names a class where classes are drawn: OpenAI's clients
    always send one.
    """
    prompt, label = fields.get("prompt"), fields.get("class_label")
    if not draws_labels(pipe.manifest):
        if label is not None:
            raise invalid("class_label given", "class_label", "a prompt: the model draws from texts", "leave it away")
        if prompt is None:
            raise missing("prompt", "what the image shows")
        return {"prompt": prompt}
    if label is None and not prompt:
        raise missing("class_label", "a class by number or name: the model draws classes")
    if label is not None and prompt:
        raise invalid("a prompt and class_label given", "class_label", "one of them", "leave the prompt empty")
    return {"class_labels": prompt if label is None else label}


def spread(scales: list[int], count: int) -> list[int]:
    """So many of the scales, evenly spread up to the last but one: the last is the image itself."""
    last = len(scales) - 1
    count = min(count, last)
    return [scales[(place + 1) * last // count - 1] for place in range(count)]
