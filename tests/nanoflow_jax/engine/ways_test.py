"""Each bucket runs as its own plan wants."""

import jax.numpy as jnp
import numpy as np

from nanoflow_jax import config
from nanoflow_jax.config import Executor
from nanoflow_jax.engine import kernel_choice, ways
from nanoflow_jax.models import huggingface, presets
from nanoflow_jax.models.kernel_operations import KernelProducts
from nanoflow_jax.models.operations import PlainProducts
from nanoflow_jax.nanobatch import builders
from nanoflow_jax.nanobatch.operations import LayerShape
from nanoflow_jax.scheduler.buckets import Bucket

_ONE = builders.one(LayerShape(), num_tokens=256)
_HALVES = builders.halves(LayerShape(), num_tokens=512)
_SMALL, _LARGE = (Bucket(tokens=tokens, decode_rows=8, prefill_rows=4) for tokens in (256, 512))


def test_buckets_that_no_plan_cuts_run_as_if_none_were():
    _SMALL, _LARGE = (Bucket(tokens=tokens, decode_rows=8, prefill_rows=4) for tokens in (256, 512))
    found = ways.by_bucket(Executor.GRAPH, {_SMALL: _ONE, _LARGE: _HALVES})
    assert found == {_SMALL: Executor.SEQUENTIAL, _LARGE: Executor.GRAPH}
    found = ways.by_bucket(Executor.GRAPH, {_SMALL: _ONE, _LARGE: _ONE})
    assert found == {_SMALL: Executor.GRAPH, _LARGE: Executor.GRAPH}


def test_a_bucket_below_the_threshold_runs_what_runs_without_a_plan():
    hopper = kernel_choice.Machine(
        name="NVIDIA H200",
        compute_capability=(9, 0),
        num_sms=132,
        jax_version="0.0",
        can_interpret=False,
        num_threads=1,
    )
    model = huggingface.read_config(presets.load("llama-3-8b"))
    served = kernel_choice.Served(config=model, dtype=np.dtype(jnp.bfloat16), page_size=64)

    def choose(plans, executor):
        return ways.choose(
            config.EngineConfig(), executor, plans, machine=hopper, served=served, on_gpu=True
        )

    found = choose({_SMALL: _ONE, _LARGE: _HALVES}, Executor.GRAPH)
    plain = choose({_SMALL: _ONE}, Executor.SEQUENTIAL)[_SMALL]
    assert found[_SMALL].executor is plain.executor
    assert found[_SMALL].compiler_options == plain.compiler_options == {}
    kinds = [type(way.operations.products) for way in (plain, found[_SMALL], found[_LARGE])]
    assert kinds == [PlainProducts, PlainProducts, KernelProducts]
    assert found[_LARGE].compiler_options["xla_gpu_graph_min_graph_size"] == 1
