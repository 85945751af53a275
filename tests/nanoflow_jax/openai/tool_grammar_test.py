"""Grammars of calls, walked with llguidance over several kinds of vocabulary."""

import json
import pathlib
import random
from typing import Any

import llguidance
import pytest
from golden import tiny_tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

import checkpoints
from nanoflow_jax.openai import tool_grammar
from nanoflow_jax.openai.tools import Tools, message_fields
from nanoflow_jax.tokenizer import tokenizer
from nanoflow_jax.tokenizer.tool_formats import ToolFormat, ToolStyle

_EMBEDDED = pathlib.Path(checkpoints.__file__).parent / "embedded"
_CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
_SCHEMAS: dict[str, dict[str, Any]] = {
    "get": {"type": "object", "properties": {}, "additionalProperties": False},
    "get_weather": _CITY,
    "by-ref": {
        "$ref": "#/$defs/a",
        "$defs": {"a": {"properties": {"q": {"const": 1}}, "additionalProperties": False}},
    },
}
_WEATHER = '{"city": "Paris", "days": 3}'


def _words(kind: str) -> tuple[tokenizer.Tokenizer, llguidance.LLTokenizer]:
    if kind == "literal":  # no marker is a token
        words = tokenizer.Tokenizer.load(_EMBEDDED)
        text = (_EMBEDDED / "tokenizer.json").read_text(encoding="utf-8")
        return words, llguidance.LLTokenizer(text, eos_token=words.eos_id)
    hermes = ("<tool_call>", "</tool_call>")
    others = ("<|python_tag|>", "[TOOL_CALLS]", "[ARGS]")
    spec = tiny_tokenizers.TokenizerSpec(
        kind="byte_level",
        special=("<eos>", *others, *(hermes if kind == "special" else ())),
        plain=hermes if kind == "plain" else (),
        vocab_size=400,
    )
    backend = tiny_tokenizers.build(spec)
    words = tokenizer.Tokenizer(backend, named={"eos_token": "<eos>"})
    return words, llguidance.LLTokenizer(backend.to_str(), eos_token=words.eos_id)


