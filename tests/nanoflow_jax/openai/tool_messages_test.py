"""Messages about tools on their way to a chat template."""

import copy
import datetime
import json
from typing import Any

import pytest
from golden import cases

from nanoflow_jax.openai import tool_messages
from nanoflow_jax.openai.errors import ApiError
from nanoflow_jax.tokenizer.chat_template import ChatTemplate
from nanoflow_jax.tokenizer.tool_formats import ToolFormat, ToolStyle

_HERMES = ToolStyle(format=ToolFormat.HERMES)
_MISTRAL = ToolStyle(format=ToolFormat.MISTRAL)
_LONG = "call_0123456789abcdef01234567"


def _call(arguments: Any = "{}", **more: Any) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    return {"id": _LONG, "type": "function", "function": function, **more}


def _assistant(*calls: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(calls)}


def _prepared(message: Any, style: ToolStyle | None = _HERMES) -> Any:
    given = copy.deepcopy(message)
    (found,) = tool_messages.prepare([message], style)
    assert message == given
    return found


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ('{"a": [1, "b"]}', {"a": [1, "b"]}),
        ({"a": 1}, {"a": 1}),
        ("", {}),
        (None, {}),
        ("{}", {}),
    ],
)
def test_arguments_become_objects(arguments: Any, wanted: Any) -> None:
    found = _prepared(_assistant(_call(arguments)))
    assert found == _assistant(_call(wanted))


@pytest.mark.parametrize("message", [{"role": "user", "content": "x"}, "x", None, 7])
def test_other_messages_are_left_alone(message: Any) -> None:
    assert _prepared(message) == message


@pytest.mark.parametrize("calls", [None, []])
def test_a_message_without_calls_has_no_key_for_them(calls: Any) -> None:
    message = {"role": "assistant", "content": "x", "tool_calls": calls}
    assert _prepared(message) == {"role": "assistant", "content": "x"}


def test_mistral_gets_ids_of_nine_characters_that_still_match() -> None:
    result = {"role": "tool", "content": "1", "tool_call_id": _LONG}
    called, answered = tool_messages.prepare([_assistant(_call()), result], _MISTRAL)
    new = called["tool_calls"][0]["id"]
    assert new == answered["tool_call_id"]
    assert len(new) == 9 and new.isalnum()
    short = _call(id="abc45678X")
    assert _prepared(_assistant(short), _MISTRAL)["tool_calls"][0]["id"] == "abc45678X"
    for style in (_HERMES, None):
        assert _prepared(result, style) == result


_AT = r"messages\[0\].tool_calls\[0\]"


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        (_assistant(_call("{")), rf"{_AT}.function.arguments is not JSON \(.*\); it must be"),
        (_assistant(_call("NaN")), "arguments is not JSON \\(NaN is no number in JSON\\)"),
        (_assistant(_call("[" * 100_000)), "arguments is not JSON"),
        (_assistant(_call("[1]")), rf"{_AT}.function.arguments=\[1\] is not a JSON object"),
        (_assistant(_call(7)), "arguments=7 is not a JSON object"),
        (_assistant(_call('{"a":' * 70 + "1" + "}" * 70)), "arguments is nested deeper than 64"),
        (_assistant(_call(id=3)), rf"{_AT}.id=3 is not text"),
        (_assistant(7), f"{_AT} is not an object with a function that has a name"),
        (_assistant({"function": 1}), "is not an object with a function that has a name"),
        (_assistant({"function": {"name": 1}}), "is not an object with a function"),
        (_assistant(*[_call()] * 129), r"messages\[0\].tool_calls is not a list of at most 128"),
        ({"role": "assistant", "tool_calls": "x"}, "tool_calls is not a list of at most 128 calls"),
        ({"role": "tool", "tool_call_id": [1]}, r"messages\[0\].tool_call_id=\[1\] is not text"),
    ],
)
def test_malformed_calls_are_refused(message: Any, wanted: str) -> None:
    with pytest.raises(ApiError, match=wanted) as refused:
        tool_messages.prepare([message], _HERMES)
    assert (refused.value.param, refused.value.status_code) == ("messages", 400)
    assert len(str(refused.value)) < 300


def _as_clients_write_it(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The arguments of calls as text."""
    written = copy.deepcopy(messages)
    for message in written:
        for call in message.get("tool_calls", []):
            arguments = call["function"]["arguments"]
            call["function"]["arguments"] = json.dumps(arguments, ensure_ascii=False)
    return written


@pytest.mark.parametrize("name", ["llama3", "qwen3", "mistral"])
def test_conversations_in_openais_form_render_as_in_transformers(name: str) -> None:
    golden = cases.load(name)
    now = datetime.datetime(2026, 1, 1)
    template = ChatTemplate.load(golden.path, clock=lambda: now)
    num_calls = 0
    for row in golden.chat:
        if not row.get("tools") or "error" in row or "now" in row:
            continue
        messages = tool_messages.prepare(_as_clients_write_it(row["messages"]), _HERMES)
        num_calls += sum(len(m.get("tool_calls", [])) for m in messages)
        text = template.render(
            messages,
            tools=row["tools"],
            add_generation_prompt=row["add_generation_prompt"],
            kwargs=row.get("kwargs", {}),
        )
        assert text == row["rendered"]
    template.close()
    assert num_calls


def test_our_own_ids_render_in_mistrals_template() -> None:
    golden = cases.load("mistral")
    messages = [
        {"role": "user", "content": "x"},
        _assistant(_call()),
        {"role": "tool", "content": "1", "tool_call_id": _LONG},
    ]
    template = ChatTemplate.load(golden.path)
    with pytest.raises(ValueError, match="length 9"):
        template.render(tool_messages.prepare(messages, _HERMES))
    text = template.render(tool_messages.prepare(messages, _MISTRAL))
    template.close()
    assert text.count(tool_messages.prepare(messages, _MISTRAL)[2]["tool_call_id"]) == 2


def test_more_messages_parts_and_calls_than_can_be_looked_at_soon_are_refused() -> None:
    part = {"type": "text", "text": "a"}
    messages = [{"role": "user", "content": [part] * 4096}] * 2
    with pytest.raises(ApiError, match="are 8194; at most 8192 are taken"):
        tool_messages.prepare(messages, None)
    assert tool_messages.prepare([{"role": "user", "content": "a"}] * 8192, None)
