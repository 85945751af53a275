"""Runs of the ablation on a tiny model: same tokens as an engine's, faults found, resuming."""

import contextlib
import dataclasses
import os
import pathlib

import batch_runs
import engine_runs
import jax
import numpy as np
import pytest

from nanoflow_jax import config
from nanoflow_jax.bench import (
    ablation_bench,
    ablation_device,
    ablation_ground,
    ablation_modes,
    ablation_programs,
    ablation_scale,
    ablation_trace,
    ablation_turn,
    measured,
    steady_state,
)
from nanoflow_jax.bench.ablation_scale import Scale
from nanoflow_jax.bench.steady_state import Lengths, Load
from nanoflow_jax.config import Executor
from nanoflow_jax.engine import executors, model_source
from nanoflow_jax.results import ablation, folder, manifest

_SCALE = Scale(
    lengths=(Lengths(prompt=6, output=4),),
    sweep=(8, 32),
    sweep_lengths=Lengths(prompt=4, output=3),
    dense_batch=16,
    rounds=2,
    steps=3,
    control_rounds=1,
    judged_steps=2,
    traced_steps=2,
)
_ALONE = dataclasses.replace(_SCALE, sweep=(), traced_steps=0)


def _engine(**knobs):
    return config.EngineConfig.from_knobs(
        **{"model": str(batch_runs.FOLDER), "dtype": "float32", "cache_page_size": 8, **knobs}
    )


def _options(root, scale=_SCALE, **knobs):
    return ablation_bench.Options(
        engine=_engine(**knobs), scale=scale, budget_s=1000.0, root=root, command=("bench",)
    )


def _run(root, scale=_SCALE, *, clock=None, progress=None, budget_s=1000.0, **knobs):
    said = []
    fields = {"say": said.append}
    if clock is not None:
        fields["clock"] = clock
    if progress is not None:
        fields["progress"] = progress
    options = dataclasses.replace(_options(root, scale, **knobs), budget_s=budget_s)
    found = ablation_bench.run(options, measured.Reports(**fields))
    return found, said


def _ground(**knobs):
    section = _engine(**knobs)
    return ablation_ground.Ground(
        config=section, source=model_source.open_model(section.model), device=jax.devices()[0]
    )


def test_a_run_leaves_a_folder_with_all_modes_on_the_same_steps(tmp_path):
    found, said = _run(tmp_path)
    assert (found.status, found.message) == ("done", "")
    result = folder.read(tmp_path / found.folder)
    assert folder.damages(result.path, found, result.kind) == []
    cases = ablation.timed(result.samples)
    assert [*cases] == ["6/4", "batch 8", "batch 32"]
    assert [*cases["batch 8"]] == ["sequential"]  # nothing of it can be cut
    assert [*cases["batch 32"]] == ["sequential", "split only"]
    assert {name: len(one.rounds) for name, one in cases["6/4"].items()} == {
        "sequential": 2,
        "split only": 2,
        "split only again": 1,
        "decode attention alone": 2,
    }
    steps = [one for one in result.samples if isinstance(one, ablation.Step)]
    assert {one.tokens for one in steps if one.case == "6/4"} == {16}
    assert [(one.mode, one.round) for one in steps if one.case == "6/4" and not one.step] == [
        ("sequential", 0),
        ("split only", 0),
        ("split only again", 0),
        ("decode attention alone", 0),
        ("decode attention alone", 1),
        ("split only", 1),
        ("sequential", 1),
    ]
    assert len({one.tokens_sha256 for one in steps if one.case == "6/4" and one.step == 0}) == 2
    compared = [one for one in result.samples if isinstance(one, ablation.Comparison)]
    assert len(compared) == 6
    assert all(one.tokens and not one.wrong for one in compared)
    traced = {one.mode: one for one in result.samples if isinstance(one, ablation.Traced)}
    assert [*traced] == ["sequential", "split only"]
    for one in traced.values():
        assert {"norm_kqv", "decode_attention", "o", "up_gate", "down"} <= one.operation_s.keys()
        assert all(0 < seconds < 60 for seconds in one.operation_s.values())
    figures = {one.name: one.median for one in found.figures}
    assert figures["6/4: down of split only, times as long as of sequential"] == pytest.approx(
        traced["split only"].operation_s["down"] / traced["sequential"].operation_s["down"]
    )
    assert result.tokens is not None
    assert len(set(result.tokens.hashes["6/4"].values())) == 1
    missing = {one.mode for one in result.samples if isinstance(one, ablation.Missing)}
    assert {"overlapped (graph)", "control: one lane", "sequential, our products"} <= missing
    assert found.run.plan["6/4"]["plans"]["split only"] == "halves"
    assert found.run.setting["head_parameters"] > 0
    assert f"results: {result.path}" in said


