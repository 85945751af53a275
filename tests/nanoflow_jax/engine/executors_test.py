import pytest

from nanoflow_jax.config import Executor
from nanoflow_jax.engine import executors
from nanoflow_jax.nanobatch import builders
from nanoflow_jax.nanobatch.operations import LayerShape

_ONE = builders.one(LayerShape(), num_tokens=512)
_HALVES = builders.halves(LayerShape(), num_tokens=512)


@pytest.mark.parametrize(
    ("asked", "plans", "on_gpu", "wanted"),
    [
        (Executor.AUTO, [_ONE, _HALVES], True, Executor.GRAPH),
        (Executor.AUTO, [_ONE], True, Executor.SEQUENTIAL),
        (Executor.AUTO, [_HALVES], False, Executor.SEQUENTIAL),
        (Executor.GRAPH, [_ONE], True, Executor.GRAPH),
        (Executor.SEQUENTIAL, [_HALVES], True, Executor.SEQUENTIAL),
    ],
)
def test_graphs_are_made_where_a_plan_cuts_and_there_is_a_gpu(asked, plans, on_gpu, wanted):
    assert executors.choose(asked, plans, on_gpu=on_gpu) is wanted


def test_graphs_without_a_gpu_are_refused():
    with pytest.raises(ValueError, match="--executor=graph makes CUDA graphs, and there is no GPU"):
        executors.choose(Executor.GRAPH, [_HALVES], on_gpu=False)


def test_only_graphs_need_options_and_lanes():
    assert executors.compiler_options(Executor.SEQUENTIAL) == {}
    assert not executors.keeps_lanes(Executor.SEQUENTIAL)
    assert executors.compiler_options(Executor.GRAPH)["xla_gpu_dot_merger_threshold_mb"] == 0
    assert executors.keeps_lanes(Executor.GRAPH)


def test_halves_cap_products_and_the_plain_pass_does_not():
    assert executors.caps_products([_ONE, _HALVES])
    assert not executors.caps_products([_ONE])
