"""Texts of models taken apart into content and calls."""

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoflow_jax.openai.tool_parser import Arguments, CallStart, Content, Piece, ToolParser
from nanoflow_jax.tokenizer.tool_formats import ToolFormat

_NAMES = ("get_weather", "get", "t-1")


def _parser(tool_format: ToolFormat, max_calls: int | None = None) -> ToolParser:
    return ToolParser(tool_format, _NAMES, call_id=lambda index: f"id{index}", max_calls=max_calls)


def _parse(
    tool_format: ToolFormat, chunks: list[str], max_calls: int | None = None
) -> tuple[str, list[tuple[str, str]]]:
    """Content, and names with arguments of calls."""
    parser = _parser(tool_format, max_calls)
    pieces: list[Piece] = list(itertools.chain.from_iterable(map(parser.push, chunks)))
    pieces += parser.finish()
    content = ""
    calls: list[tuple[str, str]] = []
    for piece in pieces:
        match piece:
            case Content():
                assert piece.text
                content += piece.text
            case CallStart():
                assert (piece.index, piece.call_id) == (len(calls), f"id{len(calls)}")
                calls.append((piece.name, ""))
            case Arguments():
                assert piece.text
                assert piece.index == len(calls) - 1
                calls[-1] = (calls[-1][0], calls[-1][1] + piece.text)
    assert parser.num_calls == len(calls)
    return content, calls


_H, _L, _M = ToolFormat.HERMES, ToolFormat.LLAMA3, ToolFormat.MISTRAL
_PARIS = '{"city": "Paris", "n": [1, {"a": "}]<"}]}'
_PLAIN = [
    # Hermes
    (_H, f'<tool_call>\n{{"name": "get", "arguments": {_PARIS}}}\n</tool_call>', "", [_PARIS]),
    (
        _H,
        'Let me look.\n\n<tool_call>\n{"name": "get", "arguments": {}}\n</tool_call>\n'
        '<tool_call>\n{"name": "get", "arguments": {"a": 1}}\n</tool_call>\n',
        "Let me look.",
        ["{}", '{"a": 1}'],
    ),
    (_H, '<tool_call>{"arguments": {"a": 1}, "name": "get"}</tool_call>', "", ['{"a": 1}']),
    (_H, '<tool_call>{"name": "get", "arguments": {}}', "", ["{}"]),
    (_H, '<tool_call>{"name": "get", "arguments": {}}</tool_c', "", ["{}"]),
    (_H, '<tool_call>{"name": "get", "arguments": {}}</tool_call> so', " so", ["{}"]),
    (_H, '<tool_call>{"name": "get"}</tool_call>', "", ["{}"]),
    (_H, '<tool_call>{"id": 7, "name": "get", "arguments": {}}</tool_call>', "", ["{}"]),
    (_H, '<tool_call>{"type": {"a": ["]"]}, "name": "get"}</tool_call>', "", ["{}"]),
    (_H, '<tool_call>{"name": "get", "arguments": "{\\"a\\": 1}"}</tool_call>', "", ['{"a": 1}']),
    (_H, '<tool_call>{"name": "get", "arguments": null}</tool_call>', "", ["null"]),
    (_H, '<tool_call>{"name": "get", "arguments": [1, 2] }</tool_call>', "", ["[1, 2]"]),
    (_H, '<tool_call>{"name": "get", "arguments": 12', "", ["12"]),
    # Llama 3
    (_L, f'{{"name": "get", "parameters": {_PARIS}}}', "", [_PARIS]),
    (_L, '\n <|python_tag|>{"name": "get", "parameters": {}}', "", ["{}"]),
    (_L, 'Sure: <|python_tag|>{"name": "get", "arguments": {}}', "Sure:", ["{}"]),
    (
        _L,
        '{"name": "get", "parameters": {}}; {"name": "get", "parameters": {"a": 1}}\n'
        '{"name": "get", "parameters": {}}',
        "",
        ["{}", '{"a": 1}', "{}"],
    ),
    (_L, '{"type": "function", "name": "get", "parameters": {}}', "", ["{}"]),
    # Mistral
    (_M, f'[TOOL_CALLS] [{{"name": "get", "arguments": {_PARIS}}}]', "", [_PARIS]),
    (
        _M,
        'Wait. [TOOL_CALLS][{"name": "get", "arguments": {}, "id": "abcdefghi"}, '
        '{"name": "get", "arguments": {"a": 1}}]',
        "Wait.",
        ["{}", '{"a": 1}'],
    ),
    (_M, '[TOOL_CALLS]get[ARGS]{"a": [1]}[TOOL_CALLS]get[ARGS]{}', "", ['{"a": [1]}', "{}"]),
    (_M, '[TOOL_CALLS]get[CALL_ID]abcdefghi[ARGS]{"a": {}}', "", ['{"a": {}}']),
    (_M, '[TOOL_CALLS] get {"a": "{"}', "", ['{"a": "{"}']),
]


