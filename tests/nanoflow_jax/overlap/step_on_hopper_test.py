"""Steps that an H200 would run by a plan, compiled without one."""

import dataclasses
import functools
import re

import deviceless
import jax
import pytest

from nanoflow_jax import compat, config
from nanoflow_jax.config import Executor
from nanoflow_jax.cost import datasheets, timeline
from nanoflow_jax.cost.steady_state import Mix
from nanoflow_jax.models import huggingface, presets
from nanoflow_jax.nanobatch import builders
from nanoflow_jax.nanobatch.operations import Resource
from nanoflow_jax.overlap import analysis, report, step, workload
from nanoflow_jax.scheduler.buckets import Bucket

pytestmark = pytest.mark.timeout(900)

_8B = huggingface.read_config(presets.load("llama-3-8b"))
_WORK = workload.Workload(mix=Mix(prompt_len=512, output_len=512), num_tokens=2048)
_HALVES = builders.halves(_8B.layer_shape, num_tokens=2048)
# One layer shows what a bad plan lets happen.
_FEW = Bucket(tokens=512, decode_rows=256, prefill_rows=2)
_HALVES_OF_FEW = builders.halves(_8B.layer_shape, num_tokens=512)
_EIGHT = builders.tensor_parallel(
    dataclasses.replace(_8B.layer_shape, num_devices=8), num_tokens=2048, gathers=()
)


_PRODUCTS = {"norm_kqv", "o", "o_columns", "up_gate", "down"}

# Each compiles for half a minute.
_on_new_jax = pytest.mark.skipif(
    not compat.CAN_INTERPRET_MOSAIC, reason="compiled on the jax of GPU machines alone"
)


def _first_layers(count):
    return dataclasses.replace(step.first_layers(_8B, count), vocab_size=1024)


@functools.cache
def _checked(plan, bucket=_WORK.bucket, *, layers=2, executor=Executor.GRAPH):
    """A compiled step, and all that is said of it."""
    deviceless.skip_without_compiler()
    asked = step.Step(
        model=_first_layers(layers),
        bucket=bucket,
        plan=plan,
        executor=executor,
        kernels=config.KernelsSection(),
        num_devices=plan.shape.num_devices,
    )
    program = step.compile_step(asked, cache=deviceless.cache_folder())
    prediction = "nothing is known of sums"
    if asked.num_devices == 1:
        sheet = datasheets.datasheet("NVIDIA H200")
        prediction = timeline.predict_step(_8B, plan, bucket, _WORK.contexts, sheet)
    found = analysis.of_step(program, asked)
    return found, report.check(found, asked, prediction)


def _failed(*case, **more):
    """What does not hold, and why."""
    return {one.claim: one.detail for one in _checked(*case, **more)[1] if not one.holds}


def _beside(found, *operations):
    """Operations that may run beside each nano-operation of some others."""
    order = found.plan.order
    return {
        found.name(one.node): {order[other.place].operation for other in one.others}
        for one in found.beside(*operations)
    }


def test_halves_of_an_8b_step_overlap_in_the_graph_as_the_plan_wants():
    assert _failed(_HALVES) == {}
    found, claims = _checked(_HALVES)
    assert len(claims) == 7
    assert _beside(found, "decode_attention") == {
        "layer 0 decode_attention.0": {"norm_kqv"},
        "layer 0 decode_attention.1": {"o", "up_gate", "down", "norm_kqv"},
        "layer 1 decode_attention.0": {"o", "up_gate", "down", "norm_kqv"},
        "layer 1 decode_attention.1": {"o", "up_gate", "down"},
    }
    assert found.too_ordered() == ()
    assert not found.program.copies
    assert found.most_ctas()[0] == 132


@_on_new_jax
@deviceless.slow_on_other_jax
def test_attention_and_products_of_halves_are_one_kernel_where_fused():
    failed = _failed(_HALVES, executor=Executor.FUSED)
    assert [claim for claim in failed if not claim.startswith("the longest chain")] == []
    found, _ = _checked(_HALVES, executor=Executor.FUSED)
    assert _beside(found, "decode_attention") == {
        "layer 0 decode_attention.0": {"norm_kqv"},
        "layer 0 decode_attention.1": {"up_gate"},
        "layer 1 decode_attention.0": {"up_gate"},
        "layer 1 decode_attention.1": {"up_gate"},
    }
    assert all(kernel.grid[0] <= 132 for kernel in found.program.mosaic_kernels)
    calls = [one for one in found.program.launches if one.kind == "kCustomCall"]
    of_two = [one for one in calls if len(set(re.findall(r"layer_\d+/\w+\.\d+", one.scope))) == 2]
    assert len(of_two) == 4
    # Beside them decode attention has the merge of its parts.
    assert sum("decode_attention." in one.scope for one in calls) == 2 * len(of_two)


