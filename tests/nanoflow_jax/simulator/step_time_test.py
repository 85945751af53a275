"""Predicted steps against arithmetic by hand and against what NanoFlow's paper prints."""

import dataclasses

import pytest

from nanoflow_jax.cost import datasheets, iteration, serving
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
_PRINTED = (Mode.SEQUENTIAL, Mode.SPLIT, Mode.OVERLAPPED)


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


def test_the_three_throughputs_that_were_fitted_come_out():
    found = [_speed(mode, _EVEN) for mode in _PRINTED]
    assert found == pytest.approx([1106, 982, 1323], rel=1e-9)


@pytest.mark.parametrize(
    ("mix", "printed"), [((1024, 512), (1092, 958, 1291)), ((512, 1024), (1048, 952, 1277))]
)
def test_other_columns_of_figure_9_are_predicted_within_4_percent(mix, printed):
    work = calibration.steady_work(Mix(prompt_len=mix[0], output_len=mix[1]), 2048)
    assert [_speed(mode, work) for mode in _PRINTED] == pytest.approx(printed, rel=0.04)


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


@pytest.mark.parametrize("split_factor", [1.0, 1.5])
@pytest.mark.parametrize(
    "work", [StepWork(tokens=1, decode_rows=1, decode_context=10, chunk_pairs=0), _EVEN]
)
def test_the_best_mode_is_whichever_is_fastest_for_the_step(work, split_factor):
    reached = dataclasses.replace(_NANOFLOW, split_factor=split_factor)
    fastest = max(_speed(mode, work, reached) for mode in _PRINTED)
    assert _speed(Mode.BEST, work, reached) == pytest.approx(fastest)


def test_half_hidden_is_half_way_from_the_sum_to_the_busiest_resource():
    half = Roofline(_70B, _CLUSTER, Reached(source="", hidden_fraction=0.5), Mode.OVERLAPPED)
    lanes = half.lanes_s(_EVEN).values()
    assert half.predict(_EVEN).device_s == pytest.approx((sum(lanes) + max(lanes)) / 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fractions": {"o": 1.5}}, "what is reached of a datasheet is between 0 and 1"),
        ({"hidden_fraction": -0.1}, "what is reached of a datasheet is between 0 and 1"),
        ({"split_factor": 0.9}, "neither cutting nor more work makes a step shorter"),
        ({"layer_s": -1.0}, "neither cutting nor more work makes a step shorter"),
    ],
)
def test_what_nothing_could_reach_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Reached(source="test", **changes)


def test_stages_are_refused():
    staged = dataclasses.replace(_CLUSTER, num_stages=2)
    with pytest.raises(ValueError, match="--stages=2: a run over pipeline stages cannot be"):
        Roofline(_70B, staged, DATASHEET, Mode.BEST)


def test_a_measured_step_shorter_than_its_operations_fits_nothing():
    fast = calibration.Throughputs(sequential=9999, split=982, overlapped=1323)
    with pytest.raises(ValueError, match=r"operations alone take .* and the whole step"):
        calibration.fit(DATASHEET, _70B, _CLUSTER, _EVEN, fast)