@pytest.mark.parametrize(("tool_format", "text", "content", "arguments"), _PLAIN)
def test_calls_are_found(
    tool_format: ToolFormat, text: str, content: str, arguments: list[str]
) -> None:
    assert _parse(tool_format, [text]) == (content, [("get", a) for a in arguments])


@pytest.mark.parametrize(
    ("tool_format", "text"),
    [
        (_H, ""),
        (_H, "  \n"),
        (_H, 'a < b, [1] {"name": "get", "arguments": {}} \n'),
        (_H, "ends in <tool_"),
        (_H, "<tool_call>"),
        (_H, "<tool_call>\nget(1)\n</tool_call>\n"),
        (_H, '<tool_call>\n{"name": "other", "arguments": {}}\n</tool_call>'),
        (_H, '<tool_call>{"arguments": {"a": 1}, "name": "other"}</tool_call>'),
        (_H, '<tool_call>{"name": 3, "arguments": {}}</tool_call>'),
        (_H, '<tool_call>{"name": "ge'),
        (_H, '<tool_call>{"arguments": {}}</tool_call>'),
        (_H, '<tool_call>{"na\\x": 1}</tool_call>'),
        (_H, '<tool_call>{"arguments": {"a": <b>}}'),
        (_H, "</tool_call>"),
        (_L, '{"answer": 3, "name": "get", "parameters": {}}'),
        (_L, '{"name": "other", "parameters": {}}'),
        (_L, 'Use {"name": "get", "parameters": {}}'),
        (_L, '<|python_tag|>brave_search.call(query="x")'),
        (_M, '[{"name": "get", "arguments": {}}]'),
        (_M, "[TOOL_CALLS] []"),
        (_M, "[TOOL_CALLS]other[ARGS]{}"),
        (_M, "[TOOL_CALLS]get[ARGS]"),
        (_M, "[TOOL_CALLS](get){}"),
    ],
)
def test_what_is_no_call_is_content_as_it_stands(tool_format: ToolFormat, text: str) -> None:
    assert _parse(tool_format, [text]) == (text, [])


@pytest.mark.parametrize(
    ("tool_format", "text", "content", "arguments"),
    [
        # No end of the object: a < outside of text says that the model gave up.
        (_H, '<tool_call>{"name": "get", "arguments": {"a": 1</tool_call> x', " x", ['{"a": 1']),
        # Cut off.
        (_H, '<tool_call>{"name": "get", "arguments": {"a": "Par', "", ['{"a": "Par']),
        (_H, '<tool_call>{"name": "get", "arguments": "{\\"a', "", ['"{\\"a']),
        # Text that is no JSON, or half a character.
        (_H, '<tool_call>{"name": "get", "arguments": "\\x"}', "", ['"\\x"']),
        (_H, '<tool_call>{"name": "get", "arguments": "\\ud800"}', "", ['"\\ud800"']),
        # Junk after the arguments.
        (_H, '<tool_call>{"name": "get", "arguments": {} oops}', "oops}", ["{}"]),
        (_M, '[TOOL_CALLS][{"name": "get", "arguments": {}}, 7]', ", 7]", ["{}"]),
        (_L, '{"name": "get", "parameters": {]}', "", ["{]"]),
    ],
)
def test_broken_calls_keep_what_was_said(
    tool_format: ToolFormat, text: str, content: str, arguments: list[str]
) -> None:
    found = _parse(tool_format, [text])
    assert found == (content, [("get", a) for a in arguments])


def test_a_call_after_one_that_failed_is_found() -> None:
    text = '<tool_call>no <tool_call>{"name": "t-1", "arguments": {}}</tool_call>'
    assert _parse(_H, [text]) == ("<tool_call>no", [("t-1", "{}")])


