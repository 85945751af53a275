"""Steps that an H200 would run by a plan, compiled without one."""

import dataclasses
import re

import deviceless
import jax
import pytest

from nanoflow_jax import config
from nanoflow_jax.config import Executor
from nanoflow_jax.models import huggingface, presets
from nanoflow_jax.nanobatch import builders
from nanoflow_jax.overlap import analysis, report, step
from nanoflow_jax.scheduler.buckets import Bucket

_LAYERS = 2
_BUCKET = Bucket(tokens=2048, decode_rows=256, prefill_rows=16)
_8B = dataclasses.replace(
    step.first_layers(huggingface.read_config(presets.load("llama-3-8b")), _LAYERS),
    vocab_size=1024,
)
_PLAN = builders.halves(_8B.layer_shape, num_tokens=_BUCKET.tokens)


def _asked(executor):
    return step.Step(
        model=_8B,
        bucket=_BUCKET,
        plan=_PLAN,
        executor=executor,
        kernels=config.KernelsSection(),
    )


def _claims(executor):
    deviceless.skip_without_compiler()
    asked = _asked(executor)
    program = step.compile_step(asked, cache=deviceless.cache_folder())
    found = analysis.Analysis(program, _PLAN, [_PLAN.graph] * _LAYERS)
    return found, {one.claim: one.holds for one in report.check(found, asked)}


@pytest.mark.timeout(900)
def test_halves_of_an_8b_step_overlap_in_the_graph_as_the_plan_wants():
    found, claims = _claims(Executor.GRAPH)
    assert all(claims.values()), claims
    beside = {one.attention.layer: one.products for one in found.products_beside_attention()}
    assert {found.plan.order[p.place].operation for p in beside[1]} >= {"o", "up_gate", "down"}
    assert found.too_ordered() == ()


@pytest.mark.timeout(900)
def test_attention_and_products_of_halves_are_one_kernel_where_fused():
    found, claims = _claims(Executor.FUSED)
    # Of a gated product beside decode attention jax 0.10 puts two values away, newer ones none.
    assert found.spilled_bytes() <= (8 if jax.__version__.startswith("0.10.") else 0)
    claims.pop("no kernel of ours spills registers")
    assert all(claims.values()), claims
    beside = {one.attention: one.products for one in found.products_beside_attention()}
    assert {found.name(node): [*map(found.name, nodes)] for node, nodes in beside.items()} == {
        "layer 1 decode_attention.0": ["layer 0 up_gate.1"],
        "layer 1 decode_attention.1": ["layer 1 up_gate.0"],
    }
    assert all(kernel.grid[0] <= 132 for kernel in found.program.mosaic_kernels)
    calls = [one for one in found.program.launches if one.kind == "kCustomCall"]
    of_two = [one for one in calls if len(set(re.findall(r"layer_\d+/\w+\.\d+", one.scope))) == 2]
    assert len(of_two) == 2 * _LAYERS
    # Beside them decode attention has the merge of its parts.
    assert sum("decode_attention." in one.scope for one in calls) == 2 * len(of_two)


@pytest.mark.timeout(900)
def test_attention_of_halves_has_a_stream_beside_the_products_of_the_other_half():
    found, claims = _claims(Executor.STREAMS)
    assert all(claims.values()), claims
    assert not found.program.graphs
    assert {aside.stream for aside in found.program.asides} == {"computation_stream[0]"}
    assert len(found.program.asides) == 2 * _LAYERS
    text = report.text([], found.program, _asked(Executor.STREAMS), "of none")
    assert text.startswith(f"plan halves, executor streams, bucket {_BUCKET}: streams of ")
    beside = {found.name(one.attention): one.products for one in found.products_beside_attention()}
    names = [found.plan.order[p.place].operation for p in beside["layer 1 decode_attention.0"]]
    assert set(names) >= {"o", "up_gate", "down"}


@pytest.mark.timeout(900)
def test_the_same_step_fails_the_check_where_xla_runs_one_after_another():
    _, claims = _claims(Executor.SEQUENTIAL)
    assert not claims["decode attention may run beside products of the other part"]
    assert claims["products wait for each other"]
