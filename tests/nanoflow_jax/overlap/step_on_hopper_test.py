"""Steps that an H200 would run by a plan, compiled without one."""

import dataclasses

import deviceless
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


def _claims(executor):
    deviceless.skip_without_compiler()
    asked = step.Step(
        model=_8B,
        bucket=_BUCKET,
        plan=_PLAN,
        executor=executor,
        kernels=config.KernelsSection(),
    )
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
def test_the_same_step_fails_the_check_where_xla_runs_one_after_another():
    _, claims = _claims(Executor.SEQUENTIAL)
    assert not claims["decode attention may run beside products of the other part"]
    assert claims["products wait for each other"]
