"""How the weights of a compiled step lie on its devices."""

import dataclasses
import re

import pytest

from nanoflow_jax import config
from nanoflow_jax.config import Executor
from nanoflow_jax.models import huggingface, presets
from nanoflow_jax.nanobatch import builders
from nanoflow_jax.overlap import step
from nanoflow_jax.scheduler.buckets import Bucket

_8B = huggingface.read_config(presets.load("llama-3-8b"))
_SHAPE = dataclasses.replace(_8B.layer_shape, num_devices=8)


def _step(**plan):
    return step.Step(
        model=_8B,
        bucket=Bucket(tokens=512, decode_rows=256, prefill_rows=2),
        plan=builders.tensor_parallel(_SHAPE, num_tokens=512, **plan),
        executor=Executor.GRAPH,
        kernels=config.KernelsSection(),
        num_devices=8,
    )


def test_weights_that_a_plan_gathers_around_are_compiled_by_columns():
    assert _step(gathers=("a", "b")).placement.by_columns == {"o"}
    assert _step(gathers=()).placement.by_columns == frozenset()


def test_a_plan_that_takes_a_weight_both_ways_is_refused():
    message = "plan 'tensor_parallel' wants the weight of o split by columns and plan"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        _step(gathers=("a",))
