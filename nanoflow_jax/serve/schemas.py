"""What /openapi.json says of each route: FastAPI takes these as arguments of its decorators.

Bodies are read by `openai.requests`, whose messages say more than a schema can; a test holds the
two together.
"""

from collections.abc import Mapping
from typing import Any

from nanoflow_jax import request as request_lib
from nanoflow_jax.openai import requests

Schema = Mapping[str, Any]

_INT_ID = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
_TEXT_OR_NULL = {"type": ["string", "null"]}
_LOGPROBS_OR_NULL = {"type": ["object", "null"]}
_USAGE = {
    "type": "object",
    "required": ["prompt_tokens", "completion_tokens", "total_tokens"],
    "properties": {
        "prompt_tokens": {"type": "integer"},
        "completion_tokens": {"type": "integer"},
        "total_tokens": {"type": "integer"},
        "prompt_tokens_details": {
            "type": "object",
            "properties": {"cached_tokens": {"type": "integer"}},
        },
    },
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": _TEXT_OR_NULL,
                "code": _TEXT_OR_NULL,
            },
        }
    },
}
_REASONS = {
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
}
_OF_A_BODY = (400, 401, 403, 404, 408, 413, 415, 503)


def _nullable(kind: str, **more: Any) -> dict[str, Any]:
    return {"type": [kind, "null"], **more}


def _object(properties: Schema, required: list[str] | None = None) -> dict[str, Any]:
    return {"type": "object", "properties": dict(properties), "required": required or []}


def _answers(
    schema: Schema, *errors: int, media: str = "application/json", more: Schema | None = None
) -> dict[int | str, dict[str, Any]]:
    found: dict[int | str, dict[str, Any]] = {
        200: {"description": "The answer.", "content": {media: {"schema": schema}}}
    }
    if more is not None:
        found[200]["content"].update(more)
    for code in (401, 403, *errors):
        found[code] = {
            "description": _REASONS[code],
            "content": {"application/json": {"schema": _ERROR}},
        }
    return found


def _with_body(schema: Schema, responses: Mapping[int | str, Any]) -> dict[str, Any]:
    content = {"application/json": {"schema": schema}}
    return {
        "responses": dict(responses),
        "openapi_extra": {"requestBody": {"required": True, "content": content}},
    }


def _model_field(name: str) -> dict[str, Any]:
    return {"enum": [name, None]}


def sampling_fields() -> dict[str, Any]:
    """Fields that both kinds of completion have."""
    most = request_lib
    top = {"minimum": 0, "maximum": most.MAX_LOGPROBS}
    ids = {"type": ["array", "null"], "items": _INT_ID}
    stop = {"type": "string", "minLength": 1, "maxLength": most.MAX_STOP_LEN}
    penalty = {"minimum": -2, "maximum": 2}
    return {
        "max_tokens": _nullable("integer", minimum=1, maximum=2**31 - 1),
        "min_tokens": _nullable("integer", minimum=0, maximum=2**31 - 1),
        "temperature": _nullable("number", minimum=0, maximum=1e6),
        "top_p": _nullable("number", exclusiveMinimum=0, maximum=1),
        "top_k": _nullable("integer", minimum=-1, maximum=2**31 - 1),
        "min_p": _nullable("number", minimum=0, maximum=1),
        "presence_penalty": _nullable("number", **penalty),
        "frequency_penalty": _nullable("number", **penalty),
        "repetition_penalty": _nullable("number", exclusiveMinimum=0, maximum=100),
        "logit_bias": {
            "type": ["object", "null"],
            "maxProperties": most.MAX_LOGIT_BIAS,
            "propertyNames": {"pattern": "^[0-9]{1,10}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        },
        "allowed_token_ids": {**ids, "minItems": 1, "maxItems": most.MAX_ALLOWED_TOKEN_IDS},
        "stop": {
            "anyOf": [
                {"type": "null"},
                stop,
                {"type": "array", "items": stop, "maxItems": most.MAX_STOP_STRINGS},
            ]
        },
        "stop_token_ids": {**ids, "maxItems": most.MAX_STOP_TOKEN_IDS},
        "include_stop_str_in_output": _nullable("boolean"),
        "include_stop": _nullable("boolean"),
        "ignore_eos": _nullable("boolean"),
        "n": _nullable("integer", minimum=1, maximum=most.MAX_CHOICES),
        "seed": _nullable("integer", minimum=-(2**63), maximum=2**63 - 1),
        "skip_special_tokens": _nullable("boolean"),
        "spaces_between_special_tokens": _nullable("boolean"),
        "prompt_logprobs": _nullable("integer", **top),
        "return_token_ids": _nullable("boolean"),
        "return_tokens_as_token_ids": _nullable("boolean"),
        "truncate_prompt_tokens": _nullable("integer", minimum=1, maximum=2**31 - 1),
        "priority": _nullable("integer", minimum=-1000, maximum=1000),
        "timeout_s": _nullable("number", exclusiveMinimum=0, maximum=1e6),
        "stream": _nullable("boolean"),
        "stream_options": {
            "type": ["object", "null"],
            "properties": {
                "include_usage": _nullable("boolean"),
                "continuous_usage_stats": _nullable("boolean"),
            },
        },
        "user": _nullable("string", maxLength=1000),
    }


def completions(model: str) -> dict[str, Any]:
    """Of POST /v1/completions."""
    text = {"type": "string"}
    ids = {"type": "array", "items": _INT_ID, "minItems": 1}
    fields = {
        "model": _model_field(model),
        "prompt": {
            "anyOf": [
                text,
                {"type": "array", "items": text, "minItems": 1, "maxItems": requests.MAX_PROMPTS},
                ids,
                {"type": "array", "items": ids, "minItems": 1, "maxItems": requests.MAX_PROMPTS},
            ]
        },
        "echo": _nullable("boolean"),
        "add_special_tokens": _nullable("boolean"),
        "logprobs": _nullable("integer", minimum=0, maximum=request_lib.MAX_LOGPROBS),
        **sampling_fields(),
    }
    choice = _object(
        {
            "index": {"type": "integer"},
            "text": text,
            "logprobs": _LOGPROBS_OR_NULL,
            "finish_reason": {"enum": ["stop", "length", "abort", None]},
        },
        ["index", "text", "logprobs", "finish_reason"],
    )
    return _completion_route(fields, ["prompt"], choice)


def chat(model: str) -> dict[str, Any]:
    """Of POST /v1/chat/completions."""
    part = _object({"type": {"const": "text"}, "text": {"type": "string"}}, ["type", "text"])
    message = _object(
        {
            "role": {"enum": ["system", "user", "assistant"]},
            "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": part}]},
        },
        ["role", "content"],
    )
    fields = {
        "model": _model_field(model),
        "messages": {"type": "array", "items": message, "minItems": 1},
        "max_completion_tokens": _nullable("integer", minimum=1, maximum=2**31 - 1),
        "logprobs": _nullable("boolean"),
        "top_logprobs": _nullable("integer", minimum=0, maximum=request_lib.MAX_LOGPROBS),
        "add_generation_prompt": _nullable("boolean"),
        "chat_template_kwargs": _nullable("object"),
        **sampling_fields(),
    }
    choice = _object(
        {
            "index": {"type": "integer"},
            "message": _object(
                {"role": {"const": "assistant"}, "content": _TEXT_OR_NULL}, ["role", "content"]
            ),
            "logprobs": _LOGPROBS_OR_NULL,
            "finish_reason": {"enum": ["stop", "length", "tool_calls", "abort", None]},
        },
        ["index", "message", "logprobs", "finish_reason"],
    )
    return _completion_route(fields, ["messages"], choice)


