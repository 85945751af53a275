"""What /openapi.json says of bodies, beside what is read of them."""

import dataclasses
from typing import Any

import pytest

from nanoflow_jax import request as request_lib
from nanoflow_jax.openai import errors, requests
from nanoflow_jax.openai.requests import Endpoint
from nanoflow_jax.serve import body_schemas
from nanoflow_jax.tokenizer import tool_formats

_BODIES: dict[Endpoint, dict[str, Any]] = {
    Endpoint.COMPLETIONS: {"prompt": "x"},
    Endpoint.CHAT: {"messages": [{"role": "user", "content": "x"}]},
}
_FIELDS = {
    Endpoint.COMPLETIONS: body_schemas.completion_fields("m"),
    Endpoint.CHAT: body_schemas.chat_fields("m"),
}
_STYLE = tool_formats.ToolStyle(format=tool_formats.ToolFormat.HERMES)
# Those that clients of other servers send.
_ELSEWHERE = {"use_beam_search", "best_of", "length_penalty", "chat_template", "documents"}


def _refusal(endpoint: Endpoint, **fields: Any) -> errors.ApiError | None:
    try:
        requests.parse(endpoint, {**_BODIES[endpoint], **fields}, {}, tool_style=_STYLE)
    except errors.ApiError as error:
        return error
    return None


@pytest.mark.parametrize("endpoint", Endpoint)
def test_a_field_is_described_if_and_only_if_it_is_taken(endpoint: Endpoint) -> None:
    names = {field.name for field in dataclasses.fields(request_lib.SamplingParams)}
    names |= _ELSEWHERE.union(*_FIELDS.values()) - _BODIES[endpoint].keys()
    for name in names:
        error = _refusal(endpoint, **{name: None})
        assert (error is None) == (name in _FIELDS[endpoint]), name
        assert error is None or error.code == "unknown_parameter"


def _ends(schema: Any) -> list[tuple[Any, bool]]:
    """Values at the ends of what a schema of one kind allows, and beyond."""
    found = []
    for bound, step in [("minimum", -1), ("maximum", 1)]:
        if bound in schema:
            found += [(schema[bound], True), (schema[bound] + step, False)]
    if "exclusiveMinimum" in schema:
        found.append((schema["exclusiveMinimum"], False))
    if "enum" in schema:
        found += [(value, True) for value in schema["enum"]]
    if "boolean" in schema.get("type", ()):
        found += [(True, True), (False, True), (1, False), ("true", False)]
    if "maxItems" in schema and schema["items"].get("type") == "integer":
        found += [([1] * schema["maxItems"], True), ([1] * (schema["maxItems"] + 1), False)]
    return found


@pytest.mark.parametrize("endpoint", Endpoint)
def test_what_is_described_is_what_is_taken_at_the_ends_of_each_range(endpoint: Endpoint) -> None:
    beside = {
        "top_logprobs": {"logprobs": True},
        "best_of": {"n": 1},
        "min_tokens": {"max_tokens": 2**31 - 1},
    }
    num_checked = 0
    for name, schema in _FIELDS[endpoint].items():
        for value, allowed in _ends(schema):
            if name == "best_of" and allowed:
                beside["best_of"] = {"n": value}
            error = _refusal(endpoint, **{**beside.get(name, {}), name: value})
            assert (error is None) == allowed, (name, value, error)
            num_checked += 1
    assert num_checked > 60


@pytest.mark.parametrize(
    ("endpoint", "fields"),
    [
        (Endpoint.CHAT, {"use_beam_search": 0}),
        (Endpoint.COMPLETIONS, {"best_of": True}),
        (Endpoint.COMPLETIONS, {"structured_outputs": {"json": 0, "regex": "a"}}),
        (Endpoint.COMPLETIONS, {"structured_outputs": {"regex": False, "json": {}}}),
        (Endpoint.CHAT, {"stream": True, "stream_options": {"include_usage": 1}}),
        (
            Endpoint.CHAT,
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": {}, "strict": 0},
                }
            },
        ),
    ],
)
def test_what_only_equals_an_allowed_value_is_refused(
    endpoint: Endpoint, fields: dict[str, Any]
) -> None:
    error = _refusal(endpoint, **fields)
    assert error is not None and error.param in fields