@_on_new_jax
@deviceless.slow_on_other_jax
def test_attention_of_halves_has_a_stream_beside_the_products_of_the_other_half():
    assert _failed(_HALVES, executor=Executor.STREAMS) == {}
    found, _ = _checked(_HALVES, executor=Executor.STREAMS)
    assert not found.program.graphs
    assert not found.program.copies
    assert _beside(found, "decode_attention")["layer 1 decode_attention.0"] == {
        "o",
        "up_gate",
        "down",
        "norm_kqv",
    }


@_on_new_jax
def test_the_same_step_fails_the_check_where_xla_runs_one_after_another():
    failed = _failed(_HALVES, executor=Executor.SEQUENTIAL)
    attention, chain = sorted(failed)
    assert attention == "decode attention may run beside products of other tokens"
    assert failed[attention].startswith("nothing is beside layer 0 decode_attention.0, layer 0")
    assert chain.startswith("the longest chain takes at most 70%")
    assert "of those compiled 100.0%" in failed[chain]


@_on_new_jax
@deviceless.slow_on_other_jax
def test_a_plan_with_two_kernels_of_all_sms_fails_the_check():
    order = tuple(
        dataclasses.replace(nano, num_ctas=nano.num_ctas and 132) for nano in _HALVES_OF_FEW.order
    )
    plan = dataclasses.replace(_HALVES_OF_FEW, order=order)
    assert _failed(plan, _FEW, layers=1) == {
        "what runs at once fits the 132 SMs": "264 CTAs: layer 0 prefill_attention.0 and "
        "layer 0 decode_attention.0"
    }


@_on_new_jax
@deviceless.slow_on_other_jax
def test_a_plan_that_leaves_products_beside_products_fails_the_check():
    """The halves have a lane each, of a third of the SMs."""
    half = _HALVES_OF_FEW.order[0].tokens
    order = tuple(
        dataclasses.replace(
            nano,
            lane=Resource.NETWORK if nano.tokens == half else Resource.COMPUTE,
            num_ctas=44,
        )
        if nano.lane is Resource.COMPUTE
        else nano
        for nano in _HALVES_OF_FEW.order
    )
    plan = dataclasses.replace(_HALVES_OF_FEW, order=order)
    failed = _failed(plan, _FEW, layers=1)
    assert list(failed) == ["products wait for each other"]
    assert failed["products wait for each other"].startswith("layer 0 norm_kqv.0 and layer 0 norm_")


def test_sums_over_eight_devices_are_on_their_way_while_other_tokens_are_multiplied():
    # The compiler of jax 0.10 puts one sum where nothing is left to compute, and finds no registers
    # for 8 bytes of up-gate of a device's share.
    is_old = jax.__version__.startswith("0.10.")
    failed = {
        "collectives may run beside computing for other tokens": "nothing is beside layer 0 "
        "down_reduce.1",
        "no kernel of ours spills registers": "8 bytes",
    }
    assert _failed(_EIGHT) == (failed if is_old else {})
    found, _ = _checked(_EIGHT)
    beside = _beside(found, "o_reduce", "down_reduce")
    assert beside["layer 0 down_reduce.1"] >= (set() if is_old else {"norm_kqv"})
    products = {name: others & _PRODUCTS for name, others in beside.items()}
    assert {name: others for name, others in products.items() if "layer 0" in name and others} == {
        "layer 0 o_reduce.0": {"o"},
        "layer 0 o_reduce.1": {"up_gate", "down"},
        "layer 0 down_reduce.0": {"up_gate", "down"},
        "layer 0 down_reduce.2": {"norm_kqv"},
    } | ({} if is_old else {"layer 0 down_reduce.1": {"norm_kqv"}})
    assert {name for name in beside if "layer 1" in name} == {
        "layer 1 o_reduce.0",
        "layer 1 o_reduce.1",
        "layer 1 down_reduce.0",
    }
    assert found.called_wrongly() == {}


@_on_new_jax
@deviceless.slow_on_other_jax
def test_gathers_around_o_are_on_their_way_while_other_tokens_are_multiplied():
    shape = dataclasses.replace(_8B.layer_shape, num_devices=8)
    plan = builders.tensor_parallel(shape, num_tokens=2048, gathers=("a", "b"))
    assert _failed(plan, layers=1) == {}
    found, _ = _checked(plan, layers=1)
    beside = _beside(found, "attention_gather", "o_gather")
    assert "prefill_attention" in beside.pop("layer 0 attention_gather.0")
    assert {name: others & _PRODUCTS for name, others in beside.items()} == {
        "layer 0 attention_gather.1": {"o_columns"},
        "layer 0 o_gather.0": {"o_columns"},
        "layer 0 o_gather.1": {"up_gate", "down"},
    }
