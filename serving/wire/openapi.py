"""The description of the server that programs read, made from the table of fields that requests are read by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...core.version import __version__
from .fields import COMMON, EDITS

Schema = dict[str, Any]
ERRORS = {
    400: "Not understood: invalid_value, unknown_parameter or missing_required_parameter.",
    401: "invalid_api_key",
    403: "cross_site: a page of another site asks.",
    404: "model_not_found or not_found",
    405: "method_not_allowed",
    408: "request_timeout: the body came too slowly.",
    413: "body_too_large",
    429: "queue_full; retry-after says when to ask again.",
    500: "internal_error or numerics_error",
    503: "loading, shutting_down or not_healthy",
}
TEXT = {"type": "string"}
COUNT = {"type": "integer"}


def openapi(models: Sequence[Mapping[str, Any]], has_keys: bool) -> Schema:
    """OpenAPI 3.1 of a server with these models, as it describes them. has_keys: whether it asks for API keys."""
    own = {
        "model": {"type": "string", "enum": [model["id"] for model in models]},
        "size": {"type": "string", "enum": ["auto", *dict.fromkeys(m["size"] for m in models if "size" in m)]},
    }
    told = [model for model in models if "draws" in model]  # of the others only the name is known yet
    required = ("prompt",) if {model["draws"] for model in told} == {"prompt"} else ()
    refused = {name for name in ("tau", "top_k") if told and all(model.get(name) is None for model in told)}
    refused |= {"class_label"} if required else set()
    generation, edit = (
        {name: _specific(field.schema, own.get(name)) for name, field in fields.items() if name not in refused}
        for fields in (COMMON, EDITS)
    )
    found: Schema = {
        "openapi": "3.1.0",
        "info": {
            "title": "fastvar",
            "version": __version__,
            "description": "Images, scale by scale. The two endpoints that draw read what OpenAI's clients send.",
        },
        "paths": {
            "/v1/images/generations": {"post": _drawing("Draw images.", *_generations(generation, required))},
            "/v1/images/edits": {"post": _drawing("Enlarge an image, or redraw a part.", *_edits(edit, required))},
            "/v1/models": {"get": _got("Models and aliases.", _ref("Models"))},
            "/v1/models/{model}": {"get": {**_got("One of them.", _ref("Model"), 404), "parameters": [_model()]}},
            "/health": {"get": _got("Whether the process is sound.", _ref("Status"), 503)},
            "/ready": {"get": _got("Whether requests are taken.", _ref("Status"), 503)},
        },
        "components": {"schemas": _schemas()},
    }
    if has_keys:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, methods in found["paths"].items():
            if path.startswith("/v1/"):
                for operation in methods.values():
                    operation["security"] = [{"key": []}]
                    operation["responses"]["401"] = _error(401)
    return found


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _specific(schema: Schema, own: Schema | None) -> Schema:
    """What a field may hold on this server, where that is known."""
    return schema if own is None else {**own, "description": schema["description"]}


def _generations(fields: Mapping[str, Schema], required: Sequence[str]) -> tuple[str, Schema]:
    optional = {name: schema if name in required else _or_null(schema) for name, schema in fields.items()}
    return "application/json", _body(optional, required)


def _edits(fields: Mapping[str, Schema], required: Sequence[str]) -> tuple[str, Schema]:
    binary = {"type": "string", "format": "binary"}
    image = {**binary, "description": "PNG, JPEG or WebP."}
    mask = {
        **binary,
        "description": "The image's size; redrawn is what is transparent, or white where nothing is transparent.",
    }
    return "multipart/form-data", _body({**fields, "image": image, "mask": mask}, ("image", *required))


def _body(properties: Schema, required: Sequence[str]) -> Schema:
    schema: Schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**schema, "required": list(required)} if required else schema


def _or_null(schema: Schema) -> Schema:
    """null is as good as nothing."""
    about = {key: value for key, value in schema.items() if key == "description"}
    plain = {key: value for key, value in schema.items() if key != "description"}
    return {"anyOf": [plain, {"type": "null"}], **about}


def _drawing(summary: str, content_type: str, body: Schema) -> Schema:
    answers = {
        "200": {
            "description": "Images; or events, where a stream is asked for.",
            "headers": {"x-request-id": {"schema": TEXT}},
            "content": {
                "application/json": {"schema": _ref("Images")},
                "text/event-stream": {"schema": _ref("Event")},
            },
        },
        **{str(status): _error(status) for status in (400, 403, 404, 408, 413, 429, 500, 503)},
    }
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {content_type: {"schema": body}}},
        "responses": answers,
    }


def _got(summary: str, schema: Schema, *errors: int) -> Schema:
    found = {"200": {"description": "Found.", "content": {"application/json": {"schema": schema}}}}
    return {"summary": summary, "responses": found | {str(status): _error(status) for status in errors}}


def _error(status: int) -> Schema:
    return {"description": ERRORS[status], "content": {"application/json": {"schema": _ref("Error")}}}


def _model() -> Schema:
    return {"name": "model", "in": "path", "required": True, "schema": {**TEXT, "minLength": 1}}


def _object(properties: Schema, *required: str) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required or properties)}


def _schemas() -> Schema:
    tokens = _object({"text_tokens": COUNT, "image_tokens": COUNT})
    usage = {
        "input_tokens": COUNT,
        "output_tokens": COUNT,
        "total_tokens": COUNT,
        "input_tokens_details": tokens,
        "output_tokens_details": tokens,
    }
    image = _object({"b64_json": TEXT, "seed": COUNT, "settings": {"type": "object"}})
    images = {
        "created": COUNT,
        "data": {"type": "array", "items": image},
        "background": TEXT,
        "output_format": TEXT,
        "size": TEXT,
        "model": TEXT,
        "usage": _object(usage),
    }
    model = {"id": TEXT, "object": {"const": "model"}, "created": COUNT, "owned_by": TEXT}
    error = {"message": TEXT, "type": TEXT, "param": {"type": ["string", "null"]}, "code": TEXT}
    event = {"event": TEXT, "data": {**TEXT, "description": "JSON: a preview, an image, or an error."}}
    return {
        "Images": _object(images),
        "Event": _object(event),
        "Model": _object(model),
        "Models": _object({"object": {"const": "list"}, "data": {"type": "array", "items": _ref("Model")}}),
        "Status": _object({"status": TEXT}),
        "Error": _object({"error": _object(error)}),
    }
