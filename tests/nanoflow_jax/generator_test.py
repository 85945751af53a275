import hypothesis
import pytest
import scripted_engine
from golden import cases
from hypothesis import strategies as st

from nanoflow_jax import generator
from nanoflow_jax.request import FinishReason, RequestUpdate, SamplingParams, TokenLogprobs
from nanoflow_jax.tokenizer.tokenizer import Tokenizer

_WORDS = Tokenizer.load(cases.load("qwen3").path)  # byte-level: any text can be said
_EOS = _WORDS.eos_id


def _ids(text):
    return _WORDS.encode(text, add_special_tokens=False)


def _params(**given):
    return SamplingParams(**{"seed": 1, "max_tokens": None, **given})


def _run(made, *, most=200):
    deltas, completions = [], []
    for _ in range(most):
        if not made.num_pending:
            break
        result = made.step()
        deltas += result.deltas
        completions += result.completions
    assert not made.num_pending
    return deltas, completions


def _one(tokens, *, words=_WORDS, reason=FinishReason.LENGTH, last=None, **params):
    engine = scripted_engine.ScriptedEngine(
        {"a/0": scripted_engine.say("a/0", tokens, reason=reason, **(last or {}))}
    )
    made = generator.Generator(engine, words)
    made.submit("a", [1], _params(**params))
    deltas, (completion,) = _run(made)
    assert completion.request_id == "a"
    (choice,) = completion.choices
    assert "".join(delta.text for delta in deltas) == choice.text
    assert tuple(t for delta in deltas for t in delta.token_ids) == choice.token_ids
    assert [d.finish_reason for d in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish_reason == choice.finish_reason
    assert deltas[-1].stop_reason == choice.stop_reason
    return engine, choice


def test_a_request_began_to_run_with_the_first_of_its_choices():
    first_tokens = {
        f"a/{index}": [RequestUpdate(request_id=f"a/{index}", token_ids=(5,), started_s=started_s)]
        for index, started_s in enumerate((2.5, 1.5))
    }
    made = generator.Generator(scripted_engine.ScriptedEngine(first_tokens), None)
    made.submit("a", [1], _params(n=2))
    assert made.step().started_s == {"a": 1.5}


def test_tokens_become_text():
    tokens = _ids("Hello, wörld \u2615!")
    engine, choice = _one(tokens)
    assert choice.text == "Hello, wörld \u2615!"
    assert choice.token_ids == tuple(tokens)
    assert choice.finish_reason is FinishReason.LENGTH
    assert choice.stop_reason is None
    assert choice.logprobs is None
    assert not engine.aborted


def test_a_text_cut_inside_a_character_ends_in_a_replacement_character():
    tokens = _ids("a\u2615")
    assert len(tokens) > 2
    assert _one(tokens[:-1])[1].text == "a\ufffd"


@hypothesis.given(
    text=st.text(st.sampled_from("abc \u00e9\u2615"), min_size=1, max_size=14),
    stop=st.lists(st.text(st.sampled_from("abc \u00e9\u2615"), min_size=1, max_size=4), max_size=3),
    include=st.booleans(),
)
@hypothesis.settings(max_examples=200)
def test_the_text_ends_where_the_first_stop_string_is_complete(text, stop, include):
    engine, choice = _one(_ids(text), stop=tuple(stop), include_stop=include)
    ends = [(text.find(s) + len(s), -len(s), s) for s in stop if s in text]
    if not ends:
        assert (choice.text, choice.finish_reason) == (text, FinishReason.LENGTH)
        return
    end, _, hit = min(ends)
    assert choice.text == text[: end if include else end - len(hit)]
    assert (choice.finish_reason, choice.stop_reason) == (FinishReason.STOP, hit)
    # The engine, which knows no text, is told; unless that token was the last one anyway.
    assert engine.aborted in ({}, {"a/0": len(choice.token_ids)})
    assert len(choice.token_ids) <= len(_ids(text))


def test_a_stop_string_that_straddles_tokens_is_cut_at_its_first_character():
    tokens = [*_ids("one st"), *_ids("op two"), *_ids(" three")]
    engine, choice = _one(tokens, stop="stop")
    assert choice.text == "one "
    assert (choice.finish_reason, choice.stop_reason) == (FinishReason.STOP, "stop")
    assert choice.token_ids == tuple(tokens[: len(choice.token_ids)])
    assert _WORDS.decode(list(choice.token_ids)).startswith("one stop")
    assert engine.aborted == {"a/0": len(choice.token_ids)}


def test_a_stop_string_is_looked_for_after_min_tokens_only():
    ids = _ids("one two one two three")
    early = len(_ids("one two"))
    made = generator.Generator(
        scripted_engine.ScriptedEngine({"r/0": scripted_engine.say("r/0", ids)}), _WORDS
    )

    made.submit("r", [5], _params(stop=(" two",), min_tokens=early))

    _, (done,) = _run(made)
    assert done.choices[0].text == "one two one"
    assert done.choices[0].stop_reason == " two"


def test_a_continuation_keeps_the_space_that_follows_its_prompt():
    words = Tokenizer.load(cases.load("llama").path)  # drops the first space of a whole text
    ids = words.encode("hello world and more")
    cut = next(i for i in range(2, len(ids)) if words.id_to_token(ids[i]).startswith("\u2581"))
    made = generator.Generator(
        scripted_engine.ScriptedEngine({"r/0": scripted_engine.say("r/0", ids[cut:])}), words
    )

    made.submit("r", ids[:cut], _params())

    _, (done,) = _run(made)
    assert words.decode(ids[:cut]) + done.choices[0].text == "hello world and more"


def test_what_may_begin_a_stop_string_is_held_back_and_given_at_the_end():
    engine = scripted_engine.ScriptedEngine(
        {"a/0": scripted_engine.say("a/0", [*_ids("one"), *_ids(" sto")])}
    )
    made = generator.Generator(engine, _WORDS)
    made.submit("a", [1], _params(stop="stop"))
    deltas, (completion,) = _run(made)
    assert completion.choices[0].text == "one sto"
    assert deltas[-1].text.endswith("sto")
    assert "st" not in "".join(delta.text for delta in deltas[:-1])


def test_an_end_of_text_token_is_counted_and_not_shown():
    _, choice = _one([*_ids("done"), _EOS], reason=FinishReason.STOP, skip_special_tokens=False)
    assert choice.text == "done"
    assert choice.token_ids[-1] == _EOS
    assert (choice.finish_reason, choice.stop_reason) == (FinishReason.STOP, None)


def test_a_stop_token_of_the_request_is_named_and_shown_only_when_asked():
    tokens = [*_ids("abc"), *_ids("d")]
    _, choice = _one(tokens, reason=FinishReason.STOP, stop_token_ids=(tokens[-1],))
    assert (choice.text, choice.stop_reason) == ("abc", tokens[-1])
    _, choice = _one(
        tokens, reason=FinishReason.STOP, stop_token_ids=(tokens[-1],), include_stop=True
    )
    assert (choice.text, choice.stop_reason) == ("abcd", tokens[-1])


def test_special_tokens_are_left_out_unless_asked_for():
    tokens = [*_ids("a"), _EOS, *_ids("b")]
    assert _one(tokens)[1].text == "ab"
    assert _one(tokens, skip_special_tokens=False)[1].text == "a<|im_end|>b"


def test_without_a_tokenizer_texts_are_empty():
    _, choice = _one([5, 6, 7], words=None)
    assert (choice.text, choice.token_ids) == ("", (5, 6, 7))


def test_logprobs_follow_their_tokens():
    entries = [TokenLogprobs(token_id=t, logprob=-1.0, rank=1) for t in (4, 5)]
    script = [
        RequestUpdate(request_id="a/0", token_ids=(4,), logprobs=(entries[0],)),
        RequestUpdate(
            request_id="a/0",
            token_ids=(5,),
            logprobs=(entries[1],),
            finish_reason=FinishReason.LENGTH,
        ),
    ]
    made = generator.Generator(scripted_engine.ScriptedEngine({"a/0": script}), None)
    made.submit("a", [1], _params(logprobs=0))
    deltas, (completion,) = _run(made)
    assert completion.choices[0].logprobs == tuple(entries)
    assert [delta.logprobs for delta in deltas] == [(entries[0],), (entries[1],)]


def test_prompt_logprobs_come_with_none_for_the_first_token():
    entries = tuple(TokenLogprobs(token_id=t, logprob=-1.0, rank=1) for t in (8, 9))
    script = [
        RequestUpdate(request_id="a/0", prompt_logprobs=entries[:1]),
        RequestUpdate(request_id="a/0", prompt_logprobs=entries[1:]),
        *scripted_engine.say("a/0", [4]),
    ]
    made = generator.Generator(scripted_engine.ScriptedEngine({"a/0": script}), None)
    made.submit("a", [7, 8, 9], _params(prompt_logprobs=0))
    deltas, (completion,) = _run(made)
    assert completion.prompt_logprobs == (None, *entries)
    assert completion.prompt_ids == (7, 8, 9)
    assert len(deltas) == 1


def test_choices_are_requests_of_their_own_and_complete_together():
    scripts = {
        "a/0": scripted_engine.say("a/0", _ids("x y z")),
        "a/1": scripted_engine.say("a/1", _ids("u")),
        "a/2": scripted_engine.say("a/2", [*_ids("vw"), _EOS], reason=FinishReason.STOP),
    }
    engine = scripted_engine.ScriptedEngine(scripts)
    made = generator.Generator(engine, _WORDS)
    made.submit("a", [1, 2], _params(n=3, prompt_logprobs=2, temperature=0.5), priority=4)
    deltas, (completion,) = _run(made)
    assert [choice.text for choice in completion.choices] == ["x y z", "u", "vw"]
    assert [choice.index for choice in completion.choices] == [0, 1, 2]
    assert {delta.index for delta in deltas} == {0, 1, 2}
    assert {delta.request_id for delta in deltas} == {"a"}
    asked = list(engine.requests.values())
    assert [request.params.n for request in asked] == [1, 1, 1]
    assert [request.priority for request in asked] == [4, 4, 4]
    assert [request.params.prompt_logprobs for request in asked] == [2, None, None]
    seeds = [request.params.seed for request in asked]
    assert seeds[0] == 1
    assert len(set(seeds)) == 3
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_each_choice_gets_the_tokens_of_bad_words():
    engine = scripted_engine.ScriptedEngine({f"a/{i}": [] for i in range(2)})
    made = generator.Generator(engine, _WORDS)
    made.submit("a", [1], _params(n=2, bad_words=["cat"]))
    wanted = (tuple(_ids("cat")), tuple(_ids(" cat")))
    assert [asked.bad_tokens for asked in engine.requests.values()] == [wanted] * 2


def test_a_choices_seed_follows_from_the_requests_seed_and_its_index():
    assert generator.choice_seed(5, 0) == 5
    assert generator.choice_seed(5, 1) == generator.choice_seed(5, 1)
    drawn = {generator.choice_seed(seed, index) for seed in range(20) for index in range(20)}
    assert len(drawn) == 400


def test_an_aborted_request_reports_nothing_more():
    scripts = {
        name: scripted_engine.say(name, _ids("one two three")) for name in ("a/0", "a/1", "b/0")
    }
    engine = scripted_engine.ScriptedEngine(scripts)
    made = generator.Generator(engine, _WORDS)
    made.submit("a", [1], _params(n=2))
    made.submit("b", [1], _params())
    assert {delta.request_id for delta in made.step().deltas} == {"a", "b"}
    made.abort("a")
    made.abort("a")
    made.abort("never seen")
    assert engine.aborted == {"a/0": None, "a/1": None}
    assert made.num_pending == 1
    deltas, (completion,) = _run(made)
    assert {delta.request_id for delta in deltas} == {"b"}
    assert completion.choices[0].text == "one two three"


def test_updates_of_an_aborted_request_that_come_late_are_dropped():
    engine = scripted_engine.ScriptedEngine({"a/0": scripted_engine.say("a/0", _ids("one two"))})
    made = generator.Generator(engine, _WORDS)
    made.submit("a", [1], _params())
    engine.abort = lambda *_, **__: None  # as if its tokens were already on their way
    made.abort("a")
    result = made.step()
    assert (result.deltas, result.completions) == ((), ())


def test_a_failed_choice_fails_its_request_and_no_other():
    failed = RequestUpdate(request_id="a/1", finish_reason=FinishReason.ERROR, error="no luck")
    scripts = {
        "a/0": scripted_engine.say("a/0", _ids("one two three")),
        "a/1": [RequestUpdate(request_id="a/1", token_ids=(5,)), failed],
        "b/0": scripted_engine.say("b/0", _ids("fine")),
    }
    engine = scripted_engine.ScriptedEngine(scripts)
    made = generator.Generator(engine, _WORDS)
    made.submit("a", [1], _params(n=2))
    made.submit("b", [2], _params())
    _, completions = _run(made)
    found = {completion.request_id: completion for completion in completions}
    assert (found["a"].error, found["a"].choices) == ("no luck", ())
    assert "a/0" in engine.aborted
    assert (found["b"].error, found["b"].choices[0].text) == (None, "fine")


@pytest.mark.parametrize(
    ("params", "words", "message"),
    [
        ({"seed": None}, _WORDS, "the request has no seed; set one, or draw one"),
        ({"stop": "x"}, None, "stop strings need a tokenizer, and this model has none"),
        ({"bad_words": ["x"]}, None, "bad_words needs a tokenizer, and this model has none"),
    ],
)
def test_what_the_generator_cannot_do_is_refused(params, words, message):
    made = generator.Generator(scripted_engine.ScriptedEngine({}), words)
    with pytest.raises(ValueError, match=f"^{message}$"):
        made.submit("a", [1], _params(**params))
    assert made.num_pending == 0


def test_an_id_in_use_is_refused():
    made = generator.Generator(
        scripted_engine.ScriptedEngine({"a/0": scripted_engine.say("a/0", [5])}), None
    )
    made.submit("a", [1], _params())
    with pytest.raises(ValueError, match=r"^request id 'a' is already in use$"):
        made.submit("a", [1], _params())
    _run(made)
    made.submit("a", [1], _params())


def test_a_request_that_the_engine_refuses_leaves_none_of_its_choices_behind():
    class _Full(scripted_engine.ScriptedEngine):
        def add(self, request):
            if request.request_id == "a/2":
                raise ValueError("no memory for this request")
            super().add(request)

    engine = _Full({"a/0": [], "a/1": []})
    made = generator.Generator(engine, None)
    with pytest.raises(ValueError, match="no memory"):
        made.submit("a", [1], _params(n=3))
    assert engine.aborted == {"a/0": None, "a/1": None}
    assert made.num_pending == 0
