"""Leads what schemathesis makes up past what no schema can say.

A schema knows neither the vocabulary of the model, nor the roles of its template, nor all the
fields that exclude one another: nearly all bodies would be refused for these. Bodies that are
meant to be wrong stay as they are.
"""

import json
from typing import Any

import jsonschema_rs
import schemathesis

_VOCABULARY = 1000  # of the embedded model; it has more
_ROLES = ("system", "user", "assistant")
_FORMS = (
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
)
_PATIENCE_S = 600
_Body = dict[str, Any]


@schemathesis.hook
def before_call(context: Any, case: schemathesis.Case, kwargs: Any) -> None:
    """Makes the body of a request one that is served."""
    if not isinstance(case.body, dict):
        return
    limit = case.body.get("timeout_s")
    if isinstance(limit, int | float) and 0 < limit < _PATIENCE_S:
        case.body["timeout_s"] = _PATIENCE_S  # a limit that has passed is a 504, and meant to be
    if case.meta is not None and case.meta.generation.mode.is_positive:
        case.body = _whole(case.body)
        for amend in (_token_ids, _lengths, _streams, _forms, _chat):
            amend(case.body)


@schemathesis.check
def events_are_as_described(
    context: Any, response: schemathesis.Response, case: schemathesis.Case
) -> None:
    """Holds the data of streamed events against their schema, which is a schema within a schema."""
    media = "text/event-stream"
    if response.status_code != 200 or media not in "".join(
        response.headers.get("content-type", "")
    ):
        return
    told = case.operation.definition.raw["responses"]["200"]["content"][media]["schema"]
    _, written = told["properties"]["data"]["anyOf"]
    events = response.text.split("\n\n")[:-1]  # of a long stream the first ones are kept
    for data in (event.removeprefix("data: ") for event in events):
        if data != "[DONE]":
            jsonschema_rs.validate(written["contentSchema"], json.loads(data))


def _whole(value: Any) -> Any:
    """Numbers like 2.0 as 2: a schema takes the one for the other, and clients do not send it."""
    if isinstance(value, dict):
        return {name: _whole(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _token_ids(body: _Body) -> None:
    for name in ("prompt", "allowed_token_ids", "stop_token_ids", "tokens"):
        body.update({name: _known(body[name])} if name in body else {})
    bias = body.get("logit_bias")
    if bias:
        body["logit_bias"] = {str(int(key) % _VOCABULARY): value for key, value in bias.items()}


def _known(value: Any) -> Any:
    if isinstance(value, list):
        return [_known(item) for item in value]
    return value % _VOCABULARY if isinstance(value, int) else value


def _lengths(body: _Body) -> None:
    most = body.get("max_completion_tokens") or body.get("max_tokens") or 16
    for name in ("max_tokens", "max_completion_tokens"):
        body.update({name: most} if name in body else {})
    body.update({"min_tokens": 0} if (body.get("min_tokens") or 0) > most else {})
    if body.get("best_of"):
        body["best_of"] = body.get("n") or 1


def _streams(body: _Body) -> None:
    if body.get("stream_options") is not None:
        body["stream"] = True
    if body.get("top_logprobs") is not None:
        body["logprobs"] = True


def _forms(body: _Body) -> None:
    """One form of the answer at most, and none beside tools."""
    asked = [name for name in _FORMS if body.get(name) is not None]
    kept = sum(map(len, asked)) % max(1, len(asked))
    for i, name in enumerate(asked):
        if body.get("tools") or i != kept:
            del body[name]
        else:
            body.pop("allowed_token_ids", None)


def _chat(body: _Body) -> None:
    if body.get("continue_final_message"):
        body["add_generation_prompt"] = False
    if not body.get("tools"):
        body.pop("tool_choice", None)
    elif isinstance(body.get("tool_choice"), dict):
        body["tool_choice"] = "required"
    for i, tool in enumerate(body.get("tools") or ()):
        tool["function"]["name"] = f"f{i}"
    for i, message in enumerate(body.get("messages") or ()):
        if message["role"] not in _ROLES:
            message["role"] = _ROLES[i % len(_ROLES)]
        message["content"] = message.get("content") or "hi"
        for call in message.get("tool_calls") or ():
            call["function"]["arguments"] = "{}"
