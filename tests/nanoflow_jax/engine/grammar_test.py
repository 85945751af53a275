"""Requests whose text must follow a grammar, in one batch with others that need not."""

import dataclasses
import json
import re
import shutil

import pytest
from engine_runs import Output, ask, build_small, run, take
from golden import cases
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow_jax.request import FinishReason, Grammar, GrammarKind
from nanoflow_jax.tokenizer.tokenizer import Tokenizer

_CASE = cases.load("llama3")  # byte-level: any text can be said
_COMMON = {"max_requests": 8, "penalty_requests": 8}
_PLAIN = {"dense_batch": 64, "buckets": "8:8:0,64:8:8", "cache_page_size": 16, **_COMMON}
_COMPACT = {"x-guidance": {"whitespace_flexible": False}}


@pytest.fixture(scope="module")
def engine():
    made = build_small(_CASE.path, **_PLAIN)
    yield made
    made.close()


@pytest.fixture(scope="module")
def words():
    return Tokenizer.load(_CASE.path)


def _regex(text):
    return Grammar(kind=GrammarKind.REGEX, text=text)


def _schema(schema):
    return Grammar(kind=GrammarKind.JSON_SCHEMA, text=json.dumps({**schema, **_COMPACT}))


def _text(words, output):
    return words.decode(output.token_ids)


_LEAF = st.one_of(
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"enum": ["a", 'b"', 3, None, [1]]}]),
    st.integers(-50, 50).map(lambda n: {"type": "integer", "minimum": n, "maximum": n + 7}),
    st.integers(0, 4).map(lambda n: {"type": "string", "minLength": n, "maxLength": n + 1}),
    st.integers(1, 3).map(lambda n: {"type": "string", "pattern": f"^[a-f]{{{n}}}$"}),
)


def _array(items):
    return {"type": "array", "items": items, "minItems": 1, "maxItems": 2}


def _object(properties):
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


_SCHEMA = st.recursive(
    _LEAF,
    lambda inner: (
        inner.map(_array)
        | st.dictionaries(st.sampled_from("xyz"), inner, max_size=2).map(_object)
        | st.tuples(inner, inner).map(lambda pair: {"anyOf": list(pair)})
    ),
    max_leaves=3,
)


