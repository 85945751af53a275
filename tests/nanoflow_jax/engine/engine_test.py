"""Requests through one engine: how they end, what they report, and who is refused."""

import dataclasses
import json
import re
import time

import numpy as np
import pytest
from engine_runs import Output, ask, build_small, run, take
from golden import cases
from llama_engine import CASE, KNOBS, greedy, run_one
from plain_model import PlainModel
from poisoned_model import copy_with_nan

from nanoflow_jax.engine import engine as engine_lib
from nanoflow_jax.engine import sequence
from nanoflow_jax.request import FinishReason

_VOCAB, _CONTEXT, _EOS = 353, 256, 2


@pytest.fixture(scope="module")
def engine():
    made = build_small(CASE.path, **KNOBS)
    yield made
    made.close()


@pytest.fixture(scope="module")
def plain():
    return PlainModel(CASE.path, length=64)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "the prompt is empty; give at least one token"),
        (
            [1] * 256,
            {},
            "the prompt has 256 tokens and the context holds 256, with room for at least one "
            "generated token; shorten the prompt or raise --max_context_len where the model "
            "allows it",
        ),
        ([1, 353], {}, "prompt: 353 is not a token id of this model, 0 to 352"),
        ([-1], {}, "prompt: -1 is not a token id of this model, 0 to 352"),
        ([True], {}, "prompt: True is not a token id of this model, 0 to 352"),
        (["a"], {}, "prompt: 'a' is not a token id of this model, 0 to 352"),
        (
            [1],
            {"logit_bias": {400: 1.0}},
            "logit_bias: 400 is not a token id of this model, 0 to 352",
        ),
        (
            [1],
            {"allowed_token_ids": (3, 353)},
            "allowed_token_ids: 353 is not a token id of this model, 0 to 352",
        ),
        (
            [1],
            {"stop_token_ids": (1000,)},
            "stop_token_ids: 1000 is not a token id of this model, 0 to 352",
        ),
        (
            [1],
            {"bad_tokens": ((3, 999),)},
            "bad_words: 999 is not a token id of this model, 0 to 352",
        ),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_alone(engine, prompt, params, message):
    engine.add(ask("good", CASE.prompts[2], max_tokens=3, ignore_eos=True))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        engine.add(ask("bad", prompt, **params))
    found = Output()
    while engine.has_work:
        for update in engine.step():
            assert update.request_id == "good"
            take(found, update)
        engine.check()
    assert found.token_ids == greedy(2, 3)


def test_an_id_can_be_used_again_only_after_its_request_has_ended(engine):
    engine.add(ask("a", [5], max_tokens=2))
    with pytest.raises(ValueError, match=r"^request id 'a' is already in use$"):
        engine.add(ask("a", [6]))
    engine.abort("a")
    # The step in flight, if any, still carries the aborted one.
    assert run(engine, [ask("a", CASE.prompts[3], max_tokens=4, ignore_eos=True)])[
        0
    ].token_ids == greedy(3, 4)


def test_a_stop_token_ends_a_request_and_its_surplus_token_is_dropped(engine):
    tokens = greedy(5, 12)
    place = next(i for i, token in enumerate(tokens) if i > 3 and token not in tokens[:i])
    before = dataclasses.replace(engine.counters)
    found = run_one(
        engine, CASE.prompts[5], max_tokens=40, ignore_eos=True, stop_token_ids=[tokens[place]]
    )
    assert found.token_ids == tokens[: place + 1]
    assert found.finish_reason is FinishReason.STOP
    assert engine.counters.generated_tokens - before.generated_tokens == place + 1
    # While its last token was on its way to the host, one more was launched.
    assert engine.counters.surplus_tokens - before.surplus_tokens == 1
    assert engine.counters.prompt_tokens - before.prompt_tokens == len(CASE.prompts[5])


def test_the_update_that_ends_a_request_names_the_stop_token(engine):
    tokens = greedy(1, 1)
    engine.add(ask("a", CASE.prompts[1], max_tokens=9, ignore_eos=True, stop_token_ids=tokens))
    updates = []
    while engine.has_work:
        updates += engine.step()
    assert [(u.token_ids, u.stop_token_id) for u in updates] == [((tokens[0],), tokens[0])]


def test_the_first_token_says_when_its_prompt_began_to_run(engine):
    engine.add(ask("a", [7] * 60, max_tokens=3, ignore_eos=True))  # takes three steps
    before = time.monotonic()
    updates = engine.step()
    after = time.monotonic()
    while engine.has_work:
        updates += engine.step()
    first, *others = updates
    assert before <= first.started_s <= after
    assert [update.started_s for update in others] == [None, None]


