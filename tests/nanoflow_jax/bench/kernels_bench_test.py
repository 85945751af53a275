"""The timing of kernels: what is timed and what is not, resuming, and one run of real kernels."""

import os

import batch_runs
import jax.numpy as jnp
import kernel_runs
import pytest
import toy_kernels
from toy_kernels import double, task, variant

from nanoflow_jax.bench import clock as clock_lib
from nanoflow_jax.bench import device_check, kernel_bench, kernel_tasks, kernel_timing, measured
from nanoflow_jax.results import folder, manifest
from pallas_kernels import problem_shapes

_SHAPE = problem_shapes.tiny_problems()[0].shape
_EFFORT = kernel_timing.Effort(rounds=3, interpreted=True)


class _Clock:
    """Every call takes a second; remembers the method asked for."""

    method = clock_lib.CUPTI

    def __init__(self):
        self.methods = []

    def seconds(self, call, *, calls, method=None):
        self.methods.append(method)
        for number in range(calls):
            call(number)
        return 1.0


def _measure(*variants, effort=_EFFORT, clock=None, **how):
    made = task(_SHAPE, *variants)
    return list(kernel_timing.measure(made, "case", clock=clock or _Clock(), effort=effort, **how))


def test_ways_that_are_right_are_timed_in_rounds_to_and_fro():
    found = _measure(variant(double, num_ctas=2), variant(double, "xla"))
    assert [(one["mode"], one["round"]) for one in found] == [
        ("pallas 2", 0),
        ("xla", 0),
        ("xla", 1),
        ("pallas 2", 1),
        ("pallas 2", 2),
        ("xla", 2),
    ]
    assert found[0] == {
        "case": "case",
        "mode": "pallas 2",
        "way": "pallas",
        "num_ctas": 2,
        "split": None,
        "round": 0,
        "calls": 1,
        "seconds": 1.0,
        "method": "cupti",
        "error": 0.0,
    }


@pytest.mark.parametrize(
    ("function", "fault"),
    [
        (lambda x: 2.01 * x, "wrong: error 5.0e-03, at most 1e-03 wanted"),
        (lambda x: x * jnp.nan, "wrong: error nan, at most 1e-03 wanted"),
        (lambda x: x[:2], "failed: results of shapes [(2,)] instead of [(4,)]"),
        (lambda x: x.reshape(3), "failed: cannot reshape array of shape (4,) (size 4) into shape"),
    ],
    ids=["far", "nan", "shape", "refused"],
)
def test_a_way_that_is_wrong_is_said_to_be_and_not_timed(function, fault):
    wrong, *others = _measure(variant(function, num_ctas=1), variant(double, "xla"))
    assert wrong["fault"].startswith(fault)
    assert "seconds" not in wrong
    assert {one["mode"] for one in others} == {"xla"}


def test_a_way_that_rounds_in_between_may_be_farther_off():
    found = _measure(variant(lambda x: 2.01 * x, "xla", slack=10.0))
    assert [one["mode"] for one in found] == ["xla"] * 3


def test_results_are_compared_in_the_form_of_the_reference():
    turned = variant(lambda x: 2 * x[::-1], view=lambda operands, results: (results[0][::-1],))
    assert len(_measure(turned)) == 3


def test_a_function_of_another_library_is_called_as_it_is():
    seen = []

    def call(x):
        seen.append(type(x))
        return 2 * x

    assert len(_measure(variant(call, "torch", compiled=False))) == 3
    assert len(seen) == 4  # once to be compared, then timed


def test_a_way_is_compiled_once_for_all_its_shares():
    traced = []

    def function(x, more):
        traced.append(1)
        return x + x + 0 * more

    one = variant(function, num_ctas=1, more=(jnp.float32(1),))
    other = kernel_timing.Variant(way=one.way, num_ctas=2, more=(jnp.float32(2),))
    assert len(_measure(one, other)) == 6
    assert len(traced) == 1


def test_operands_rotate_and_calls_fill_a_sample_where_nothing_is_interpreted():
    seen = []

    def call(x):
        seen.append(float(x[0]))
        return 2 * x

    effort = kernel_timing.Effort(rounds=1, sample_s=5.0)
    (found,) = _measure(variant(call, "torch", compiled=False), effort=effort)
    assert found["calls"] == 5
    # Compared, timed to know how long it takes, then timed.
    assert seen == [0.0, 0.0, 1.0, 0.0, 1.0, 2.0, 3.0, 4.0]


def test_what_overlaps_is_timed_by_the_wall_clock():
    clock = _Clock()
    way = kernel_timing.Variant(
        way=toy_kernels.Way(name="both", function=lambda x: (2 * x,), is_wall=True)
    )
    assert {one["method"] for one in _measure(way, clock=clock)} == {"wall"}
    assert set(clock.methods) == {"wall"}