def test_what_is_replayed_draws_the_tokens_of_an_engine(monkeypatch):
    """Whole lives of requests, from an empty cache's first step on, in both kinds of plan."""
    asked = {}
    real = steady_state.sequence.make_sequence

    def remember(request, **how):
        asked[request.request_id] = request
        return real(request, **how)

    monkeypatch.setattr(steady_state.sequence, "make_sequence", remember)
    ground, load = _ground(), Load(lengths=Lengths(prompt=6, output=4), dense_batch=16)
    case = ablation_scale.Case(name="6/4", load=load)
    prepared = ablation_turn.prepare(ground, case, load, _ALONE)
    stage = ablation_device.Stage(ground, most_pages=load.num_pages(8))
    simulation = steady_state.Simulation(
        load,
        num_pages=stage.num_pages,
        page_size=8,
        vocab_size=ground.source.config.vocab_size,
    )
    writers = {mode.name: stage.workshop.builder(mode, load) for mode in prepared.modes}
    steps = simulation.record(12, writers)
    programs = stage.workshop.compile(prepared.modes, load, has_alone=False)
    engine = engine_runs.build_small(batch_runs.FOLDER, max_requests=8, dense_batch=32)
    for mode in prepared.modes:
        drawn = {}
        for step, ran in zip(steps, stage.run(programs, mode.name, steps), strict=True):
            for name, token in zip(step.samplers, ran.tokens.tolist(), strict=True):
                drawn.setdefault(name, []).append(token)
        whole = [n for n, tokens in drawn.items() if len(tokens) == asked[n].params.max_tokens]
        assert len(whole) > 8
        requests = [dataclasses.replace(asked[n], request_id=n) for n in whole]
        expected = [one.token_ids for one in engine_runs.run(engine, requests)]
        assert [drawn[n] for n in whole] == expected
    stage.close()
    engine.close()


def test_operations_that_cannot_be_traced_are_noted(tmp_path, monkeypatch):
    def operation_seconds(stage, programs, mode, steps):
        if mode == "sequential":
            raise ablation_trace.TraceError("somebody else does")
        return {}

    monkeypatch.setattr(ablation_trace, "operation_seconds", operation_seconds)
    monkeypatch.setattr(
        ablation_turn.step_trace, "programs_that_traces_know", contextlib.nullcontext
    )
    found, said = _run(tmp_path, dataclasses.replace(_ALONE, rounds=1, traced_steps=1))
    assert "6/4: operations of sequential not timed: somebody else does" in said
    assert "6/4: no operation of split only has its name in a trace" in said
    assert (found.status, found.message) == ("done", "")


def test_in_bfloat16_near_ties_are_left_out_and_the_rest_agrees(tmp_path):
    found, _ = _run(tmp_path, _ALONE, dtype="bfloat16")
    assert (found.status, found.message) == ("done", "")
    assert found.run.setting["dtype"] == "bfloat16"
    samples = folder.read(tmp_path / found.folder).samples
    compared = [one for one in samples if isinstance(one, ablation.Comparison)]
    assert all(one.tokens - one.ties > 0 and not one.wrong for one in compared)
    walk = (2 * found.run.model["num_layers"]) ** 0.5 / 2**8
    assert all(one.most_error == pytest.approx(walk) for one in compared)


def test_a_mode_that_computes_something_else_is_found(tmp_path, monkeypatch):
    real = ablation_programs.programs.build_forward

    def build_forward(*given, sizes, bucket, **how):
        made = real(*given, sizes=sizes, bucket=bucket, **how)
        if len(sizes.plans[bucket].cells) < 2:
            return made

        def forward(*arrays):
            result = made(*arrays)
            return dataclasses.replace(result, logits=-result.logits)

        return forward

    monkeypatch.setattr(ablation_programs.programs, "build_forward", build_forward)
    found, _ = _run(tmp_path, _ALONE)
    assert found.status == "failed"
    assert "6/4: split only drew " in found.message
    assert "6/4: logits of split only are off by" in found.message
    assert (
        "tokens.json: 6/4: modes sequential and split only gave different tokens" in found.message
    )


