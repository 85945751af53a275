"""Steps of a constant load: full, steady, and the same for everybody."""

import types

import pytest

from nanoflow_jax.bench import steady_state
from nanoflow_jax.bench.steady_state import Lengths, Load, Simulation

_LOAD = Load(lengths=Lengths(prompt=24, output=16), dense_batch=64)


def _simulation(load=_LOAD, *, num_pages=None, seed=0):
    return Simulation(
        load,
        num_pages=num_pages or load.num_pages(8),
        page_size=8,
        vocab_size=50,
        seed=seed,
    )


class _Plans:
    """Keeps the plans that it is to write."""

    def __init__(self):
        self.plans = []

    def build(self, plan, sequences):
        self.plans.append(plan)
        return types.SimpleNamespace(
            vector=[len(sequences[r.request_id].token_ids) for r in plan.rows]
        )

    def build_sample(self, plan, sequences):
        return None


def _record(count, **how):
    simulation, plans = _simulation(**how), _Plans()
    simulation.warm_up()
    steps = simulation.record(count, {"a": plans, "b": plans})
    simulation.check()
    return steps, plans.plans


@pytest.mark.parametrize("text", ["512", "512/x", "/512", "0/4", "512-512"])
def test_lengths_of_another_form_are_refused(text):
    with pytest.raises(ValueError, match="is not PROMPT/OUTPUT in tokens, such as 512/512"):
        steady_state.parse_lengths(text)


def test_lengths_are_read_as_they_are_written():
    found = steady_state.parse_lengths("512/0")
    assert (found, str(found)) == (Lengths(prompt=512, output=0), "512/0")
    assert (found.decoded, found.longest) == (0, 513)


def test_a_load_has_as_many_decode_rows_as_come_and_go():
    # Of 24 + 15 tokens that a request costs, 15 are decode rows.
    assert _LOAD.decode_rows == round(64 * 15 / 39)
    assert str(_LOAD.bucket) == "64:32:4"


def test_every_step_is_full_and_as_old_as_the_one_before():
    steps, plans = _record(40)
    assert {step.tokens for step in steps} == {64}
    rows = [step.decode_rows for step in steps]
    assert abs(sum(rows) / len(rows) - 64 * 15 / 39) < 1.5
    seen = sum(step.context_tokens for step in steps) / sum(rows)
    assert 24 + 15 / 2 - 2 < seen < 24 + 15 / 2 + 3
    assert all(len(plan.decode) <= plan.bucket.decode_rows for plan in plans)


def test_one_builder_writes_once_for_all_its_modes():
    steps, plans = _record(3)
    assert len(plans) == 3
    assert steps[0].forwards["a"] is steps[0].forwards["b"]


def test_the_same_seed_gives_the_same_steps_and_another_others():
    assert _record(5)[0] == _record(5)[0]
    assert [s.samplers for s in _record(5)[0]] != [s.samplers for s in _record(5, seed=1)[0]]


def test_tokens_arrive_one_step_late_as_in_an_engine():
    steps, plans = _record(4)
    for step, plan in zip(steps, plans, strict=True):
        known = step.forwards["a"].vector
        # The newest token of a decode row is still on the device; a prompt's last is not.
        for row, count in zip(plan.decode, known, strict=False):
            assert count == row.start if row.start >= 24 else count == 24


def test_prompts_alone_have_no_decode_rows():
    load = Load(lengths=Lengths(prompt=24, output=0), dense_batch=64)
    steps, _ = _record(6, load=load)
    assert {(step.tokens, step.decode_rows) for step in steps} == {(64, 0)}
    assert sum(step.sampled_rows for step in steps) == 6 * 64 // 24


def test_a_prompt_longer_than_the_dense_batch_is_cut():
    load = Load(lengths=Lengths(prompt=24, output=4), dense_batch=8)
    steps, _ = _record(20, load=load)
    assert {step.tokens for step in steps} == {8}


def test_a_dense_batch_is_made_smaller_until_memory_keeps_it_full():
    found = steady_state.fit(_LOAD, num_pages=_LOAD.num_pages(8) - 1, page_size=8, granule=16)
    assert found.dense_batch == 48
    same = steady_state.fit(_LOAD, num_pages=_LOAD.num_pages(8), page_size=8, granule=16)
    assert same == _LOAD
    steps, _ = _record(10, load=found, num_pages=_LOAD.num_pages(8) - 1)
    assert {step.tokens for step in steps} == {48}


def test_a_cache_without_room_is_refused():
    with pytest.raises(
        ValueError, match="a cache of 3 pages of 8 tokens keeps no dense batch of 16"
    ):
        steady_state.fit(_LOAD, num_pages=3, page_size=8, granule=16)