def _fits(schema, value):
    """Whether a value is what one of the schemas above describes."""
    if "anyOf" in schema:
        return any(_fits(part, value) for part in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    match schema["type"]:
        case "boolean":
            return isinstance(value, bool)
        case "null":
            return value is None
        case "integer":
            return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
        case "string" if "pattern" in schema:
            return isinstance(value, str) and re.fullmatch(schema["pattern"], value) is not None
        case "string":
            return isinstance(value, str) and (
                schema["minLength"] <= len(value) <= schema["maxLength"]
            )
        case "array":
            return 1 <= len(value) <= 2 and all(_fits(schema["items"], item) for item in value)
        case _:
            inner = schema["properties"]
            return value.keys() == inner.keys() and all(_fits(inner[k], value[k]) for k in inner)


@given(st.lists(st.tuples(_SCHEMA, st.integers(0, 99)), min_size=3, max_size=3))
@settings(max_examples=8)
def test_text_always_fits_its_schema(engine, words, drawn):
    requests = [
        ask(
            str(i),
            _CASE.prompts[i],
            max_tokens=120,
            temperature=1.0,
            seed=seed,
            grammar=_schema(schema),
        )
        for i, (schema, seed) in enumerate(drawn)
    ]
    plain = ask("plain", _CASE.prompts[5], max_tokens=10, ignore_eos=True)
    *found, other = run(engine, [*requests, plain])
    assert other.token_ids == _CASE.tokens[5][:10].tolist()
    for (schema, _), output in zip(drawn, found, strict=True):
        assert (output.error, output.finish_reason) == (None, FinishReason.STOP)
        assert _fits(schema, json.loads(_text(words, output)))


_PATTERN = st.recursive(
    st.sampled_from(["a", "[a-c]", "[^a-z\\s]", "[0-9]", "[0-9A-F]", "é", "\\.", "(?:yes|no)"]),
    lambda inner: (
        st.tuples(inner, inner).map("".join)
        | st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})")
        | st.tuples(inner, st.sampled_from(["?", "{2}", "{0,3}"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        )
    ),
    max_leaves=5,
)


@given(st.lists(_PATTERN, min_size=3, max_size=3), st.integers(0, 99))
@settings(max_examples=8)
def test_text_always_matches_its_pattern_whole(engine, words, patterns, seed):
    requests = [
        ask(str(i), [5 + i], max_tokens=80, temperature=1.3, seed=seed, grammar=_regex(pattern))
        for i, pattern in enumerate(patterns)
    ]
    for pattern, output in zip(patterns, run(engine, requests), strict=True):
        assert output.finish_reason is FinishReason.STOP
        assert re.fullmatch(pattern, _text(words, output)) is not None


def _busy_requests():
    """Grammars that end, one that is cut, and requests of other kinds beside them."""
    shared = {"max_tokens": 70, "stop": "never said"}
    drawn = {"temperature": 1.0, **shared}
    bounded = _schema(_object({"x": {"type": "string", "minLength": 30, "maxLength": 50}}))
    return [
        ask("json", _CASE.prompts[1], **drawn, seed=1, grammar=bounded),
        ask("words", _CASE.prompts[2], **drawn, seed=2, grammar=_regex("[a-z]{40}( [a-z]{9}){5}")),
        ask("cut", _CASE.prompts[3], **shared, grammar=_regex("[a-zA-Z ]{300}"), logprobs=3),
        ask("greedy", _CASE.prompts[4], **shared, grammar=_regex("[0-9]{55}")),
        ask("plain", _CASE.prompts[5], **shared, ignore_eos=True),
        ask("drawn", _CASE.prompts[6], **drawn, seed=5, ignore_eos=True, top_p=0.9),
        ask(
            "penalties",
            _CASE.prompts[7],
            **drawn,
            seed=7,
            presence_penalty=0.7,
            frequency_penalty=0.4,
            grammar=_regex("[a-z]{60}"),
        ),
    ]


def _ended(outputs):
    return [(o.token_ids, o.finish_reason, o.error) for o in outputs]


@pytest.fixture(scope="module")
def alone(engine):
    """What each request gives when nothing else runs."""
    return _ended([run(engine, [one])[0] for one in _busy_requests()])


def test_tokens_with_a_grammar_do_not_depend_on_the_batch(engine, alone):
    assert {reason for _, reason, _ in alone} == {FinishReason.STOP, FinishReason.LENGTH}
    assert _ended(run(engine, _busy_requests())) == alone


@pytest.mark.parametrize("run_ahead", [True, False], ids=["ahead", "one step at a time"])
def test_tokens_with_a_grammar_survive_preemption(alone, run_ahead):
    tight = build_small(_CASE.path, **{**_PLAIN, "cache_num_pages": 12}, async_scheduling=run_ahead)
    lesson = {"max_tokens": 100, "allowed_token_ids": (9,), "stop_token_ids": (9,)}
    run(tight, [ask(f"lesson {i}", [1], **lesson) for i in range(16)])  # outputs will be short
    assert _ended(run(tight, _busy_requests())) == alone
    assert tight.num_preemptions > 0
    tight.close()


def test_others_draw_the_same_tokens_beside_a_grammar(engine):
    others = [one for one in _busy_requests() if one.params.grammar is None]
    names = [one.request_id for one in _busy_requests()]
    beside = dict(zip(names, run(engine, _busy_requests()), strict=True))
    for one, output in zip(others, run(engine, others), strict=True):
        assert output.token_ids == beside[one.request_id].token_ids


def _record_order(engine, monkeypatch):
    calls = []
    for name in ("forward", "sample", "collect"):
        function = getattr(engine._runner, name)

        def record(*arguments, name=name, function=function):
            calls.append(name)
            return function(*arguments)

        monkeypatch.setattr(engine._runner, name, record)
    return calls


def test_a_batch_without_a_grammar_never_collects_before_it_samples(engine, monkeypatch):
    calls = _record_order(engine, monkeypatch)
    others = [one for one in _busy_requests() if one.params.grammar is None]
    run(engine, others)
    steps = calls.count("forward")
    assert steps > 60
    assert calls == [
        "forward",
        "sample",
        *["forward", "sample", "collect"] * (steps - 1),
        "collect",
    ]


def test_a_grammar_waits_only_where_its_token_is_still_on_the_device(engine, monkeypatch):
    calls = _record_order(engine, monkeypatch)
    run(engine, [ask("a", _CASE.prompts[1], max_tokens=4, grammar=_regex("[a-z]{9}"))])
    assert calls == ["forward", "sample", *["forward", "collect", "sample"] * 3, "collect"]


def test_a_grammar_that_can_only_end_ends_its_request_at_once(engine, words):
    for more in ({}, {"ignore_eos": True}):
        before = dataclasses.replace(engine.counters)
        (found,) = run(engine, [ask("a", [7], max_tokens=20, grammar=_regex("[ab]{3}"), **more)])
        assert re.fullmatch("[ab]{3}", _text(words, found))
        assert found.finish_reason is FinishReason.STOP
        assert not set(found.token_ids) & set(engine.limits.eos_ids)
        # The step behind its last token was on its way, but drew nothing for it.
        assert engine.counters.surplus_tokens - before.surplus_tokens == 1


def test_end_of_text_is_taken_only_where_the_grammar_may_end(engine, words):
    eos = min(engine.limits.eos_ids)
    likely = {"logit_bias": {eos: 100.0}, "max_tokens": 30}
    for more in ({}, {"ignore_eos": True}):
        engine.add(ask("a", [7, 8], grammar=_regex("[a-z]{6}[a-z]*"), **likely, **more))
        updates = []
        while engine.has_work:
            updates += engine.step()
        found = Output()
        for update in updates:
            take(found, update)
        assert re.fullmatch("[a-z]{6}", words.decode(found.token_ids[:-1]))
        assert found.token_ids[-1] == eos
        assert (updates[-1].finish_reason, updates[-1].stop_token_id) == (FinishReason.STOP, eos)


def test_a_grammar_that_ends_before_min_tokens_leaves_no_token(engine):
    params = {"min_tokens": 20, "max_tokens": 30}
    bad, good = run(
        engine,
        [
            ask("bad", [7], grammar=_regex("[ab]{3}"), **params),
            ask("good", [7], grammar=_regex("[ab]{3,40}"), **params),
        ],
    )
    assert bad.finish_reason is FinishReason.ERROR
    assert bad.error == (
        "no token could be drawn: every token was banned by allowed_token_ids, bad_words, "
        "min_tokens or the grammar"
    )
    assert len(good.token_ids) >= 20
    assert good.error is None


def test_allowed_tokens_narrow_a_grammar(engine, words):
    allowed = tuple(words.token_to_id(letter) for letter in "bdx")
    (found,) = run(
        engine,
        [
            ask(
                "a",
                [7],
                max_tokens=20,
                temperature=2.0,
                grammar=_regex("[a-d]{12}"),
                allowed_token_ids=allowed,
            )
        ],
    )
    assert re.fullmatch("[bd]{12}", _text(words, found))


def test_a_stop_token_ends_a_request_inside_its_grammar(engine, words):
    stop = words.token_to_id("b")
    (found,) = run(
        engine,
        [ask("a", [7], max_tokens=20, grammar=_regex("a{5}bc{9}"), stop_token_ids=[stop])],
    )
    assert (_text(words, found), found.finish_reason) == ("aaaaab", FinishReason.STOP)


def test_an_abort_in_the_middle_of_a_grammar_leaves_no_trace(engine):
    engine.add(ask("gone", _CASE.prompts[1], max_tokens=50, grammar=_regex("[a-z]{200}")))
    engine.add(ask("rest", _CASE.prompts[5], max_tokens=9, ignore_eos=True))
    rest = Output()
    for i in range(30):
        for update in engine.step():
            if update.request_id == "rest":
                take(rest, update)
        engine.check()
        if i == 3:
            engine.abort("gone", output_len=3)
    assert rest.token_ids == _CASE.tokens[5][:9].tolist()
    assert not engine.has_work


def test_a_wrong_grammar_is_refused_alone(engine):
    engine.add(ask("good", _CASE.prompts[2], max_tokens=3, ignore_eos=True))
    with pytest.raises(ValueError, match=r"(?s)^the regular expression cannot be used: .*unclosed"):
        engine.add(ask("bad", [5], grammar=_regex("(")))
    found = Output()
    while engine.has_work:
        for update in engine.step():
            take(found, update)
    assert found.token_ids == _CASE.tokens[2][:3].tolist()


def test_a_grammar_that_runs_out_of_fuel_fails_alone(engine, words):
    # Ways to read a text of n letters grow with n.
    text = "start: a0\n" + "\n".join(f"a{i}: a{i + 1} a{i + 1} a{i + 1}" for i in range(30))
    costly = Grammar(kind=GrammarKind.LARK, text=text + '\na30: "x"?')
    only = {"allowed_token_ids": (words.token_to_id("x"),), "min_tokens": 200}
    bad, good = run(
        engine,
        [
            ask("bad", [7], max_tokens=200, grammar=costly, **only),
            ask("good", _CASE.prompts[2], max_tokens=12, ignore_eos=True),
        ],
    )
    assert bad.finish_reason is FinishReason.ERROR
    assert re.fullmatch(
        r"the grammar could not be followed any further \(\w+\): it is too ambiguous or its "
        "patterns are too large at this place; simplify it",
        bad.error,
    )
    assert good.token_ids == _CASE.tokens[2][:12].tolist()


def test_a_model_without_a_tokenizer_refuses_grammars(tmp_path):
    folder = shutil.copytree(_CASE.path, tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    made = build_small(folder, **_PLAIN)
    with pytest.raises(ValueError, match="this model has no tokenizer, so it cannot follow"):
        made.add(ask("a", [1], grammar=_regex("a")))
    made.close()
