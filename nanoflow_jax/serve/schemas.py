"""What /openapi.json says of each route: FastAPI takes these as arguments of its decorators."""

from typing import Any

from nanoflow_jax.serve.body_schemas import chat_fields, completion_fields
from nanoflow_jax.serve.schema_parts import (
    OF_A_BODY,
    REASONS,
    TEXT_OR_NULL,
    TOKEN_ID,
    answers,
    array,
    model_name,
    nullable,
    record,
    with_body,
)

MAX_DETOKENIZE = 1 << 20
_TEXT = {"type": "string"}
_INT = {"type": "integer"}


def _model_object() -> dict[str, Any]:
    return record(
        {
            "id": _TEXT,
            "object": {"const": "model"},
            "created": _INT,
            "owned_by": _TEXT,
            "max_model_len": nullable("integer"),
        }
    )


def models() -> dict[str, Any]:
    """Of GET /v1/models."""
    found = record({"object": {"const": "list"}, "data": array(_model_object())})
    return {"responses": answers(found)}


def model() -> dict[str, Any]:
    """Of GET /v1/models/{model}."""
    return {"responses": answers(_model_object(), 404)}


def tokenize(model: str) -> dict[str, Any]:
    """Of POST /tokenize, which takes the bodies of completions and chats."""
    texts = {"return_token_strs": nullable("boolean")}
    one = {**completion_fields(model), "prompt": _TEXT, **texts}
    body = {
        "anyOf": [
            record(one, ["prompt"]),
            record({**chat_fields(model), **texts}, ["messages"]),
        ]
    }
    found = record(
        {
            "count": _INT,
            "max_model_len": _INT,
            "tokens": array(_INT),
            "token_strs": array(TEXT_OR_NULL),
        },
        ["count", "max_model_len", "tokens"],
    )
    return with_body(body, answers(found, *OF_A_BODY))


def detokenize(model: str) -> dict[str, Any]:
    """Of POST /detokenize."""
    fields = {"model": model_name(model), "tokens": array(TOKEN_ID, maxItems=MAX_DETOKENIZE)}
    found = record({"prompt": _TEXT})
    return with_body(record(fields, ["tokens"]), answers(found, *OF_A_BODY))


def health() -> dict[str, Any]:
    """Of GET /health."""
    split = record({"address": _TEXT, "sessions": _INT})
    state = record(
        {"status": {"enum": ["starting", "ready", "draining"]}, "split": split}, ["status"]
    )
    found = answers(state)
    del found[401]
    found[503] = {**found[200], "description": REASONS[503]}
    return {"responses": found}


def version() -> dict[str, Any]:
    """Of GET /version."""
    return {"responses": answers(record({"version": _TEXT}))}


def metrics() -> dict[str, Any]:
    """Of GET /metrics."""
    return {"responses": answers(_TEXT, media="text/plain")}


def profile() -> dict[str, Any]:
    """Of POST /start_profile and /stop_profile."""
    return {"responses": answers(record({"folder": _TEXT}), 409)}