def test_what_was_measured_before_is_not_measured_again():
    ways = variant(double, num_ctas=2), variant(double, "xla")
    done = {("pallas 2", 0), ("xla", 0), ("xla", 1), ("xla", 2)}
    found = _measure(*ways, done=done)
    assert [(one["mode"], one["round"]) for one in found] == [("pallas 2", 1), ("pallas 2", 2)]


def test_rounds_after_the_first_are_left_out_when_it_is_late():
    found = _measure(variant(double, "xla"), is_late=lambda: True)
    assert [one["round"] for one in found] == [0]


@pytest.mark.parametrize(
    ("layers", "kernels", "message"),
    [
        (
            ["gpt"],
            [],
            "--shapes: gpt not among llama-3-8b, llama-3-70b-tp8, qwen3-32b-tp4, mixtral-8x7b",
        ),
        (
            [],
            ["gemm", "softmax"],
            "--kernels: softmax not among gemm, decode_attention, prefill_attention, grouped_gemm, "
            "fused",
        ),
        (
            ["llama-3-8b"],
            ["grouped_gemm"],
            "--shapes=llama-3-8b have no problem of --kernels=grouped_gemm",
        ),
    ],
)
def test_names_that_are_not_known_are_refused(layers, kernels, message):
    with pytest.raises(ValueError, match=message):
        kernel_bench.select(layers, kernels, on_gpu=True)


def test_problems_are_those_of_the_layers_and_kernels():
    found = kernel_bench.select(["mixtral-8x7b"], ["gemm"], on_gpu=True)
    assert {problem.operation for problem in found} == {"kqv", "o"}
    assert len(kernel_bench.select([], [], on_gpu=True)) == 110
    tiny = kernel_bench.select(["llama-3-8b"], ["fused"], on_gpu=False)
    assert [problem.layer for problem in tiny] == ["tiny"]


def test_shares_are_multiples_of_eight_and_the_whole():
    assert kernel_tasks.shares(132) == (*range(8, 132, 8), 132)
    assert kernel_tasks.shares(2) == (1, 2)


@pytest.fixture
def _toys(monkeypatch):
    toy_kernels.replace(monkeypatch.setattr)


def _run(root, **changes):
    said = []
    clock = changes.pop("clock", None)
    reports = measured.Reports(
        say=said.append, **({} if clock is None else {"clock": clock}), **changes.pop("more", {})
    )
    return kernel_bench.run(toy_kernels.options(root, **changes), reports), said


@pytest.mark.usefixtures("_toys")
def test_a_run_leaves_a_folder_with_all_that_was_measured(tmp_path):
    found, said = _run(tmp_path)
    result = folder.read(tmp_path / found.folder)
    assert (found.status, found.message) == ("done", "")
    timed = [sample for sample in result.samples if sample.seconds is not None]
    assert len(timed) == 5 * 3 * 2  # problems, modes, rounds
    missing = [sample for sample in result.samples if sample.is_missing]
    assert [sample.case for sample in missing] == toy_kernels.NAMES
    assert folder.damages(result.path, found, result.kind) == []
    assert (result.path / "curves.svg").read_text().count("<g ") == 5
    assert "not checked: driver: there is no GPU" in (result.path / "log.txt").read_text()
    assert f"results: {result.path}" in said
    assert "pallas_kernels/decode_role.py" in found.origin.kernel_sources


@pytest.mark.usefixtures("_toys")
def test_nothing_is_claimed_from_a_device_that_is_not_fit(tmp_path, monkeypatch):
    finding = device_check.Finding(name="clocks", ok=False, detail="held down by heat")
    checked = device_check.Checked(findings=(finding,), ceilings={}, driver="")
    monkeypatch.setattr(device_check, "check", lambda clock: checked)
    found, said = _run(tmp_path, kernels=["gemm"])
    assert (found.status, found.figures, found.unfit) == ("failed", (), checked.unfit)
    assert found.message == "the device was not fit to be measured: clocks: held down by heat"
    assert finding.line in said
    assert folder.read(tmp_path / found.folder).samples


@pytest.mark.usefixtures("_toys")
def test_a_second_run_of_a_day_has_a_folder_of_its_own(tmp_path):
    first, _ = _run(tmp_path, kernels=["gemm"])
    second, _ = _run(tmp_path, kernels=["gemm"])
    assert (first.run.name, second.run.name) == ("kernels", "kernels-2")


@pytest.mark.usefixtures("_toys")
def test_what_there_is_no_time_for_is_named(tmp_path):
    ticks = iter(range(10_000))
    found, said = _run(tmp_path, clock=lambda: 10.0 * next(ticks), budget_s=50.0)
    cases = {sample.case for sample in folder.read(tmp_path / found.folder).samples}
    assert cases == {toy_kernels.NAMES[0]}
    left_out = [f"not measured, for want of time: {name}" for name in toy_kernels.NAMES[1:]]
    assert said[-4:] == left_out
    assert found.status == "done"


