"""Tools of a body: what is understood and refused, and how calls are written."""

import json
from typing import Any

import pytest

from nanoflow_jax import request as request_lib
from nanoflow_jax.openai import tools
from nanoflow_jax.openai.errors import ApiError
from nanoflow_jax.openai.tool_parser import Arguments, CallStart, Content
from nanoflow_jax.request import FinishReason
from nanoflow_jax.tokenizer.tool_formats import ToolFormat, ToolStyle

_STYLE = ToolStyle(format=ToolFormat.HERMES)


def _tool(name: Any = "f", **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


def _named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def _read(
    offered: Any, choice: Any = None, parallel: bool | None = None, style: Any = _STYLE
) -> tools.Tools | None:
    return tools.read(offered, choice, parallel, style)


def _found(*args: Any, **kwargs: Any) -> tools.Tools:
    found = _read(*args, **kwargs)
    assert found is not None
    return found


@pytest.mark.parametrize("offered", [None, []])
@pytest.mark.parametrize("choice", [None, "none", "auto"])
def test_no_tools_are_nothing(offered: Any, choice: Any) -> None:
    assert _read(offered, choice) is None
    assert _read(offered, choice, style=None) is None


def test_tools_are_hidden_from_a_model_that_may_not_call() -> None:
    assert _read([_tool()], "none") is None


@pytest.mark.parametrize(
    ("choice", "parallel", "forced", "several"),
    [
        (None, None, set(), True),
        ("auto", True, set(), True),
        ("auto", False, set(), False),
        ("required", None, {"f", "g"}, True),
        ("required", False, {"f", "g"}, False),
        (_named("g"), True, {"g"}, False),
    ],
)
def test_choices_say_what_must_be_called(
    choice: Any, parallel: bool | None, forced: set[str], several: bool
) -> None:
    found = _found([_tool("f"), _tool("g")], choice, parallel)
    assert (found.forced, found.several) == (forced, several)


def test_a_template_gets_the_tools_without_nulls() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "null"}}}
    offered = [_tool("f", description="d", parameters=schema, strict=None)]
    found = _found(offered)
    assert found.shown == [_tool("f", description="d", parameters=schema)]
    assert found.schemas == {"f": schema}
    assert offered[0]["function"]["strict"] is None


def _deep(levels: int) -> Any:
    value: Any = {}
    for _ in range(levels):
        value = {"a": [value]}
    return value


_OF_OBJECT = "is not a JSON schema of an object"


@pytest.mark.parametrize(
    ("offered", "message"),
    [
        ("x", "tools='x' is not a list of functions"),
        ({"a": 1}, "tools={'a': 1} is not a list of functions"),
        ([_tool(f"f{i}") for i in range(129)], "tools has 129 entries; at most 128 are taken"),
        ([_tool(parameters=_deep(40))], "tools is nested deeper than 64 levels"),
        ([_tool(parameters=_deep(20_000))], "tools is nested deeper than 64 levels"),
        ([_tool(description="x" * 262_144)], "tools has 26.... bytes; at most 262144 are taken"),
        ([_tool(parameters={"a": float("nan")})], "tools holds what JSON cannot say"),
        ([_tool(description="\ud800")], "tools holds what JSON cannot say"),
        ([7], r"tools\[0\]=7 is not {\"type\": \"function\""),
        ([_tool(), {"type": "custom"}], r"tools\[1\]={'type': 'custom'} is not"),
        ([{"type": "function"}], r"tools\[0\]: function=None is not an object with a name"),
        ([_tool(None)], r"tools\[0\]: name=None is not 1 to 64 letters"),
        ([_tool("")], "name='' is not 1 to 64 letters"),
        ([_tool("x" * 65)], "is not 1 to 64 letters"),
        ([_tool("a b")], "name='a b' is not 1 to 64 letters"),
        ([_tool("a\n")], r"name='a\\n' is not 1 to 64 letters"),
        ([_tool(), _tool()], r"tools\[1\]: a function 'f' was offered before"),
        ([_tool(description=1)], "description=1 is not text"),
        ([_tool(strict="yes")], "strict='yes' is not true or false"),
        ([_tool(parameters=[])], rf"parameters=\[\] {_OF_OBJECT}"),
        ([_tool(parameters={"type": "array"})], rf"parameters={{'type': 'array'}} {_OF_OBJECT}"),
        ([_tool(parameters={"type": ["object"]})], _OF_OBJECT),
    ],
)
def test_wrong_tools_are_refused(offered: Any, message: str) -> None:
    with pytest.raises(ApiError, match=message) as refused:
        _read(offered)
    assert (refused.value.param, refused.value.status_code) == ("tools", 400)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    ("offered", "choice", "message"),
    [
        (None, "required", "tool_choice='required' needs tools beside it"),
        ([], _named("f"), "needs tools beside it"),
        ([_tool()], "any", 'tool_choice=\'any\' is not "none", "auto", "required" or'),
        ([_tool()], 3, "tool_choice=3 is not"),
        ([_tool()], {"type": "function"}, "tool_choice={'type': 'function'} is not"),
        ([_tool()], {"type": "allowed_tools"}, 'is not "none"'),
        ([_tool()], _deep(20_000), 'is not "none"'),
        ([_tool()], _named("g"), "tool_choice names 'g', which is not among tools"),
    ],
)
def test_a_wrong_choice_is_refused(offered: Any, choice: Any, message: str) -> None:
    with pytest.raises(ApiError, match=message) as refused:
        _read(offered, choice)
    assert refused.value.param == "tool_choice"