class _Walk:
    """A model that writes what it is told, as far as the grammar lets it."""

    def __init__(self, kind: str, tool_format: ToolFormat, *, several: bool) -> None:
        self.words, self._tokens = _words(kind)
        self.style = ToolStyle.of_model({}, self.words, chosen=tool_format)
        found = tool_grammar.build(self.style, _SCHEMAS, several=several)
        self._grammar = llguidance.LLMatcher.grammar_from_lark(found.text)
        assert llguidance.LLMatcher.validate_grammar(self._grammar, self._tokens) == ""

    def takes(self, text: str) -> bool:
        """Whether the whole text is allowed and may end there."""
        matcher = llguidance.LLMatcher(self._tokens, self._grammar)
        ids = self.words.encode(text, add_special_tokens=False)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    def write(self, choose: Any) -> str:
        """The text of a model that chooses among the tokens that are allowed."""
        matcher = llguidance.LLMatcher(self._tokens, self._grammar)
        ids: list[int] = []
        while not matcher.is_stopped():
            mask = matcher.compute_bitmask()
            allowed = [i for i in range(self._tokens.vocab_size) if mask[i // 8] >> i % 8 & 1]
            token = choose(matcher.is_accepting(), allowed, self.words)
            if token == self.words.eos_id:
                break
            ids.append(token)
            assert matcher.consume_token(token)
        skip = not self.style.needs_special_tokens
        return self.words.decode(ids, skip_special_tokens=skip)


def _hermes(*calls: tuple[str, str]) -> str:
    return "\n".join(
        f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
        for name, arguments in calls
    )


def _llama3(*calls: tuple[str, str]) -> str:
    return "; ".join(f'{{"name": "{n}", "parameters": {a}}}' for n, a in calls)


def _mistral(*calls: tuple[str, str]) -> str:
    return (
        "[TOOL_CALLS][" + ", ".join(f'{{"name": "{n}", "arguments": {a}}}' for n, a in calls) + "]"
    )


def _mistral_args(*calls: tuple[str, str]) -> str:
    return "".join(f"[TOOL_CALLS]{n}[ARGS]{a}" for n, a in calls)


_WRITERS = {
    ToolFormat.HERMES: _hermes,
    ToolFormat.LLAMA3: _llama3,
    ToolFormat.MISTRAL: _mistral,
    ToolFormat.MISTRAL_ARGS: _mistral_args,
}
_ONE = ("get_weather", _WEATHER)


@pytest.mark.parametrize("kind", ["literal", "plain", "special"])
@pytest.mark.parametrize("tool_format", ToolFormat)
def test_calls_in_the_models_form_are_all_that_is_allowed(
    kind: str, tool_format: ToolFormat
) -> None:
    write = _WRITERS[tool_format]
    one = _Walk(kind, tool_format, several=False)
    assert one.takes(write(_ONE))
    assert one.takes(write(("get", "{}")))
    assert one.takes(write(("by-ref", '{"q": 1}')))
    assert not one.takes(write(_ONE, _ONE))
    more = _Walk(kind, tool_format, several=True)
    assert more.takes(write(_ONE))
    assert more.takes(write(_ONE, ("get", "{}"), _ONE)) == (tool_format is not ToolFormat.LLAMA3)
    for walk in (one, more):
        assert not walk.takes("")
        assert not walk.takes("Hello")
        assert not walk.takes(" " + write(_ONE))
        assert not walk.takes(write(_ONE)[:-1])
        assert not walk.takes(write(("other", "{}")))
        assert not walk.takes(write(("get", '{"a": 1}')))
        assert not walk.takes(write(("get_weather", "{}")))
        assert not walk.takes(write(("get_weather", '{"city":\n "Paris"}')))
        assert not walk.takes(write(("by-ref", '{"q": 2}')))


def test_mistral_may_put_a_space_before_its_list() -> None:
    walk = _Walk("special", ToolFormat.MISTRAL, several=False)
    assert walk.takes(_mistral(_ONE).replace("][", "] ["))


def test_calls_of_one_answer_are_bounded() -> None:
    walk = _Walk("special", ToolFormat.MISTRAL_ARGS, several=True)
    calls = [("get", "{}")] * tool_grammar.MAX_CALLS
    assert walk.takes(_mistral_args(*calls))
    assert not walk.takes(_mistral_args(*calls, ("get", "{}")))


def test_a_marker_that_is_a_token_has_no_other_spelling() -> None:
    words, tokens = _words("plain")
    style = ToolStyle.of_model({}, words, chosen=ToolFormat.HERMES)
    grammar = tool_grammar.build(style, _SCHEMAS, several=False)
    matcher = llguidance.LLMatcher(tokens, llguidance.LLMatcher.grammar_from_lark(grammar.text))
    assert matcher.validate_tokens([words.token_to_id("<tool_call>")]) == 1
    assert matcher.validate_tokens([words.token_to_id("<")]) == 0


def test_schemas_of_any_text_stay_in_their_place() -> None:
    schema = {
        "type": "object",
        "properties": {'a"}\n b: "x" // # \u2028': {"const": 'e"}\n\\ start: "y" %json'}},
        "x-guidance": {"whitespace_flexible": True},
    }
    style = ToolStyle(format=ToolFormat.LLAMA3)
    grammar = tool_grammar.build(style, {"f": schema}, several=False)
    _, tokens = _words("literal")
    lark = llguidance.LLMatcher.grammar_from_lark(grammar.text)
    assert llguidance.LLMatcher.validate_grammar(lark, tokens) == ""
    assert grammar.text.count("\n") == 5


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 2**32))
@pytest.mark.parametrize("kind", ["literal", "special"])
@pytest.mark.parametrize("tool_format", ToolFormat)
def test_whatever_a_model_writes_under_the_grammar_is_read_as_calls(
    kind: str, tool_format: ToolFormat, seed: int
) -> None:
    """The whole way: a model that draws tokens, its text, the calls of the message."""
    draw = random.Random(seed)

    def choose(accepting: bool, allowed: list[int], words: tokenizer.Tokenizer) -> int:
        if accepting and draw.random() < 0.5:
            return words.eos_id or 0
        # A quote or digit soon ends what is open.
        ending = [i for i in allowed if words.id_to_token(i) in ('"', "}", ",", '"}')]
        return int(draw.choice(ending if ending and draw.random() < 0.5 else allowed))

    walk = _Walk(kind, tool_format, several=True)
    schemas = {name: _SCHEMAS[name] for name in _SCHEMAS}
    text = walk.write(choose)
    tools = Tools(
        style=walk.style, shown=(), schemas=schemas, forced=frozenset(schemas), several=True
    )
    message = message_fields(tools, text, "r", 0)
    assert message["content"] is None
    for call in message["tool_calls"]:
        arguments = json.loads(call["function"]["arguments"])
        assert set(arguments) <= {"city", "days", "q"}


def test_the_tokenizers_of_these_tests_have_what_their_names_say() -> None:
    for kind, token, special in (("plain", "<tool_call>", False), ("special", "[ARGS]", True)):
        words, _ = _words(kind)
        token_id = words.token_to_id(token)
        assert token_id is not None
        assert (token_id in words.special_ids) == special
    assert _words("literal")[0].token_to_id("<tool_call>") is None
