"""Answers that are no images: errors in the shape that OpenAI's clients read, and JSON that any text fits into."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import Response

from ...errors import BundleError, FastvarError, InputError, NumericsError, PlanError

BAD_REQUEST = "invalid_request_error"
# What an error of the pipeline says -> the field of a request that it tells of.
TOLD_BY = {
    r"negative.prompt": "negative_prompt",
    r"^(the|no) prompt": "prompt",
    r"^the image": "image",
    r"^the mask": "mask",
    r"^(no )?class\b": "class_label",
    r"has no quality": "output_compression",
    r"have no tau": "tau",
    r"have no top_k": "top_k",
    r"^num_images": "n",
}


# Words of the command line in such an error -> what a request calls the same.
SAID_AS = {
    r"--quality\b": "output_compression",
    r"--keep-scales \(keep_scales=\)": "keep_scales",
    r"--fit (\w+)( \(fit=[^)]*\))?": r"fit: \1",
}


class ApiError(Exception):
    """What a client is told in place of an image: a status, and words that say what was got, expected, and the fix."""

    def __init__(
        self,
        status: int,
        code: str,
        problem: str,
        *,
        expected: str = "",
        fix: str = "",
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.message = str(FastvarError(problem, expected=expected, fix=fix))
        super().__init__(self.message)
        self.status, self.code, self.param = status, code, param
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else BAD_REQUEST

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    @property
    def response(self) -> Response:
        return json_response(self.body, self.status, self.headers)


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON in ASCII: a client may have sent text that no encoding can carry."""
    body = json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Response(body, status, dict(headers or {}), "application/json")


def invalid(problem: str, param: str | None, expected: str = "", fix: str = "") -> ApiError:
    """A field that was not understood."""
    return ApiError(400, "invalid_value", problem, expected=expected, fix=fix, param=param)


def missing(param: str, expected: str, fix: str = "") -> ApiError:
    problem = f"{param} is missing"
    return ApiError(400, "missing_required_parameter", problem, expected=expected, fix=fix, param=param)


def no_model(name: str, known: Sequence[str], fix: str) -> ApiError:
    return ApiError(404, "model_not_found", f"no model {name!r}", expected=", ".join(known), fix=fix, param="model")


def body_too_large(size: str, limit: int) -> ApiError:
    """`size`: what is known of it, in words."""
    problem, expected = f"the body has {size}", f"at most {limit}"
    return ApiError(413, "body_too_large", problem, expected=expected, fix="send a smaller image")


def refused(error: FastvarError, fields: Mapping[str, Any]) -> ApiError:
    """What the pipeline does not draw: the client's error, in its words. `fields`: those that a request may have."""
    if not isinstance(error, InputError | PlanError | BundleError):
        return failed(error)
    words = error.problem.split(maxsplit=1)
    told = [name for pattern, name in TOLD_BY.items() if re.search(pattern, error.problem)]
    param = next((name for name in (*words[:1], *told) if name in fields), None)
    message = str(error)
    for option, name in SAID_AS.items():
        message = re.sub(option, name, message)
    return ApiError(400, "invalid_value", message, param=param)


def failed(error: BaseException) -> ApiError:
    """What went wrong while drawing. A bug stays in the log: its words may tell of this machine."""
    if isinstance(error, NumericsError):
        return ApiError(500, "numerics_error", str(error))
    return ApiError(500, "internal_error", "the image could not be drawn; the server's log says why, by x-request-id")


def loading(model: str) -> ApiError:
    fix = "ask again in a moment"
    return ApiError(503, "loading", f"{model} is being loaded", fix=fix, headers={"retry-after": "1"})


def shutting_down() -> ApiError:
    problem = "the server is shutting down"
    return ApiError(503, "shutting_down", problem, fix="ask again", headers={"retry-after": "5"})


def queue_full(waiting: int, seconds: float) -> ApiError:
    """`seconds`: until there is room, as far as recent images tell."""
    after = max(1, min(120, math.ceil(seconds)))
    return ApiError(
        429,
        "queue_full",
        f"{waiting} requests wait already",
        expected="a free place in the queue",
        fix=f"ask again in {after} s",
        headers={"retry-after": str(after)},
    )
