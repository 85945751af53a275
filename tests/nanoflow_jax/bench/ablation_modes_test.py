"""Which modes there are, what sets them apart, and that none is left out silently."""

import pytest

from nanoflow_jax import config
from nanoflow_jax.bench import ablation_modes
from nanoflow_jax.bench.ablation_modes import Plans
from nanoflow_jax.config import Executor, KernelUse
from nanoflow_jax.engine import compiler, executors
from nanoflow_jax.nanobatch import builders, dependencies, legality
from nanoflow_jax.nanobatch.operations import LayerShape
from nanoflow_jax.results.ablation import Role

_KERNELS = config.KernelsSection()
_PLANS = Plans(
    one=builders.one(LayerShape(), num_tokens=512),
    cut=builders.halves(LayerShape(), num_tokens=512),
)
_SCHEDULING = "xla_gpu_command_buffer_scheduling_mode"


def _graph_alone(asked, plans, *, on_gpu):
    if asked is not Executor.GRAPH:
        raise ValueError(f"no {asked} here")
    return asked


@pytest.fixture
def graphs(monkeypatch):
    monkeypatch.setattr(executors, "choose", _graph_alone)
    found = ablation_modes.find(_PLANS, _KERNELS, on_gpu=True, controls=True)
    return {mode.name: mode for mode in found.modes}


def test_every_executor_is_a_mode_or_missing_with_its_reason(monkeypatch):
    monkeypatch.setattr(executors, "choose", _graph_alone)
    found = ablation_modes.find(_PLANS, _KERNELS, on_gpu=True, controls=False)
    others = [e for e in Executor if e not in (Executor.AUTO, Executor.SEQUENTIAL)]
    names = {f"overlapped ({executor})" for executor in others}
    there = {mode.name for mode in found.modes if mode.role is Role.OVERLAPPED}
    assert there | found.missing.keys() == names
    assert there == {"overlapped (graph)"}
    assert all(reason.startswith("no ") for reason in found.missing.values())


def test_without_a_gpu_graphs_and_their_controls_are_missing_with_a_reason():
    found = ablation_modes.find(_PLANS, _KERNELS, on_gpu=False, controls=True)
    names = ["sequential", "sequential, our products", "split only", "split only again"]
    assert [mode.name for mode in found.modes if mode.role is not Role.OVERLAPPED][:3] == names[:3]
    assert found.modes[-1].role is Role.AGAIN
    controls = [name for name in found.missing if name.startswith("control: ")]
    assert len(controls) == 4
    assert "there is no GPU here" in found.missing["overlapped (graph)"]


def test_modes_without_overlap_use_all_sms(graphs):
    plain, ours, split = (
        graphs[name] for name in ("sequential", "sequential, our products", "split only")
    )
    assert plain.plan == ours.plan == _PLANS.one
    assert (plain.kernels.gemm, ours.kernels.gemm) == (KernelUse.AUTO, KernelUse.PALLAS)
    assert split.executor is Executor.SEQUENTIAL
    assert split.plan.cells == _PLANS.cut.cells
    assert {nano.num_ctas for nano in split.plan.order} == {None}
    # XLA would make one product of two that share a weight.
    assert split.compiler_options == {"xla_gpu_dot_merger_threshold_mb": 0}
    assert not split.caps_products
    assert not split.keep_lanes


def test_an_overlapped_mode_is_what_an_engine_runs(graphs):
    mode = graphs["overlapped (graph)"]
    assert mode.plan == _PLANS.cut
    assert mode.keep_lanes
    assert mode.caps_products
    # Beside what an engine tells XLA: a trace is to show graphs, not what they would be without.
    in_traces = {"xla_enable_command_buffers_during_profiling": True}
    assert mode.compiler_options == executors.compiler_options(Executor.GRAPH) | in_traces
    assert compiler.refused_options(in_traces) == {}
    again = graphs["overlapped (graph) again"]
    assert (again.role, again.plan) == (Role.AGAIN, mode.plan)


def test_each_control_takes_one_thing_away_from_the_graph(graphs):
    graph = graphs["overlapped (graph)"]
    default, serialised = (
        graphs[f"control: {name}"] for name in ("XLA's default order", "serialised")
    )
    assert graph.compiler_options[_SCHEDULING] == "CONCURRENT"
    assert serialised.compiler_options == {**graph.compiler_options, _SCHEDULING: "SERIALIZE"}
    assert default.compiler_options.keys() == graph.compiler_options.keys() - {_SCHEDULING}
    assert default.plan == serialised.plan == graph.plan
    wide, chained = (graphs[f"control: {name}"] for name in ("all SMs for each", "one lane"))
    assert wide.compiler_options == chained.compiler_options == graph.compiler_options
    assert wide.caps_products
    assert {nano.num_ctas for nano in wide.plan.order} == {None}


def test_two_kernels_of_all_sms_are_no_legal_plan():
    with pytest.raises(ValueError, match="may run at once and ask for"):
        legality.check(_PLANS.uncapped)


def test_in_one_lane_nothing_may_run_beside_something_else():
    legality.check(_PLANS.chained)

    def at_once(plan):
        return len(dependencies.Dependencies(plan, [plan.graph] * 4).widest_cut()[1])

    assert (at_once(_PLANS.cut), at_once(_PLANS.chained)) == (2, 1)
