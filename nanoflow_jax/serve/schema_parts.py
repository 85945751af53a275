"""Pieces of what /openapi.json says, shared by the descriptions of all routes."""

from collections.abc import Mapping
from typing import Any

Schema = Mapping[str, Any]

INT32 = 2**31 - 1
TOKEN_ID = {"type": "integer", "minimum": 0, "maximum": INT32}
TEXT_OR_NULL = {"type": ["string", "null"]}
ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "additionalProperties": False,
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "additionalProperties": False,
            "properties": {
                "message": {"type": "string"},
                "type": {"enum": ["invalid_request_error", "server_error"]},
                "param": TEXT_OR_NULL,
                "code": TEXT_OR_NULL,
            },
        }
    },
}
REASONS: Mapping[int, str] = {
    400: "The request is wrong; the message says how.",
    401: "An API key is needed.",
    403: "The host or the origin is not allowed.",
    404: "There is no such thing here.",
    408: "The body came too slowly.",
    409: "That does not fit the state of the server.",
    413: "The body is too large.",
    415: "The body is of another kind than JSON.",
    429: "The server is busy; Retry-After tells when to try again.",
    500: "The request failed while it ran.",
    503: "The server is starting, draining or restarting its engine.",
    504: "The request's time limit passed.",
    507: "The disk is full.",
}
# What any route may answer, those that need no key excepted.
_ANYWHERE = (400, 401, 403)
# What a route that reads a JSON body may answer.
OF_A_BODY = (404, 408, 413, 415, 503)


def nullable(kind: str, **more: Any) -> dict[str, Any]:
    """A value of one kind, or null."""
    return {"type": [kind, "null"], **more}


def array(items: Schema, **more: Any) -> dict[str, Any]:
    """A list."""
    return {"type": "array", "items": items, **more}


def record(properties: Schema, required: list[str] | None = None) -> dict[str, Any]:
    """An object of which every field is known.

    Args:
        properties: By name.
        required: Fields that are always there; None for all.
    """
    names = list(properties) if required is None else required
    return {
        "type": "object",
        "properties": dict(properties),
        "required": names,
        "additionalProperties": False,
    }


def errors(*codes: int) -> dict[int | str, dict[str, Any]]:
    """Answers to requests that fail, those that any route may give included."""
    content = {"application/json": {"schema": ERROR}}
    return {
        code: {"description": REASONS[code], "content": content} for code in (*_ANYWHERE, *codes)
    }


def answers(
    schema: Schema, *codes: int, media: str = "application/json", more: Schema | None = None
) -> dict[int | str, dict[str, Any]]:
    """The answers of a route.

    Args:
        schema: Of its answer.
        codes: Of its errors, beside those that any route may give.
        media: Type of its answer.
        more: Further types of its answer.
    """
    content = {media: {"schema": schema}, **(more or {})}
    return {200: {"description": "The answer.", "content": content}, **errors(*codes)}


def with_body(schema: Schema, responses: Mapping[int | str, Any]) -> dict[str, Any]:
    """Arguments of a route's decorator, for one that reads a JSON body."""
    content = {"application/json": {"schema": schema}}
    return {
        "responses": dict(responses),
        "openapi_extra": {"requestBody": {"required": True, "content": content}},
    }


def model_name(name: str) -> dict[str, Any]:
    """The field that names the model; nothing or an empty name is the one that is served."""
    return {"enum": [name, "", None]}