@pytest.mark.usefixtures("_toys")
def test_an_interrupted_run_is_marked_so_and_keeps_its_samples(tmp_path):
    def interrupt(done, total, note):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path, more={"progress": interrupt})
    (path,) = tmp_path.glob("*/*")
    found = manifest.read(path)
    assert (found.status, found.message) == ("failed", "interrupted")
    assert len(folder.read(path).samples) == 7


@pytest.mark.usefixtures("_toys")
def test_a_run_that_was_killed_before_it_wrote_a_manifest_is_passed_by(tmp_path):
    found, _ = _run(tmp_path, kernels=["gemm"])
    (tmp_path / found.folder / manifest.MANIFEST).unlink()
    second, said = _run(tmp_path, kernels=["gemm"])
    assert (second.run.name, second.status) == ("kernels-2", "done")
    assert any(line.startswith("not gone on with: ") and found.date in line for line in said)


def _without_room(monkeypatch):
    """Operands of products have no room."""

    def build(shape, setting):
        made = toy_kernels.build(shape, setting)
        if shape.KERNEL != "gemm":
            return made

        def draw(seed):
            raise RuntimeError("RESOURCE_EXHAUSTED: no room\nat 0x0")

        return kernel_timing.dataclasses.replace(made, draw=draw)

    toy_kernels.replace(monkeypatch.setattr)
    monkeypatch.setattr(kernel_tasks, "build", build)


def test_operands_without_room_are_a_fault_of_their_problem(tmp_path, monkeypatch):
    _without_room(monkeypatch)
    found, said = _run(tmp_path, kernels=["gemm", "decode_attention"])
    assert found.status == "done"
    message = "FAILED: tiny/gate_up/136, all: failed: RESOURCE_EXHAUSTED: no room"
    assert message in said


def test_operands_without_room_are_one_fault_of_a_run_that_is_gone_on_with(tmp_path, monkeypatch):
    _without_room(monkeypatch)
    options = toy_kernels.options(tmp_path, kernels=["gemm", "decode_attention"])
    real = kernel_bench.ResultWriter.finish
    monkeypatch.setattr(kernel_bench.ResultWriter, "finish", lambda self: os.close(self._samples))
    monkeypatch.setattr(kernel_bench.ResultWriter, "__exit__", lambda self, *error: None)
    kernel_bench.run(options, measured.Reports(say=lambda line: None))
    monkeypatch.setattr(kernel_bench.ResultWriter, "finish", real)
    found, _ = _run(tmp_path, kernels=["gemm", "decode_attention"])
    assert (found.run.name, found.status, found.message) == ("kernels", "done", "")
    samples = folder.read(tmp_path / found.folder).samples
    assert [sample.case for sample in samples if sample.mode == "all"] == ["tiny/gate_up/136"]


_KILLED = """
import os, pathlib, signal, sys
import toy_kernels
from nanoflow_jax.bench import kernel_bench, measured
toy_kernels.replace(setattr)
def progress(done, total, note):
    if done == 2:
        os.kill(os.getpid(), signal.SIGKILL)
reports = measured.Reports(say=lambda line: None, progress=progress)
kernel_bench.run(toy_kernels.options(pathlib.Path(sys.argv[1])), reports)
"""


@pytest.mark.usefixtures("_toys")
def test_a_killed_run_is_gone_on_with_and_measures_nothing_again(tmp_path, monkeypatch):
    batch_runs.run_until_killed(_KILLED, tmp_path)
    monkeypatch.setattr(os, "environ", batch_runs.environment())
    cases = []
    real = kernel_timing.measure

    def measure(task, case, **how):
        cases.append(case)
        return real(task, case, **how)

    monkeypatch.setattr(kernel_timing, "measure", measure)
    found, _ = _run(tmp_path)
    assert (found.run.name, found.status) == ("kernels", "done")
    assert cases == toy_kernels.NAMES[2:]
    assert len(folder.read(tmp_path / found.folder).samples) == 5 * 7


@kernel_runs.needs_interpreter
@pytest.mark.timeout(240)
def test_real_kernels_are_timed_where_there_is_no_gpu(tmp_path):
    found, _ = _run(tmp_path, kernels=["gemm"])
    result = folder.read(tmp_path / found.folder)
    assert {sample.mode for sample in result.samples if sample.seconds} == {
        "pallas 1",
        "pallas 2",
        "pallas, static grid 2",
        "xla",
    }
    assert not [s for s in result.samples if s.fault and not s.is_missing]


@kernel_runs.needs_interpreter
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_kernels_are_right_where_there_is_no_gpu(tmp_path):
    found, _ = _run(tmp_path)
    samples = folder.read(tmp_path / found.folder).samples
    assert not [s for s in samples if s.fault and not s.is_missing]
    assert {s.case for s in samples} == set(toy_kernels.NAMES)