def _completion_route(fields: Schema, required: list[str], choice: Schema) -> dict[str, Any]:
    found = _object(
        {
            "id": {"type": "string"},
            "object": {"type": "string"},
            "created": {"type": "integer"},
            "model": {"type": "string"},
            "choices": {"type": "array", "items": choice},
            "usage": _USAGE,
        },
        ["id", "object", "created", "model", "choices", "usage"],
    )
    events = {"text/event-stream": {"schema": {"type": "string"}}}
    return _with_body(
        {**_object(fields, required), "additionalProperties": False},
        _answers(found, *_OF_A_BODY, 429, 500, 504, more=events),
    )


def _model_object() -> dict[str, Any]:
    return _object(
        {
            "id": {"type": "string"},
            "object": {"const": "model"},
            "created": {"type": "integer"},
            "owned_by": {"type": "string"},
            "max_model_len": _nullable("integer"),
        },
        ["id", "object", "created", "owned_by"],
    )


def models() -> dict[str, Any]:
    """Of GET /v1/models."""
    data = {"type": "array", "items": _model_object()}
    found = _object({"object": {"const": "list"}, "data": data}, ["object", "data"])
    return {"responses": _answers(found)}


def model() -> dict[str, Any]:
    """Of GET /v1/models/{model}."""
    return {"responses": _answers(_model_object(), 404)}


def tokenize(model: str) -> dict[str, Any]:
    """Of POST /tokenize."""
    fields = {
        "model": _model_field(model),
        "prompt": {"type": "string"},
        "add_special_tokens": _nullable("boolean"),
        "return_token_strs": _nullable("boolean"),
    }
    found = _object(
        {
            "count": {"type": "integer"},
            "max_model_len": {"type": "integer"},
            "tokens": {"type": "array", "items": {"type": "integer"}},
            "token_strs": {"type": "array", "items": _TEXT_OR_NULL},
        },
        ["count", "max_model_len", "tokens"],
    )
    return _with_body(_object(fields, ["prompt"]), _answers(found, *_OF_A_BODY))


def detokenize(model: str) -> dict[str, Any]:
    """Of POST /detokenize."""
    fields = {"model": _model_field(model), "tokens": {"type": "array", "items": _INT_ID}}
    found = _object({"prompt": {"type": "string"}}, ["prompt"])
    return _with_body(_object(fields, ["tokens"]), _answers(found, *_OF_A_BODY))


def health() -> dict[str, Any]:
    """Of GET /health."""
    state = _object({"status": {"enum": ["starting", "ready", "draining"]}}, ["status"])
    found = _answers(state)
    found[503] = {**found[200], "description": _REASONS[503]}
    return {"responses": found}


def version() -> dict[str, Any]:
    """Of GET /version."""
    return {"responses": _answers(_object({"version": {"type": "string"}}, ["version"]))}


def metrics() -> dict[str, Any]:
    """Of GET /metrics."""
    return {"responses": _answers({"type": "string"}, media="text/plain")}


def profile() -> dict[str, Any]:
    """Of POST /start_profile and /stop_profile."""
    return {"responses": _answers(_object({"folder": {"type": "string"}}, ["folder"]), 409)}