def test_a_mode_that_does_not_compile_is_missing_with_its_reason(tmp_path, monkeypatch):
    real = ablation_programs.compiler.compile_all

    def compile_all(jobs, **how):
        if "split only" in {job.name for job in jobs}:
            raise jax.errors.JaxRuntimeError("INTERNAL: no such thing\nat 0x0")
        return real(jobs, **how)

    monkeypatch.setattr(ablation_programs.compiler, "compile_all", compile_all)
    found, said = _run(tmp_path, _ALONE)
    assert "FAILED: 6/4: split only: INTERNAL: no such thing" in said
    samples = folder.read(tmp_path / found.folder).samples
    reasons = {one.mode: one.reason for one in samples if isinstance(one, ablation.Missing)}
    assert reasons["split only"] == "does not compile: INTERNAL: no such thing"
    assert {*ablation.timed(samples)["6/4"]} == {
        "sequential",
        "split only again",
        "decode attention alone",
    }


def test_what_does_not_compile_at_all_ends_the_run(tmp_path, monkeypatch):
    def compile_all(jobs, **how):
        raise jax.errors.JaxRuntimeError("INTERNAL: no such thing")

    monkeypatch.setattr(ablation_programs.compiler, "compile_all", compile_all)
    with pytest.raises(jax.errors.JaxRuntimeError, match="no such thing"):
        _run(tmp_path, _ALONE)
    (path,) = tmp_path.glob("*/*")
    assert manifest.read(path).status == "failed"


@pytest.mark.slow
def test_graphs_and_their_controls_are_programs_of_the_same_tokens(tmp_path, monkeypatch):
    """On a CPU their order is XLA's own, but plans, barriers and tokens are those of a GPU."""

    def choose(asked, plans, *, on_gpu):
        if asked in (Executor.AUTO, Executor.GRAPH):
            return Executor.GRAPH
        raise ValueError("another time")

    monkeypatch.setattr(executors, "choose", choose)
    # They say nothing to a CPU's compiler.
    monkeypatch.setattr(ablation_modes.Mode, "compiler_options", {})
    found, _ = _run(tmp_path, dataclasses.replace(_SCALE, traced_steps=0))
    result = folder.read(tmp_path / found.folder)
    assert (found.status, found.message) == ("done", "")
    modes = ablation.timed(result.samples)["6/4"]
    assert {name for name in modes if name.startswith(("control", "overlapped"))} == {
        "overlapped (graph)",
        "overlapped (graph) again",
        "control: XLA's default order",
        "control: serialised",
        "control: all SMs for each",
        "control: one lane",
    }
    hidden = [one.name for one in found.figures if ", hidden share of " in one.name]
    assert len(hidden) == 2 * 5
    assert {*ablation.timed(result.samples)["batch 8"]} == {"sequential"}
    assert {*ablation.timed(result.samples)["batch 32"]} == {"sequential", "overlapped (graph)"}


def test_what_there_is_no_time_for_is_named(tmp_path):
    ticks = iter(range(100_000))
    scale = dataclasses.replace(_SCALE, traced_steps=0)
    found, said = _run(tmp_path, scale, clock=lambda: 10.0 * next(ticks), budget_s=50.0)
    assert "6/4: 3 rounds not measured, for want of time" in said
    assert "not measured, for want of time: batch 8" in said
    assert found.status == "done"
    cases = ablation.timed(folder.read(tmp_path / found.folder).samples)
    assert {len(one.rounds) for one in cases["6/4"].values()} == {1}