def test_end_of_text_ends_a_request_unless_it_is_ignored(engine):
    likely = {"logit_bias": {_EOS: 100}, "max_tokens": 5}
    ended = run_one(engine, [7, 8], **likely)
    assert (ended.token_ids, ended.finish_reason) == ([_EOS], FinishReason.STOP)
    ignored = run_one(engine, [7, 8], **likely, ignore_eos=True)
    assert (ignored.token_ids, ignored.finish_reason) == ([_EOS] * 5, FinishReason.LENGTH)


def test_min_tokens_bans_what_would_end_the_request(engine):
    first = greedy(4, 1)[0]
    params = {"stop_token_ids": [first], "logit_bias": {first: 90, _EOS: 80}, "max_tokens": 9}
    found = run_one(engine, CASE.prompts[4], **params, min_tokens=4)
    assert len(found.token_ids) == 5
    assert not {first, _EOS} & set(found.token_ids[:4])
    assert found.token_ids[4] == first


def test_a_request_without_max_tokens_runs_to_the_end_of_the_context(engine):
    found = run_one(engine, [3] * 250, max_tokens=None, ignore_eos=True)
    assert (len(found.token_ids), found.finish_reason) == (_CONTEXT - 250, FinishReason.LENGTH)


def test_only_allowed_tokens_are_drawn(engine):
    allowed = (0, 31, 32, 63, 352)
    found = run_one(
        engine, [9, 4], allowed_token_ids=allowed, max_tokens=40, temperature=5.0, ignore_eos=True
    )
    assert set(found.token_ids) <= set(allowed)
    assert len(set(found.token_ids)) > 2


def test_a_request_with_no_token_left_to_draw_fails_alone(engine):
    banned = ask("bad", [4], allowed_token_ids=(_EOS,), min_tokens=2, max_tokens=5)
    good = ask("good", CASE.prompts[6], max_tokens=6, ignore_eos=True)
    failed, fine = run(engine, [banned, good])
    assert failed.finish_reason is FinishReason.ERROR
    assert failed.token_ids == []
    assert failed.error == (
        "no token could be drawn: every token was banned by allowed_token_ids, bad_words, "
        "min_tokens or the grammar"
    )
    assert fine.token_ids == greedy(6, 6)


_POISON = 77


@pytest.mark.parametrize("case", ["llama", "mixtral"])
@pytest.mark.parametrize(
    "bad", [[3, 1, 4, 5, 6, 7, _POISON], [3, 1, _POISON, 4, 5, 6, 7]], ids=["last", "middle"]
)
def test_f7_logits_that_are_no_numbers_fail_only_their_request(case, bad, tmp_path):
    golden, poison = cases.load(case), _POISON
    folder = copy_with_nan(golden.path, tmp_path / "model", token=poison)
    clean = [i for i, p in enumerate(golden.prompts) if poison not in [*p, *golden.tokens[i]]][:6]
    poisoned = build_small(folder, **KNOBS)
    requests = [ask("bad", bad, max_tokens=20, ignore_eos=True)]
    requests += [ask(str(i), golden.prompts[i], max_tokens=20, ignore_eos=True) for i in clean[:4]]
    failed, *fine = run(poisoned, requests)
    assert failed.finish_reason is FinishReason.ERROR
    assert failed.token_ids == []
    assert failed.error.endswith("not finite; the weights may be damaged: download them again")
    for i, output in zip(clean[:4], fine, strict=True):
        assert output.token_ids == golden.tokens[i][:20].tolist()
    # The pages that held what is no number serve the next requests.
    later = [ask(str(i), golden.prompts[i], max_tokens=20, ignore_eos=True) for i in clean[4:]]
    for i, output in zip(clean[4:], run(poisoned, later), strict=True):
        assert output.token_ids == golden.tokens[i][:20].tolist()
    poisoned.close()


def test_an_aborted_request_reports_nothing_more_and_leaves_no_trace(engine):
    other = Output()
    engine.add(ask("gone", CASE.prompts[8], max_tokens=30, ignore_eos=True))
    engine.add(ask("unread", CASE.prompts[11], max_tokens=30, prompt_logprobs=2, priority=-1))
    engine.step()
    engine.abort("unread")  # its first slice of the prompt is on its way to the host
    engine.add(ask("other", CASE.prompts[9], max_tokens=12, ignore_eos=True))
    seen = []
    for _ in range(6):
        for update in engine.step():
            seen.append(update.request_id)
            if update.request_id == "other":
                take(other, update)
    assert "gone" in seen
    engine.abort("gone")
    engine.abort("gone")
    engine.abort("never there")
    engine.check()
    while engine.has_work:
        for update in engine.step():
            assert update.request_id == "other"
            take(other, update)
    assert other.token_ids == greedy(9, 12)
    assert (engine.num_running, engine.num_waiting) == (0, 0)