def test_a_model_without_a_form_for_calls_must_be_forced() -> None:
    style = ToolStyle(format=ToolFormat.HERMES, is_native=False)
    assert _found([_tool()], "required", style=style).forced
    with pytest.raises(ApiError, match="has no form for calls of tools") as refused:
        _read([_tool()], "auto", style=style)
    assert refused.value.param == "tool_choice"


def test_tools_are_refused_where_nobody_knows_the_model() -> None:
    with pytest.raises(ApiError, match="tools is not supported yet"):
        _read([_tool()], "required", style=None)


def test_only_forced_calls_have_a_grammar() -> None:
    params = request_lib.SamplingParams(temperature=0.5)
    assert _found([_tool()]).constrain(params) == params
    forced = _found([_tool("f"), _tool("g")], _named("g")).constrain(params)
    assert forced.temperature == 0.5
    assert forced.grammar is not None
    assert forced.grammar.kind is request_lib.GrammarKind.LARK
    assert '\\"g\\"' in forced.grammar.text
    assert '\\"f\\"' not in forced.grammar.text


def test_special_markers_stay_in_the_text() -> None:
    params = request_lib.SamplingParams()
    style = ToolStyle(format=ToolFormat.MISTRAL, special=frozenset({"[TOOL_CALLS]"}))
    assert not _found([_tool()], style=style).constrain(params).skip_special_tokens
    assert _found([_tool()]).constrain(params).skip_special_tokens


def test_tools_and_another_form_of_the_answer_exclude_each_other() -> None:
    grammar = request_lib.Grammar(kind=request_lib.GrammarKind.REGEX, text="a")
    params = request_lib.SamplingParams(grammar=grammar)
    with pytest.raises(ApiError, match="tools cannot be offered together with a form") as refused:
        _found([_tool()]).constrain(params)
    assert refused.value.param == "tools"


def test_schemas_that_make_too_long_a_grammar_are_refused() -> None:
    schema = {"type": "object", "description": "x" * 70_000}
    offered = _found([_tool(parameters=schema)], "required")
    with pytest.raises(ApiError, match=r"make a grammar of 70\d{3} characters; at most 65536"):
        offered.constrain(request_lib.SamplingParams())
    assert _found([_tool(parameters=schema)]).constrain(request_lib.SamplingParams())


def test_ids_depend_on_answer_choice_and_index_alone() -> None:
    assert tools.call_id("a", 0, 0) == tools.call_id("a", 0, 0)
    ids = {tools.call_id(r, c, i) for r in ("a", "b") for c in (0, 1) for i in (0, 1, 11)}
    assert len(ids) == 12
    assert all(len(i) == 29 and i.startswith("call_") and i.isascii() for i in ids)


def test_pieces_are_written_as_openais_deltas() -> None:
    assert tools.delta(Content(text="a")) == {"content": "a"}
    assert tools.delta(CallStart(index=1, call_id="i", name="f")) == {
        "tool_calls": [
            {
                "index": 1,
                "id": "i",
                "type": "function",
                "function": {"name": "f", "arguments": ""},
            }
        ]
    }
    assert tools.delta(Arguments(index=1, text="{")) == {
        "tool_calls": [{"index": 1, "function": {"arguments": "{"}}]
    }


def test_a_message_with_calls_alone_has_no_content() -> None:
    found = _found([_tool("f")])
    text = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    call = {
        "id": tools.call_id("r", 2, 0),
        "type": "function",
        "function": {"name": "f", "arguments": '{"a": 1}'},
    }
    wanted = {"content": None, "tool_calls": [call]}
    assert tools.message_fields(found, text, "r", 2) == wanted
    assert tools.message_fields(found, "So: " + text, "r", 2) == {**wanted, "content": "So:"}
    assert tools.message_fields(found, "No.", "r", 2) == {"content": "No."}


def test_one_call_is_kept_where_calls_may_not_be_parallel() -> None:
    text = '<tool_call>{"name": "f", "arguments": {}}</tool_call>' * 2
    assert len(tools.message_fields(_found([_tool()]), text, "r", 0)["tool_calls"]) == 2
    found = _found([_tool()], "auto", False)
    assert len(tools.message_fields(found, text, "r", 0)["tool_calls"]) == 1


@pytest.mark.parametrize(
    ("reason", "has_calls", "wanted"),
    [
        (FinishReason.STOP, True, "tool_calls"),
        (FinishReason.STOP, False, "stop"),
        (FinishReason.LENGTH, True, "length"),
        (FinishReason.ABORT, True, "abort"),
    ],
)
def test_an_answer_that_ends_with_calls_says_so(
    reason: FinishReason, has_calls: bool, wanted: str
) -> None:
    assert tools.finish_reason(reason, has_calls=has_calls) == wanted


def test_grammars_hold_the_schemas_that_were_offered() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    params = request_lib.SamplingParams()
    grammar = _found([_tool(parameters=schema)], "required").constrain(params).grammar
    assert grammar is not None
    line = next(x for x in grammar.text.splitlines() if x.startswith("arguments_0: %json "))
    assert json.loads(line.removeprefix("arguments_0: %json "))["properties"] == {
        "a": {"type": "integer"}
    }