def test_a_batch_that_memory_cannot_fill_is_left_out_by_name(tmp_path):
    scale = dataclasses.replace(_ALONE, sweep=(512,))
    pages = max(case.load.num_pages(8) for case in ablation_scale.cases(_ALONE))
    found, said = _run(tmp_path, scale, cache_num_pages=pages)
    assert "not measured, for want of memory: batch 512" in said
    assert [*found.run.plan] == ["6/4"]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (
            {"tensor_parallel": 2},
            "ablation compares modes on one device; leave out --tensor_parallel, --data_parallel",
        ),
        (
            {"executor": "sequential"},
            "--executor=sequential: ablation compares all executors that run here; leave it out",
        ),
        (
            {"batch_invariant": True},
            "ablation compares modes that change last bits; leave out --batch_invariant, whose",
        ),
        (
            {"plan_min_tokens": 64},
            "--plan=one does not cut a dense batch of 16 tokens; raise --dense_batch or lower "
            "--plan_granule",
        ),
    ],
)
def test_knobs_that_leave_nothing_to_compare_are_refused(tmp_path, knobs, message):
    with pytest.raises(ValueError, match=message):
        _run(tmp_path, _ALONE, **knobs)
    assert not [*tmp_path.iterdir()]


def test_parameters_are_counted_as_tokens_meet_them():
    section = config.ModelSection(model="preset:llama-3-8b", random_weights=True)
    found = ablation_bench.parameters(model_source.open_model(section).config)
    assert found["active_parameters"] == 8_030_261_248
    # At 512/512 half of the tokens go through the head.
    executed = found["layer_parameters"] + found["head_parameters"] / 2
    assert executed == pytest.approx(7.24e9, rel=1e-3)
    sparse = config.ModelSection(model="preset:mixtral-8x7b", random_weights=True)
    active = ablation_bench.parameters(model_source.open_model(sparse).config)["active_parameters"]
    assert active == pytest.approx(12.9e9, rel=0.01)


_KILLED = """
import os, pathlib, signal, sys
import ablation_bench_test as one
def progress(done, total, note):
    if done == 2:
        os.kill(os.getpid(), signal.SIGKILL)
one._run(pathlib.Path(sys.argv[1]), one._ALONE, progress=progress)
"""


def test_a_killed_run_is_gone_on_with_and_times_no_round_again(tmp_path, monkeypatch):
    batch_runs.run_until_killed(_KILLED, tmp_path, also=[pathlib.Path(__file__).parent])
    monkeypatch.setattr(os, "environ", batch_runs.environment())
    (path,) = tmp_path.glob("*/*")
    assert manifest.read(path).status == "running"
    timed = []
    real = ablation_device.Stage.run

    def run(self, programs, name, steps):
        timed.append(name)
        return real(self, programs, name, steps)

    monkeypatch.setattr(ablation_device.Stage, "run", run)
    found, _ = _run(tmp_path, _ALONE)
    assert (found.run.name, found.status, found.message) == ("ablation", "done", "")
    assert timed == ["split only again", "split only", "sequential"]
    again, _ = _run(tmp_path, _ALONE)
    assert again.run.name == "ablation-2"


def test_a_round_that_a_kill_cut_short_is_filled_up(tmp_path, monkeypatch):
    real = measured.ResultWriter.add_sample
    added = []

    def add_sample(self, sample):
        if sample["type"] == "step":
            added.append(sample)
            if len(added) == 5:
                raise SystemExit
        real(self, sample)

    monkeypatch.setattr(measured.ResultWriter, "add_sample", add_sample)
    # As a kill would, it leaves the folder as it is.
    monkeypatch.setattr(measured.ResultWriter, "__exit__", lambda self, *error: None)
    with pytest.raises(SystemExit):
        _run(tmp_path, _ALONE)
    monkeypatch.undo()
    for file in list(_open_files(tmp_path)):
        os.close(file)
    found, _ = _run(tmp_path, _ALONE)
    assert (found.run.name, found.status, found.message) == ("ablation", "done", "")


def _open_files(root):
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").startswith(str(root)):
                yield int(name)
        except OSError:
            continue


def test_the_numbers_of_a_refilled_cache_are_random_and_the_same_each_time():
    ground, load = _ground(), Load(lengths=Lengths(prompt=6, output=4), dense_batch=16)
    stage = ablation_device.Stage(ground, most_pages=load.num_pages(8))
    prepared = ablation_turn.prepare(
        ground, ablation_scale.Case(name="6/4", load=load), load, _ALONE
    )
    programs = stage.workshop.compile(prepared.modes[:1], load, has_alone=False)
    found = []
    for _ in range(2):
        stage.refill(programs)
        found.append([np.array(leaf) for leaf in jax.tree.leaves(stage._caches)])
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)
        assert abs(one.mean()) < 0.05
        assert abs(one.var() - 1) < 0.1
    assert not np.array_equal(found[0][0], found[0][2])
    stage.close()
