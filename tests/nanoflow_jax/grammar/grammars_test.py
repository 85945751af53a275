"""Grammars of requests: what is refused and why, what is kept, and what a mask allows."""

import json
import re
import time

import numpy as np
import pytest
from golden import cases

from nanoflow_jax.grammar import compile_process, grammars
from nanoflow_jax.request import Grammar, GrammarKind
from nanoflow_jax.tokenizer.tokenizer import Tokenizer

_FOLDER = cases.load("llama3").path
_VOCAB = 340  # padded: the tokenizer has 307
_EOS = Tokenizer.load(_FOLDER).eos_id


def _regex(text):
    return Grammar(kind=GrammarKind.REGEX, text=text)


def _lark(text):
    return Grammar(kind=GrammarKind.LARK, text=text)


def _schema(schema):
    text = schema if isinstance(schema, str) else json.dumps(schema)
    return Grammar(kind=GrammarKind.JSON_SCHEMA, text=text)


@pytest.fixture(scope="module")
def made():
    kept = grammars.Grammars(_FOLDER, vocab_size=_VOCAB, eos_ids=(_EOS,))
    yield kept
    kept.close()


def _allowed(matcher):
    mask = np.full(-(-_VOCAB // 32), -1, np.int32)
    matcher.fill_mask(mask)
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


_DEEP = {f"a{i}": {"properties": {"x": {"$ref": f"#/$defs/a{i + 1}"}}} for i in range(1000)}
_HOSTILE = [
    (_regex("("), "the regular expression cannot be used: .*unclosed group"),
    (_regex("(?<=a)b"), "the regular expression cannot be used: .*look-around"),
    (_regex("a\ud800"), "the regular expression holds a lone surrogate at character 1"),
    (_lark("start: foo"), "the Lark grammar cannot be used: .*unknown name"),
    (_lark("start: " + "(" * 5000), "the Lark grammar cannot be used: .*too deeply nested"),
    (_schema("{"), "the JSON schema cannot be used: Expecting"),
    (_schema("[]"), "a schema is an object, true or false, not \\[\\]"),
    (_schema('{"const": NaN}'), "NaN is not JSON"),
    (_schema("[" * 30000), "nested too deeply"),
    (_schema({"type": "nonsense"}), "Invalid type: nonsense"),
    (_schema({"type": "string", "pattern": "("}), "unclosed group"),
    (_schema({"type": "string", "pattern": 5}), "Expected string for 'pattern'"),
    (_schema({"$ref": "http://127.0.0.1:9/x.json"}), "does not fetch"),
    (_schema({"$ref": "#"}), "no text can follow it"),
    (_schema(False), "Unsatisfiable"),
    (_schema({"$defs": {**_DEEP, "a1000": {}}, "$ref": "#/$defs/a0"}), "nested too deeply"),
]


@pytest.mark.parametrize(("grammar", "message"), _HOSTILE)
def test_c7_a_hostile_grammar_is_refused_with_its_reason(made, grammar, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        made.prepare(grammar)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        made.matcher(grammar)
    assert made.matcher(_regex("a")).error is None


def test_c7_a_grammar_that_never_compiles_is_ended_by_the_clock():
    limits = compile_process.CompileLimits(cpu_seconds=0.3)
    made = grammars.Grammars(_FOLDER, vocab_size=_VOCAB, eos_ids=(_EOS,), limits=limits)
    many = [{"type": "string", "pattern": f"a{{{i}}}"} for i in range(100)]
    begin = time.process_time()
    with pytest.raises(
        ValueError,
        match=r"^the JSON schema is too costly: it takes more than 0\.3 s to compile; simplify it$",
    ):
        made.matcher(_schema({"allOf": many}))
    assert time.process_time() - begin < 5
    assert made.matcher(_regex("a")).error is None
    made.close()


@pytest.mark.parametrize("text", ["(a{1,1000}){1,1000}", "(a|b)*a(a|b){30}", "a{9}|" * 3000])
def test_a_large_pattern_is_followed(made, text):
    assert _allowed(made.matcher(_regex(text)))


def test_c7_a_grammar_that_keeps_too_much_is_refused():
    limits = compile_process.CompileLimits(grammar_bytes=-1)
    made = grammars.Grammars(_FOLDER, vocab_size=_VOCAB, eos_ids=(_EOS,), limits=limits)
    with pytest.raises(ValueError, match=r"is too costly: compiled it keeps \d+ bytes, more than"):
        made.matcher(_regex("a"))
    made.close()


def test_a_mask_worked_by_hand(made):
    words = Tokenizer.load(_FOLDER)
    a, b = words.token_to_id("a"), words.token_to_id("b")
    matcher = made.matcher(_regex("a+b"))
    other = made.matcher(_regex("a+b"))
    assert a in _allowed(matcher)
    assert not {b, _EOS} & set(_allowed(matcher))
    matcher.advance(a)
    assert {a, b} <= set(_allowed(matcher))
    assert not matcher.is_finished
    matcher.advance(b)
    assert matcher.is_finished
    assert _allowed(matcher) == [_EOS]
    assert b not in _allowed(other)  # a copy of its own


def test_a_token_that_is_not_allowed_is_an_error_that_stays(made):
    words = Tokenizer.load(_FOLDER)
    matcher = made.matcher(_regex("a+b"))
    matcher.advance(words.token_to_id("x"))
    assert matcher.error.startswith("the grammar could not be followed any further (")
    assert not matcher.is_finished
    assert _allowed(matcher) == []


def test_ids_that_are_no_tokens_are_never_allowed(made):
    assert max(_allowed(made.matcher(_lark("start: <[*]>")))) < 307
    assert _allowed(made.matcher(_lark("start: <[320]>"))) == []


def test_c7_few_grammars_are_kept_and_the_one_used_last_is_not_dropped():
    size = 128 << 10
    made = grammars.Grammars(_FOLDER, vocab_size=_VOCAB, eos_ids=(_EOS,), kept_bytes=2 * size + 100)
    for text in ("a", "b", "a", "c"):
        made.matcher(_regex(text))
    assert made.num_kept <= 2
    assert made.kept_bytes <= 2 * size + 100
    made.close()


def test_a_model_without_an_end_of_text_token_is_refused():
    made = grammars.Grammars(_FOLDER, vocab_size=_VOCAB, eos_ids=())
    with pytest.raises(ValueError, match=f"^{re.escape(str(_FOLDER))} names no end-of-text token"):
        made.prepare(_regex("a"))
