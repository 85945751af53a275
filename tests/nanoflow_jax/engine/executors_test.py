import jax
import pytest

from nanoflow_jax.config import Executor
from nanoflow_jax.engine import compiler, executors, kernel_choice
from nanoflow_jax.engine.kernel_choice import Maker, Operation
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
        (Executor.STREAMS, [_HALVES], True, Executor.STREAMS),
        (Executor.FUSED, [_HALVES], True, Executor.FUSED),
        (Executor.SEQUENTIAL, [_HALVES], True, Executor.SEQUENTIAL),
    ],
)
def test_graphs_are_made_where_a_plan_cuts_and_there_is_a_gpu(asked, plans, on_gpu, wanted):
    assert executors.choose(asked, plans, on_gpu=on_gpu) is wanted


def test_what_needs_a_gpu_is_refused_without_one():
    with pytest.raises(ValueError, match="--executor=graph makes CUDA graphs, and there is no GPU"):
        executors.choose(Executor.GRAPH, [_HALVES], on_gpu=False)
    with pytest.raises(ValueError, match=r"--executor=streams starts attention .* no GPU"):
        executors.choose(Executor.STREAMS, [_HALVES], on_gpu=False)
    with pytest.raises(ValueError, match=r"--executor=fused runs products .* no GPU"):
        executors.choose(Executor.FUSED, [_HALVES], on_gpu=False)
    found = executors.choose(Executor.FUSED, [_HALVES], on_gpu=False, interprets=True)
    assert found is Executor.FUSED


def test_streams_are_refused_where_jax_cannot_name_one():
    with pytest.raises(ValueError, match=r"--executor=streams needs .* \(it has no compute_on\)"):
        executors.choose(
            Executor.STREAMS, [_HALVES], on_gpu=True, why_no_streams=lambda: "it has no compute_on"
        )
    asks_nobody = {"on_gpu": True, "why_no_streams": lambda: pytest.fail("graphs have no streams")}
    assert executors.choose(Executor.GRAPH, [_HALVES], **asks_nobody) is Executor.GRAPH


def _refuse_graphs(options):
    return {name: f"No such compile option: {name!r}" for name in options if "buffer" in name}


def test_an_option_that_jax_does_not_take_is_reported(caplog):
    caplog.set_level("WARNING")
    lacks = {"on_gpu": True, "refused_options": _refuse_graphs}
    with pytest.raises(ValueError, match=f"--executor=graph .* jax {jax.__version__} .*No such"):
        executors.choose(Executor.GRAPH, [_HALVES], **lacks)
    assert executors.choose(Executor.AUTO, [_HALVES], **lacks) is Executor.SEQUENTIAL
    assert "--executor=graph needs what jax" in caplog.text
    assert "xla_gpu_command_buffer_scheduling_mode" in caplog.text
    assert executors.choose(Executor.FUSED, [_HALVES], **lacks) is Executor.FUSED


@pytest.mark.parametrize("executor", [one for one in Executor if one is not Executor.AUTO])
def test_this_jax_takes_the_options_of_every_executor(executor):
    assert compiler.refused_options(executors.compiler_options(executor)) == {}


def _choices(**made):
    plain = kernel_choice.Choice(maker=Maker.PLAIN, reason="as asked")
    by_operation = dict.fromkeys(Operation, plain)
    for name, maker in made.items():
        by_operation[Operation(name)] = kernel_choice.Choice(maker=maker, reason="Hopper")
    return kernel_choice.Choices(by_operation=by_operation, num_ctas=132)


def test_one_kernel_of_several_is_refused_where_one_of_them_is_none_of_ours():
    both = {"gemm": Maker.MOSAIC, "decode_attention": Maker.MOSAIC}
    executors.check_kernels(Executor.FUSED, _choices(**both))
    for name, maker in (("gemm", Maker.PLAIN), ("decode_attention", Maker.TRITON)):
        with pytest.raises(ValueError, match=f"--executor=fused .* {name} is {maker}"):
            executors.check_kernels(Executor.FUSED, _choices(**both | {name: maker}))
    for other in (Executor.GRAPH, Executor.SEQUENTIAL):
        executors.check_kernels(other, _choices())


def test_streams_alone_start_attention_aside():
    for executor in Executor:
        starts = executors.start_aside(executor) is not None
        assert starts is (executor is Executor.STREAMS)
    assert executors.compiler_options(Executor.STREAMS)["xla_gpu_enable_command_buffer"] == ""


def test_only_graphs_need_options_and_lanes():
    assert executors.compiler_options(Executor.SEQUENTIAL) == {}
    assert not executors.keeps_lanes(Executor.SEQUENTIAL)
    assert executors.compiler_options(Executor.GRAPH)["xla_gpu_dot_merger_threshold_mb"] == 0
    assert executors.keeps_lanes(Executor.GRAPH)


def test_halves_cap_products_and_the_plain_pass_does_not():
    assert executors.caps_products([_ONE, _HALVES])
    assert not executors.caps_products([_ONE])