def test_names_that_begin_alike_are_told_apart() -> None:
    text = '<tool_call>{"name": "get_weather", "arguments": {}}</tool_call>'
    assert _parse(_H, [text]) == ("", [("get_weather", "{}")])


def test_calls_past_the_limit_are_dropped() -> None:
    text = "".join(f'[TOOL_CALLS]get[ARGS]{{"a": {i}}}' for i in range(3)) + " end"
    assert _parse(_M, [text], 1) == (" end", [("get", '{"a": 0}')])


def test_pieces_come_as_early_as_they_are_certain() -> None:
    parser = _parser(_H)
    assert parser.push("Hi \n<to") == [Content(text="Hi")]
    assert parser.push('ol_call>\n{"name": "get", "arg') == []
    start = CallStart(index=0, call_id="id0", name="get")
    assert parser.push('uments": {"ci') == [start, Arguments(index=0, text='{"ci')]
    assert parser.push('ty": "Paris"}') == [Arguments(index=0, text='ty": "Paris"}')]
    assert parser.push("}\n</tool_call>") == []
    assert parser.finish() == []


_JSON = st.recursive(
    st.sampled_from(["1", "null", '"x"', '"</tool_call>"', '"\\"}"', "-1.5e3"]),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda xs: "[" + ", ".join(xs) + "]"),
        st.lists(inner, max_size=3).map(
            lambda xs: "{" + ", ".join(f'"k{i}": {x}' for i, x in enumerate(xs)) + "}"
        ),
    ),
    max_leaves=6,
)
_BITS = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
        *('{"name": "get"', ', "arguments": {', '"parameters": ', '"name"', ": ", "}", "{", "]"),
        *("[", "]", ",", ";", '"', "\\", "\n", " ", "<", "é", "get", "t-1", "\\ud83d", "x", "0"),
    ]
)
_TEXTS = st.one_of(
    st.lists(_BITS | _JSON, max_size=14).map("".join),
    st.text(max_size=30),
    st.sampled_from([text for _, text, _, _ in _PLAIN]),
)


@given(st.sampled_from(ToolFormat), _TEXTS, st.lists(st.integers(0, 60), max_size=8))
def test_any_split_gives_the_same(tool_format: ToolFormat, text: str, cuts: list[int]) -> None:
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    chunks = [text[a:b] for a, b in itertools.pairwise(bounds)]
    whole = _parse(tool_format, [text])
    assert _parse(tool_format, chunks) == whole
    assert _parse(tool_format, list(text)) == whole


@given(st.sampled_from(ToolFormat), _TEXTS)
def test_a_text_without_calls_is_its_own_content(tool_format: ToolFormat, text: str) -> None:
    content, calls = _parse(tool_format, [text])
    assert calls or content == text


@given(_JSON, _JSON)
def test_arguments_of_any_kind_come_as_they_stand(first: str, second: str) -> None:
    objects = [f'{{"a": {first}}}', f'{{"b": {second}}}']
    calls = [("get", o) for o in objects]
    hermes = [f'<tool_call>\n{{"name": "get", "arguments": {o}}}\n</tool_call>' for o in objects]
    assert _parse(_H, ["\n".join(hermes)]) == ("", calls)
    listed = ", ".join(f'{{"name": "get", "arguments": {o}}}' for o in objects)
    assert _parse(_M, [f"[TOOL_CALLS] [{listed}]"]) == ("", calls)
    assert _parse(_M, ["".join(f"[TOOL_CALLS]get[ARGS]{o}" for o in objects)]) == ("", calls)


@pytest.mark.parametrize(
    "unit",
    [
        *(" ", "<", "<tool_call>", '<tool_call>{"name": ', '<tool_call>{"', "[TOOL_CALLS]", "{"),
        *('<tool_call>{"arguments": {', "[TOOL_CALLS]get", "\\", '"'),
    ],
)
@pytest.mark.parametrize("tool_format", [_H, _L, _M])
def test_work_grows_with_the_text_and_no_faster(tool_format: ToolFormat, unit: str) -> None:
    text = unit * (20_000 // len(unit))
    began = time.process_time()
    _parse(tool_format, list(text))
    # Well below 1 s; were the work to grow with the square, it would be minutes.
    assert time.process_time() - began < 10
