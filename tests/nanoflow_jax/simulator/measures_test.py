"""What is told of a run, worked out by hand; files and pictures of it."""

import dataclasses
import json

import numpy as np
import pictures as seen
import pytest

from nanoflow_jax.simulator import measures, pictures, result_file
from nanoflow_jax.simulator.loop import Run, StepRecord
from nanoflow_jax.simulator.result_file import OneRate, Simulation
from nanoflow_jax.workload.traces import Requests


def _step(start, end, *, new, waiting=0, replica=0):
    return StepRecord(
        replica=replica,
        start_s=start,
        end_s=end,
        bucket_tokens=16,
        tokens=new,
        decode_rows=0,
        new_tokens=new,
        pages_used=8,
        num_running=2,
        num_waiting=waiting,
        busy_s=(0.5 * (end - start), 0.25 * (end - start), 0.0),
    )


_RUN = Run(
    requests=Requests(
        input_lens=np.array([6, 9]), output_lens=np.array([4, 1]), arrivals_s=np.array([0.0, 1.0])
    ),
    first_s=np.array([2.0, 4.0]),
    end_s=np.array([8.0, 4.0]),
    generated=np.array([4, 1]),
    steps=(_step(0, 2, new=7), _step(2, 4, new=11, waiting=1), _step(6, 8, new=2)),
    num_preemptions=0,
    surplus_tokens=0,
)


def test_a_run_in_numbers_is_what_a_hand_finds():
    found = measures.summarise(_RUN)
    assert (found.num_requests, found.tokens, found.duration_s) == (2, 20, 8.0)
    assert found.tokens_per_s == pytest.approx(20 / 8)
    # Warm when 6 of 20 tokens are done, after the first step; until the last one that had a queue.
    assert found.steady_tokens_per_s == pytest.approx(11 / 2)
    assert found.ttft_s.mean == pytest.approx((2 + 3) / 2)
    assert found.tpot_s.mean == found.tpot_s.p99 == pytest.approx(6 / 3)
    assert found.normalised_s.mean == pytest.approx((8 / 4 + 3 / 1) / 2)
    assert found.normalised_s.p50 == pytest.approx(2.5)


def test_only_requests_after_the_warm_up_are_timed():
    found = measures.summarise(_RUN, warm_up_s=1.0)
    assert (found.ttft_s.mean, found.normalised_s.mean, found.tpot_s) == (3.0, 3.0, None)
    assert (found.num_requests, found.tokens) == (2, 20)
    with pytest.raises(ValueError, match=r"no request comes after 1\.5 s of warm-up; simulate for"):
        measures.summarise(_RUN, warm_up_s=1.5)


def test_a_run_without_a_queue_is_measured_whole():
    steps = (_step(0, 2, new=18), _step(2, 4, new=2))
    assert measures.steady_tokens_per_s(dataclasses.replace(_RUN, steps=steps)) == 5.0


def test_requests_of_one_token_have_no_time_between_tokens():
    short = dataclasses.replace(_RUN, generated=np.array([1, 1]))
    assert measures.summarise(short).tpot_s is None


def test_a_timeline_has_what_is_busy_and_held_in_each_stretch():
    found = measures.timeline(_RUN, num_pages=16, num_replicas=1)
    assert [(one.start_s, one.end_s) for one in found] == [
        pytest.approx((0, 8 / 3)),
        pytest.approx((8 / 3, 16 / 3)),
        pytest.approx((16 / 3, 8)),
    ]
    # The first 8/3 s hold all of the first step and a third of the second: always busy.
    assert found[0].busy == pytest.approx({"compute": 0.5, "memory": 0.25, "network": 0.0})
    assert found[0].tokens_per_s == pytest.approx((7 + 11 / 3) / (8 / 3))
    assert found[0].pages_fraction == pytest.approx(0.5)
    # Half of the second stretch: the device is idle from 4 s to 6 s.
    assert found[1].busy["compute"] == pytest.approx(0.25)
    assert found[1].num_waiting == pytest.approx(0.5)
    assert sum(one.tokens_per_s * 8 / 3 for one in found) == pytest.approx(20)
    two = measures.timeline(_RUN, num_pages=16, num_replicas=2)
    assert two[0].busy["compute"] == pytest.approx(0.25)


