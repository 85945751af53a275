"""What is launched: nothing compiles in a step, and nothing that a step reads is written again."""

import jax
import numpy as np
import pytest
from engine_runs import ask, build_small, run
from llama_engine import CASE, KNOBS, greedy

from nanoflow_jax.engine import runner


@pytest.fixture(scope="module")
def engine():
    made = build_small(CASE.path, **KNOBS)
    yield made
    made.close()


def _busy_requests():
    """A request of every kind."""
    long, short = CASE.prompts[9], CASE.prompts[3]
    shared = {"max_tokens": 10, "ignore_eos": True}
    return [
        ask("greedy", long, **shared),
        ask("drawn", short, **shared, temperature=0.9, top_p=0.8, top_k=30, min_p=0.01, seed=3),
        ask("penalties", short, **shared, frequency_penalty=1.0, repetition_penalty=1.2),
        ask("bias", short, **shared, logit_bias={4: 2.0}, allowed_token_ids=tuple(range(200))),
        ask("bans", short, max_tokens=10, min_tokens=6, stop_token_ids=[7], logprobs=5),
        ask("prompt", long, **shared, prompt_logprobs=4, logprobs=2, temperature=0.7, seed=8),
    ]


def test_nothing_compiles_in_a_step_whatever_is_asked(engine):
    run(engine, _busy_requests())
    assert engine.num_late_compiles == 0
    assert set(engine.compile_seconds) == {
        "forward 24:12:12",
        "sample 12 greedy",
        "sample 12 filtered",
        "sample 12 full",
        "prompt_logprobs",
        "reset_penalties",
    }


def test_a_compilation_in_a_step_is_counted(engine, monkeypatch):
    build = engine._inputs.build

    def compile_too(*arguments):
        jax.jit(lambda x: x * 5 - 2)(np.zeros(3, np.float32))
        return build(*arguments)

    monkeypatch.setattr(engine._inputs, "build", compile_too)
    engine.add(ask("a", [5], max_tokens=1))
    engine.step()
    assert engine.num_late_compiles == 1
    engine._runner.watch.num_late = 0
    monkeypatch.undo()
    while engine.has_work:
        engine.step()


def _vectors(inputs):
    if isinstance(inputs, runner.SampleInputs):
        return [inputs.vector]
    return [inputs.vector, *inputs.resets, *(part.vector for part in inputs.prompt_slices)]


def test_a_vector_handed_to_a_step_is_never_written_again(engine, monkeypatch):
    wanted = [output.token_ids for output in run(engine, _busy_requests())]
    launches, given = engine._runner, []
    forward, sample = launches.forward, launches.sample

    def remember(inputs):
        given.extend((vector, vector.copy()) for vector in _vectors(inputs))

    def remember_forward(inputs):
        remember(inputs)
        return forward(inputs)

    def remember_sample(forwarded, inputs):
        if inputs is not None:
            remember(inputs)
        return sample(forwarded, inputs)

    monkeypatch.setattr(launches, "forward", remember_forward)
    monkeypatch.setattr(launches, "sample", remember_sample)
    assert [output.token_ids for output in run(engine, _busy_requests())] == wanted
    assert len(given) > 20
    for i, (vector, then) in enumerate(given):
        np.testing.assert_array_equal(vector, then)
        assert vector.flags.owndata
        assert not any(np.shares_memory(vector, other) for other, _ in given[:i])


def _scramble(made):
    """Overwrites all that the host knows of a request; returns how to put it back."""
    tokens, bias = list(made.token_ids), [part.copy() for part in made.bias]
    allowed = None if made.allowed is None else made.allowed.copy()
    made.token_ids[:] = [0] * len(tokens)
    for part in made.bias:
        part[...] = 1
    if made.allowed is not None:
        made.allowed[...] = 0

    def restore():
        made.token_ids[:] = tokens
        for part, old in zip(made.bias, bias, strict=True):
            part[...] = old
        if allowed is not None:
            made.allowed[...] = allowed

    return restore


def test_changing_what_the_host_knows_after_launch_changes_nothing(monkeypatch):
    stepwise = build_small(CASE.path, **KNOBS, async_scheduling=False)
    wanted = [output.token_ids for output in run(stepwise, _busy_requests())]
    launches, undo = stepwise._runner, []
    sample, collect = launches.sample, launches.collect

    def sample_and_scramble(forwarded, inputs):
        launched = sample(forwarded, inputs)
        undo.extend(_scramble(made) for made in stepwise._sequences.values())
        return launched

    def collect_and_restore(launched):
        collected = collect(launched)
        while undo:
            undo.pop()()
        return collected

    monkeypatch.setattr(launches, "sample", sample_and_scramble)
    monkeypatch.setattr(launches, "collect", collect_and_restore)
    assert [output.token_ids for output in run(stepwise, _busy_requests())] == wanted
    stepwise.close()


def test_one_step_at_a_time_has_no_surplus_and_answers_in_the_same_step():
    stepwise = build_small(CASE.path, **KNOBS, async_scheduling=False)
    tokens = greedy(2, 1)
    stepwise.add(ask("a", CASE.prompts[2], max_tokens=9, ignore_eos=True, stop_token_ids=tokens))
    assert [update.token_ids for update in stepwise.step()] == [(tokens[0],)]
    assert not stepwise.has_work
    assert stepwise.counters.surplus_tokens == 0
    stepwise.close()


def test_closing_waits_for_the_step_in_flight():
    made = build_small(CASE.path, **KNOBS)
    made.add(ask("a", CASE.prompts[2], max_tokens=9))
    made.step()
    made.close()
    assert made._in_flight is None
