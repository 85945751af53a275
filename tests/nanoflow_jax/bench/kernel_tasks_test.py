"""What is timed at the sizes that are served, lowered and compiled for a GPU that is not there."""

import dataclasses

import deviceless
import jax
import kernel_runs
import numpy as np
import pytest

from nanoflow_jax.bench import kernel_baselines, kernel_peers, kernel_tasks, profile_points
from nanoflow_jax.bench.kernel_ways import Setting
from nanoflow_jax.bench.profile_points import Item
from nanoflow_jax.models import huggingface, presets
from pallas_kernels import mosaic, problem_shapes

_H200 = Setting(on_gpu=True, num_sms=132, interpret=None)
_SHAPES = {problem.name: problem.shape for problem in problem_shapes.problems()}


def _programs(shape, setting=_H200):
    """Our ways with the shapes of what they take."""
    task = kernel_tasks.build(shape, setting)
    operands = jax.eval_shape(lambda: task.draw(0))
    more = {variant.way: variant.more for variant in task.variants}
    return {
        way.name: (way.function, operands, *jax.eval_shape(lambda more=given: more))
        for way, given in more.items()
        if way.name.startswith("pallas")
    }


@pytest.mark.parametrize(
    "name",
    [
        "llama-3-8b/gate_up/4096",
        "llama-3-8b/o/256",
        "llama-3-8b/decode+gate_up/1024",
        "mixtral-8x7b/down/512",
        "qwen3-32b-tp4/decode/256x1024-ragged",
        "llama-3-70b-tp8/prefill/4x512+1536",
    ],
)
def test_all_that_is_timed_of_ours_lowers_for_hopper(name):
    for function, *shapes in _programs(_SHAPES[name]).values():
        assert "mosaic_gpu_v2" in kernel_runs.lowered(function, *shapes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "item",
    [
        Item(operation="up_gate", tokens=512, by_kernel=True, tile=profile_points.tiles(2)[0]),
        Item(operation="kqv", tokens=512, context=1024, by_kernel=True, beside=64),
    ],
    ids=lambda item: item.name,
)
def test_what_a_profile_adds_to_that_lowers_for_hopper(item):
    """Products cut otherwise than by default, and pairs with products that have one weight."""
    config = huggingface.read_config(presets.load("llama-3-8b"))
    setting = dataclasses.replace(_H200, tile=item.tile)
    for function, *shapes in _programs(profile_points.shape_of(config, item), setting).values():
        assert "mosaic_gpu_v2" in kernel_runs.lowered(function, *shapes)


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("llama-3-8b/down/4096", "pallas"),
        ("mixtral-8x7b/gate_up/4096", "pallas"),
        ("llama-3-8b/prefill/1x8192+0", "pallas"),
        ("qwen3-32b-tp4/decode/256x1024", "pallas"),
        ("llama-3-70b-tp8/decode+gate_up/1024", "pallas"),
    ],
)
def test_kernels_on_a_share_that_the_device_knows_compile_without_spills(name, way):
    function, *shapes = _programs(_SHAPES[name])[way]
    leaves, tree = jax.tree.flatten(shapes)
    # Decode attention has a second one, which merges parts.
    kernel, *merges = deviceless.compiled(
        lambda *x: function(*jax.tree.unflatten(tree, x)), *leaves
    )
    assert len(merges) == ("decode" in name)
    assert kernel.grid == (132, 1, 1)
    assert kernel.spill_bytes == 0
    # More than half of an SM's, so that CTAs have SMs to themselves.
    assert mosaic.SHARED_BYTES // 2 < kernel.shared_bytes <= mosaic.SHARED_BYTES


def test_each_problem_has_its_baselines_or_a_word_why_not():
    on_cpu = Setting(on_gpu=False, num_sms=2, interpret=None)
    wanted = {
        "gemm": {"xla", "cublaslt"},
        "decode_attention": {"xla", "cudnn", "torch", "tokamax", "flashinfer"},
        "prefill_attention": {"xla", "cudnn", "torch", "tokamax", "flashinfer"},
        "grouped_gemm": {"ragged_dot", "tokamax"},
        "fused": {"pallas, graph branches", "pallas, one then the other", "xla, then pallas"},
    }
    for problem in problem_shapes.tiny_problems():
        task = kernel_tasks.build(problem.shape, on_cpu)
        there = {variant.way.name for variant in task.variants}
        others = (there | set(task.missing)) - {"pallas", "pallas, static grid"}
        assert others == wanted[problem.shape.KERNEL]
        assert not there & set(task.missing)


def test_what_needs_a_gpu_is_there_on_one():
    assert kernel_baselines.missing(_H200, ("cublaslt", "cudnn", "pallas, graph branches")) == {}
    on_cpu = Setting(on_gpu=False, num_sms=2, interpret=None)
    assert kernel_baselines.missing(on_cpu, ("cudnn",)) == {"cudnn": "needs a GPU"}


@pytest.mark.parametrize("problem", problem_shapes.tiny_problems()[:4], ids=lambda p: p.operation)
def test_baselines_give_what_the_reference_gives(problem):
    on_cpu = Setting(on_gpu=False, num_sms=2, interpret=None)
    task = kernel_tasks.build(problem.shape, on_cpu)
    operands = task.draw(3)
    (wanted,) = jax.jit(task.reference)(operands)
    others = [v.way for v in task.variants if not v.way.name.startswith("pallas")]
    assert others
    for way in others:
        results = way.program(operands)(operands)
        (found,) = results if way.view is None else way.view(operands, results)
        kernel_runs.check_close(found, wanted, relative=way.slack * task.relative_error)


def test_pages_of_requests_as_flashinfer_has_them():
    table = np.asarray([[5, 3, 9], [1, 9, 9]], np.int32)
    starts, pages, last = kernel_peers.page_lists(table, np.asarray([33, 16], np.int32), 16)
    assert starts.tolist() == [0, 3, 4]
    assert pages.tolist() == [5, 3, 9, 1]
    assert last.tolist() == [1, 16]
