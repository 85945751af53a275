"""Conversations that the golden cases render with their chat templates."""

from typing import Any

Conversation = dict[str, Any]

_WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'The weather now; "unit" is <celsius> or <fahrenheit> & costs nothing.',
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "City, e.g. Z\u00fcrich"},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city"],
        },
    },
}
_CLOCK = {
    "type": "function",
    "function": {
        "name": "get_time",
        "description": "The time in a time zone.",
        "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}},
    },
}
TOOLS = [_WEATHER, _CLOCK]


def _say(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def _ask(*messages: dict[str, Any], prompt: bool = True, **more: Any) -> Conversation:
    return {"messages": list(messages), "add_generation_prompt": prompt, **more}


_SYSTEM = _say("system", "  You answer in one line.\n")
_HELLO = _say("user", " Hello there! ")
_ANSWER = _say("assistant", " Hi, what can I do?\n")
_UNICODE = _say(
    "user",
    "Caf\u00e9 \u2615 \u4f60\u597d \U0001f468\u200d\U0001f469\u200d\U0001f467"
    " & <b>'quoted' \"twice\"</b>\n\tend",
)

SYSTEM = _ask(_SYSTEM, _HELLO)
SINGLE = _ask(_HELLO)
MULTI_TURN = _ask(_HELLO, _ANSWER, _say("user", "Which pages are free?"))
SYSTEM_MULTI_TURN = _ask(_SYSTEM, _HELLO, _ANSWER, _say("user", "Which pages are free?"))
FINISHED = _ask(_HELLO, _ANSWER, prompt=False)
UNICODE = _ask(_UNICODE)
TWO_USERS = _ask(_HELLO, _HELLO)
UNKNOWN_ROLE = _ask(_HELLO, _say("wizard", "Abracadabra"))


def _call(name: str, arguments: dict[str, Any], call_id: str) -> dict[str, Any]:
    return {"type": "function", "id": call_id, "function": {"name": name, "arguments": arguments}}


def _calls(*calls: dict[str, Any], content: str | None = "") -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


_PARIS = _call("get_weather", {"city": "Paris", "unit": "celsius"}, "call00001")
_ZURICH = _call("get_weather", {"city": "Z\u00fcrich"}, "call00002")
_PARIS_RESULT = _say("tool", '{"degrees": 21.5}', tool_call_id="call00001", name="get_weather")
_ZURICH_RESULT = _say("tool", '{"degrees": -3}', tool_call_id="call00002", name="get_weather")
_QUESTION = _say("user", "How warm is it in Paris?")

TOOLS_OFFERED = _ask(_SYSTEM, _QUESTION, tools=TOOLS)
TOOLS_WITHOUT_SYSTEM = _ask(_QUESTION, tools=[_CLOCK])
TOOL_CALLED = _ask(_QUESTION, _calls(_PARIS), _PARIS_RESULT, tools=TOOLS)
TOOL_ANSWERED = _ask(
    _QUESTION,
    _calls(_PARIS),
    _PARIS_RESULT,
    _say("assistant", "It is 21.5 degrees."),
    tools=[_WEATHER],
    prompt=False,
)
TWO_TOOLS_CALLED = _ask(
    _QUESTION, _calls(_PARIS, _ZURICH), _PARIS_RESULT, _ZURICH_RESULT, tools=[_WEATHER]
)
SHORT_CALL_ID = _ask(_QUESTION, _calls(_call("get_time", {}, "short")), tools=[_CLOCK])
THOUGHT = _ask(
    _HELLO,
    _say("assistant", "<think>\nA greeting.\n</think>\n\nHi!"),
    _say("user", "Bye."),
    _say("assistant", "<think>\nA farewell.\n</think>\n\nBye!", reasoning_content="Short."),
    prompt=False,
)
ONLY_TOOL_RESULT = _ask(_say("user", "<tool_response>\n1\n</tool_response>"))


def with_kwargs(conversation: Conversation, **kwargs: Any) -> Conversation:
    """The conversation rendered with further template variables."""
    return {**conversation, "kwargs": kwargs}


def at(conversation: Conversation, now: str) -> Conversation:
    """The conversation rendered while the clock stands at an ISO time."""
    return {**conversation, "now": now}
