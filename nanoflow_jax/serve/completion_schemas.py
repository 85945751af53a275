"""What /openapi.json says of the routes of completions and chats."""

from typing import Any

from nanoflow_jax.serve.body_schemas import chat_fields, completion_fields
from nanoflow_jax.serve.schema_parts import (
    ERROR,
    OF_A_BODY,
    TEXT_OR_NULL,
    Schema,
    answers,
    array,
    nullable,
    record,
    with_body,
)

_TEXT = {"type": "string"}
_INT = {"type": "integer"}
_NUMBER = {"type": "number"}
_USAGE = record(
    {
        "prompt_tokens": _INT,
        "completion_tokens": _INT,
        "total_tokens": _INT,
        "prompt_tokens_details": record({"cached_tokens": _INT}),
    }
)


def completions(model: str) -> dict[str, Any]:
    """Of POST /v1/completions."""
    logprobs = record(
        {
            "tokens": array(_TEXT),
            "token_logprobs": array(nullable("number")),
            "top_logprobs": array(nullable("object", additionalProperties=_NUMBER)),
            "text_offset": array(_INT),
        }
    )
    choice = record(
        {
            **_choice_fields(),
            "text": _TEXT,
            "logprobs": _or_null(logprobs),
            **_shown_prompt(),
        },
        ["index", "text", "logprobs", "finish_reason", "stop_reason"],
    )
    answer = _answer("text_completion", choice)
    chunk = _chunk("text_completion", _unfinished(choice))
    return _route(completion_fields(model), "prompt", answer, chunk)


def chat(model: str) -> dict[str, Any]:
    """Of POST /v1/chat/completions."""
    token = {"token": _TEXT, "logprob": _NUMBER, "bytes": nullable("array", items=_INT)}
    entry = record({**token, "top_logprobs": array(record(token))})
    call = {
        "id": _TEXT,
        "type": {"const": "function"},
        "function": record({"name": _TEXT, "arguments": _TEXT}),
    }
    more_of_a_call = record({"index": _INT, "function": record({"arguments": _TEXT})})
    part_of_a_call = {"anyOf": [record({"index": _INT, **call}), more_of_a_call]}
    message = {
        "role": {"const": "assistant"},
        "content": TEXT_OR_NULL,
        "refusal": {"type": "null"},
        "tool_calls": array(record(call), minItems=1),
    }
    delta = {
        "role": {"const": "assistant"},
        "content": _TEXT,
        "tool_calls": array(part_of_a_call, minItems=1),
    }
    both = {
        **_choice_fields("tool_calls"),
        "logprobs": _or_null(record({"content": array(entry), "refusal": {"type": "null"}})),
    }
    choice = record(
        {**both, "message": record(message, ["role", "content", "refusal"])},
        ["index", "message", "logprobs", "finish_reason", "stop_reason"],
    )
    part = record(
        {**both, "delta": record(delta, [])}, ["index", "delta", "logprobs", "finish_reason"]
    )
    shown = _shown_prompt()
    answer = _answer("chat.completion", choice, shown)
    chunk = _chunk("chat.completion.chunk", _unfinished(part), shown)
    return _route(chat_fields(model), "messages", answer, chunk)


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [{"type": "null"}, schema]}


def _head(kind: str, choice: Schema) -> dict[str, Any]:
    return {
        "id": _TEXT,
        "object": {"const": kind},
        "created": _INT,
        "model": _TEXT,
        "choices": array(choice),
    }


def _answer(kind: str, choice: Schema, shown: Schema | None = None) -> Schema:
    head = {**_head(kind, choice), "usage": _USAGE}
    return record({**head, **(shown or {})}, list(head))


def _chunk(kind: str, part: Schema, shown: Schema | None = None) -> Schema:
    head = _head(kind, part)
    return record({**head, "usage": _or_null(_USAGE), **(shown or {})}, list(head))


def _unfinished(choice: Schema) -> Schema:
    """A choice that may have no reason yet why it ended."""
    fields = choice["properties"]
    reasons = {"enum": [*fields["finish_reason"]["enum"], None]}
    return {**choice, "properties": {**fields, "finish_reason": reasons}}


def _route(fields: Schema, required: str, answer: Schema, chunk: Schema) -> dict[str, Any]:
    """Arguments of a route's decorator; an event is told as an object, as in OpenAPI 3.2."""
    told = {"anyOf": [chunk, ERROR]}
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": told}
    event = {
        "type": "object",
        "required": ["data"],
        "properties": {"data": {"anyOf": [{"const": "[DONE]"}, data]}},
    }
    events = {"text/event-stream": {"schema": event}}
    return with_body(
        record(fields, [required]), answers(answer, *OF_A_BODY, 429, 500, 504, more=events)
    )


def _choice_fields(*reasons: str) -> dict[str, Any]:
    return {
        "index": _INT,
        "finish_reason": {"enum": ["stop", "length", "abort", *reasons]},
        "stop_reason": {"type": ["string", "integer", "null"]},
        "token_ids": array(_INT),
    }


def _shown_prompt() -> dict[str, Any]:
    entry = record({"logprob": _NUMBER, "rank": _INT, "decoded_token": _TEXT})
    return {
        "prompt_token_ids": array(_INT),
        "prompt_logprobs": array(nullable("object", additionalProperties=entry)),
    }