def test_logprobs_are_those_of_the_models_own_distribution(engine, plain):
    prompt = CASE.prompts[7]
    found = run_one(
        engine,
        prompt,
        max_tokens=4,
        ignore_eos=True,
        logprobs=3,
        temperature=1.5,
        seed=4,
        logit_bias={9: 5.0},
        presence_penalty=1.0,
    )
    logits = plain.logits([*prompt, *found.token_ids]).astype(np.float64)
    for i, entry in enumerate(found.logprobs):
        row = logits[len(prompt) - 1 + i]
        wanted = row - np.log(np.exp(row).sum())
        assert entry.token_id == found.token_ids[i]
        assert entry.logprob == pytest.approx(wanted[entry.token_id], abs=1e-4)
        assert entry.rank == 1 + np.count_nonzero(row > row[entry.token_id])
        best = np.argsort(-row)[:3]
        assert [token for token, _ in entry.top] == best.tolist()
        np.testing.assert_allclose([v for _, v in entry.top], wanted[best], atol=1e-4)


def test_a_vocabulary_smaller_than_the_logprobs_asked_for_reports_all_of_it():
    values = np.array([-0.5, -0.5, -1.0, -3.0], np.float32).view(np.int32)
    row = np.array([values[0], 1, 7, 8, 9, *values[1:]], np.int32)
    found = engine_lib._logprobs(7, row, 20)
    assert found.top == ((7, -0.5), (8, -1.0), (9, -3.0))


def test_zero_logprobs_report_the_drawn_token_alone(engine):
    found = run_one(engine, [5, 6], max_tokens=2, logprobs=0, prompt_logprobs=0, ignore_eos=True)
    assert [entry.top for entry in found.logprobs] == [(), ()]
    assert [entry.top for entry in found.prompt_logprobs] == [()]


def _penalised(plain, prompt, count, *, presence, frequency, repetition):
    """Greedy tokens under penalties, by the definitions."""
    tokens = list(prompt)
    for _ in range(count):
        row = plain.logits(tokens)[-1].astype(np.float64)
        output = tokens[len(prompt) :]
        for token in set(tokens):
            row[token] = row[token] / repetition if row[token] > 0 else row[token] * repetition
        for token in set(output):
            row[token] -= presence + frequency * output.count(token)
        tokens.append(int(row.argmax()))
    return tokens[len(prompt) :]


def test_penalties_see_prompt_and_output_though_more_requests_use_them_than_rows(engine, plain):
    settings = [
        {"presence": 1.5, "frequency": 0.0, "repetition": 1.0},
        {"presence": 0.0, "frequency": 1.8, "repetition": 1.0},
        {"presence": 0.0, "frequency": 0.0, "repetition": 1.7},
        {"presence": -1.0, "frequency": 0.7, "repetition": 1.2},
        {"presence": 0.3, "frequency": -0.5, "repetition": 0.8},
    ]
    prompts = [CASE.prompts[i] for i in (2, 3, 4, 5, 6)]
    requests = [
        ask(
            str(i),
            prompt,
            max_tokens=16,
            ignore_eos=True,
            presence_penalty=setting["presence"],
            frequency_penalty=setting["frequency"],
            repetition_penalty=setting["repetition"],
        )
        for i, (prompt, setting) in enumerate(zip(prompts, settings, strict=True))
    ]
    found = run(engine, requests)
    changed = 0
    for prompt, setting, output in zip(prompts, settings, found, strict=True):
        assert output.token_ids == _penalised(plain, prompt, 16, **setting)
        plainly = run_one(engine, prompt, max_tokens=16, ignore_eos=True)
        changed += plainly.token_ids != output.token_ids
    assert changed >= 4


def test_seeds_become_32_bits_that_tell_64_bit_seeds_apart():
    seeds = [0, 1, -1, 2**32, 2**63, 2**64 - 2]
    made = [
        sequence.make_sequence(
            ask("a", [1], seed=seed), vocab_size=4, max_context_len=8, eos_ids=()
        ).seed
        for seed in seeds
    ]
    assert len(set(made)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in made)


def test_the_golden_folder_ends_texts_where_these_tests_say():
    config = json.loads((CASE.path / "config.json").read_text())
    assert (config["eos_token_id"], config["vocab_size"]) == (_EOS, _VOCAB)
