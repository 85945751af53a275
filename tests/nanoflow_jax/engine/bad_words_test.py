"""Token sequences that must not be generated, in one batch with requests that know of none."""

import dataclasses

import pytest
from engine_runs import ask, build_small, run
from golden import cases

_CASE = cases.load("llama")


@pytest.fixture(scope="module")
def engine():
    made = build_small(
        _CASE.path, max_requests=12, dense_batch=24, buckets="24:12:12", cache_page_size=5
    )
    yield made
    made.close()


def _greedy(index, count):
    return _CASE.tokens[index][:count].tolist()


def _holds(tokens, sequence):
    return any(tuple(tokens[i : i + len(sequence)]) == sequence for i in range(len(tokens)))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bad_sequences_never_come_whole_though_their_beginnings_do(engine, temperature):
    asked = ask(
        "one", _CASE.prompts[5], max_tokens=40, temperature=temperature, seed=5, ignore_eos=True
    )
    (free,) = run(engine, [asked])
    a, b, c, d = free.token_ids[4:8]
    bad = ((free.token_ids[20],), (a, b), (b, c, d))
    assert all(_holds(free.token_ids, sequence) for sequence in bad)
    others = [ask(str(i), _CASE.prompts[i], max_tokens=40, ignore_eos=True) for i in range(2)]
    found, *left = run(engine, [dataclasses.replace(asked, bad_tokens=bad), *others])
    assert not any(_holds(found.token_ids, sequence) for sequence in bad)
    assert a in found.token_ids
    # What was drawn before the first of them is the same.
    first = min(i for i in range(40) if any(_holds(free.token_ids[: i + 1], s) for s in bad))
    assert found.token_ids[:first] == free.token_ids[:first]
    assert [output.token_ids for output in left] == [_greedy(i, 40) for i in range(2)]


def test_the_prompt_does_not_begin_a_bad_sequence(engine):
    prompt, (first, *_) = _CASE.prompts[5], _greedy(5, 1)
    bad = ((prompt[-1], first),)
    (found,) = run(engine, [ask("one", prompt, max_tokens=1, ignore_eos=True, bad_tokens=bad)])
    assert found.token_ids == [first]
