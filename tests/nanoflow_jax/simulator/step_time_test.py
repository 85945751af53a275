"""Predicted steps against arithmetic by hand and against what NanoFlow's paper prints."""

import dataclasses

import pytest

from nanoflow_jax.cost import datasheets, iteration, serving, tiles
from nanoflow_jax.cost.steady_state import Mix
from nanoflow_jax.models import huggingface, presets
from nanoflow_jax.nanobatch.operations import Resource
from nanoflow_jax.scheduler import buckets, scheduler
from nanoflow_jax.simulator import calibration, loop, measures
from nanoflow_jax.simulator.step_time import DATASHEET, Mode, Reached, Roofline, StepWork
from nanoflow_jax.workload import traces

_70B = huggingface.read_config(presets.load("llama-2-70b"))
_CLUSTER = serving.Cluster(accelerator=datasheets.accelerator("paper:a100-80g"), num_devices=8)
_NANOFLOW = calibration.nanoflow_a100()
_EVEN = calibration.steady_work(Mix(prompt_len=512, output_len=512), 2048)
_PRINTED = (Mode.SEQUENTIAL, Mode.SPLIT, Mode.OVERLAPPED, Mode.OFFLOADED)


def _speed(mode, work, reached=_NANOFLOW):
    """Tokens/s a device."""
    return work.tokens / 8 / Roofline(_70B, _CLUSTER, reached, mode).predict(work).device_s


def test_a_step_by_the_datasheet_is_the_sum_or_the_longest_of_the_bounds_of_its_operations():
    step = iteration.steady_step(Mix(prompt_len=512, output_len=512), 2048)
    costs = iteration.operation_costs(_70B, _CLUSTER, step)
    bounds = {one.name: one.least_s(_CLUSTER) for one in costs}
    found = Roofline(_70B, _CLUSTER, DATASHEET, Mode.SEQUENTIAL).predict(_EVEN)
    assert found.device_s == pytest.approx(sum(bounds.values()))
    computed = sum(bounds.values()) - bounds["decode_attention"] - bounds["collectives"]
    overlapped = Roofline(_70B, _CLUSTER, DATASHEET, Mode.OVERLAPPED).predict(_EVEN)
    assert overlapped.device_s == pytest.approx(computed)
    busy = sum(one.compute_s(_CLUSTER) for one in costs)
    assert found.busy_s[Resource.COMPUTE] == pytest.approx(busy)


def test_a_run_comes_to_the_steady_state_in_closed_form():
    tokens, mix = 256, Mix(prompt_len=64, output_len=64)
    served = loop.Served(
        limits=scheduler.Limits(
            max_requests=tokens, dense_batch=tokens, page_size=16, penalty_requests=0
        ),
        buckets=(buckets.Bucket(tokens=tokens, decode_rows=tokens, prefill_rows=tokens),),
        num_pages=10_000,
    )
    times = Roofline(_70B, _CLUSTER, _NANOFLOW, Mode.OVERLAPPED)
    run = loop.run(traces.generate(str(mix), 2000, seed=0), served, times)
    closed = tokens / times.predict(calibration.steady_work(mix, tokens)).device_s
    assert measures.steady_tokens_per_s(run) == pytest.approx(closed, rel=0.01)


@pytest.mark.parametrize("cut_s", [0.0, 0.1])
@pytest.mark.parametrize(
    "work", [StepWork(tokens=1, decode_rows=1, decode_context=10, chunk_pairs=0), _EVEN]
)
def test_the_best_mode_is_whichever_is_fastest_for_the_step(work, cut_s):
    reached = dataclasses.replace(_NANOFLOW, cut_s=cut_s)
    fastest = max(_speed(mode, work, reached) for mode in _PRINTED)
    assert _speed(Mode.BEST, work, reached) == pytest.approx(fastest)


def test_what_overlaps_takes_its_share_of_the_time_that_computing_has():
    shares = {Resource.MEMORY: 0.5, Resource.NETWORK: 0.25}
    taking = Roofline(_70B, _CLUSTER, Reached(source="", shares=shares), Mode.OVERLAPPED)
    busy = taking.lanes(_EVEN, cut=True).busy_s
    expected = busy[Resource.COMPUTE] + busy[Resource.MEMORY] / 2 + busy[Resource.NETWORK] / 4
    assert taking.predict(_EVEN).device_s == pytest.approx(expected)


def test_a_resource_that_is_busy_for_longer_than_all_else_bounds_the_step():
    work = dataclasses.replace(_EVEN, decode_context=1e8)
    step = Roofline(_70B, _CLUSTER, _NANOFLOW, Mode.OVERLAPPED)
    lanes = step.lanes(work, cut=True)
    assert step.predict(work).device_s == lanes.busy_s[Resource.MEMORY]


def test_idle_time_of_sms_is_used_as_far_as_it_is_refilled():
    whole, none, some = (
        Roofline(
            _70B, _CLUSTER, dataclasses.replace(_NANOFLOW, refilled_fraction=one), Mode.OVERLAPPED
        )
        for one in (1.0, 0.0, 0.25)
    )
    idle_s = whole.lanes(_EVEN, cut=True).idle_s
    assert idle_s > 0
    slow = none.predict(_EVEN).device_s
    assert slow - whole.predict(_EVEN).device_s == pytest.approx(idle_s)
    assert slow - some.predict(_EVEN).device_s == pytest.approx(idle_s / 4)


def test_the_first_product_is_cut_into_four_only_where_three_resources_are_busy():
    prompts = calibration.steady_work(Mix(prompt_len=512, output_len=0), 2048)
    times = Roofline(_70B, _CLUSTER, _NANOFLOW, Mode.SPLIT)
    kqv = next(one for one in tiles.products(_70B, 8) if one.name == "kqv")
    wave = _NANOFLOW.grid.time(kqv, 128, 1e30).seconds
    more = [times.lanes(work, cut=True).idle_s for work in (_EVEN, prompts)]
    # Four waves in place of two, which compute the same tiles.
    assert more[0] - more[1] == pytest.approx(2 * wave)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fractions": {"o": 1.5}}, "what is reached of a datasheet is between 0 and 1"),
        ({"refilled_fraction": -0.1}, "what is reached of a datasheet is between 0 and 1"),
        ({"shares": {Resource.MEMORY: 1.5}}, "what is reached of a datasheet is between 0 and 1"),
        ({"offload_factor": 0.9}, "neither cutting nor more work makes a step shorter"),
        ({"cut_s": -1.0}, "neither cutting nor more work makes a step shorter"),
    ],
)
def test_what_nothing_could_reach_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Reached(source="test", **changes)


def test_stages_are_refused():
    staged = dataclasses.replace(_CLUSTER, num_stages=2)
    with pytest.raises(ValueError, match="--stages=2: a run over pipeline stages cannot be"):
        Roofline(_70B, staged, DATASHEET, Mode.BEST)