def test_the_highest_rate_lies_between_those_that_hold_and_miss_the_objective():
    latencies = {10.0: 0.1, 20.0: 0.3, 5.0: 0.1}
    assert measures.highest_rate(latencies, objective_s=0.2) == pytest.approx(15)
    assert measures.highest_rate(latencies, objective_s=0.05) is None
    assert measures.highest_rate(latencies, objective_s=0.4) is None


def _simulation(*rates):
    summary = measures.summarise(_RUN)
    shown = measures.timeline(_RUN, num_pages=16, num_replicas=1)
    return Simulation(
        name="6/4",
        title="a < b",
        settings={"seed": 0},
        source="test",
        num_devices=2,
        optimal_tokens_per_s=22.0,
        runs=tuple(OneRate(rate=one, summary=summary, timeline=shown) for one in rates),
    )


def test_a_file_gives_back_what_was_written(tmp_path):
    found = _simulation(None, 2.0)
    result_file.write(found, tmp_path / "s.json")
    assert result_file.read(tmp_path / "s.json") == found


@pytest.mark.parametrize("change", [{"schema": 2}, {"runs": [{}]}, {"title": None, "new": 1}])
def test_files_of_another_form_are_refused(tmp_path, change):
    path = tmp_path / "s.json"
    result_file.write(_simulation(None), path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match="is no result of a simulation of this version"):
        result_file.read(path)


def test_latency_is_drawn_by_rate_under_its_objective():
    root = seen.parse(pictures.latency(_simulation(4.0, 2.0), objective_s=2.0))
    words = seen.texts(root)
    assert {"a < b", "objective, 2000 ms", "mean", "p50", "p99"} <= set(words)
    # 2.5 s at both rates, of 8 s upwards, in 260 pixels.
    dots = [one for one in root.iter() if one.tag.endswith("circle")]
    assert len(dots) == 6
    assert float(dots[0].get("cy")) == pytest.approx(46 + 260 * (1 - 2.5 / 8), abs=0.1)
    assert float(dots[0].get("cx")) == pytest.approx(64 + 560 / 2.1, abs=0.1)


def test_what_is_printed_elsewhere_is_drawn_beside_and_fits_in():
    root = seen.parse(pictures.latency(_simulation(2.0), objective_s=2.0, printed={4.0: 2.0}))
    assert "mean, as printed" in seen.texts(root)
    dots = [one for one in root.iter() if one.tag.endswith("circle")]
    assert len(dots) == 4
    assert float(dots[-1].get("cx")) == pytest.approx(64 + 560 / 1.05, abs=0.1)
    assert float(dots[-1].get("cy")) == pytest.approx(46 + 260 * (1 - 2 / 8), abs=0.1)


def test_latency_is_not_drawn_of_requests_that_are_there_at_once():
    with pytest.raises(ValueError, match="all requests were there at once; simulate with --rates"):
        pictures.latency(_simulation(None), objective_s=1.0)


def test_throughput_has_a_bar_for_each_simulation_with_its_share_of_what_is_optimal():
    root = seen.parse(pictures.throughput([_simulation(None), _simulation(None)]))
    words = seen.texts(root)
    # 5.5 tokens/s of 22 on two devices.
    assert words.count("3, 25.0 %") == words.count("6/4") == 2
    bar = seen.bars(root)[0]
    assert float(bar.get("height")) == pytest.approx(260 * 2.75 / 12.1, abs=0.2)


def test_resources_are_drawn_over_time():
    words = seen.texts(seen.parse(pictures.resources(_simulation(2.0).runs[0], title="a < b")))
    named = {"a < b", "compute", "memory", "network", "pages held", "running", "waiting"}
    assert named <= set(words)
