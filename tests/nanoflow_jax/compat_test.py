"""What differs between versions of jax, on the one that is here."""

import re

import jax
import jax.numpy as jnp
import kernel_runs
import numpy as np
import pytest

from nanoflow_jax import compat
from pallas_kernels.gemm import gemm


def test_interpreters_take_their_options():
    assert compat.interpret_gpu_params(detect_races=True).detect_races


def test_programs_are_lowered_for_a_gpu_that_is_not_there():
    with compat.abstract_gpu("NVIDIA H200", 132):
        traced = jax.jit(lambda x: x + 1).trace(jax.ShapeDtypeStruct((4,), jnp.float32))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.add" in text


def test_rows_are_loaded_into_registers_on_every_version():
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((64, 64), (128, 64), (128,))]
    text = kernel_runs.lowered(lambda x, w, bias: gemm(x, w, bias=bias, num_ctas=2), *shapes)
    assert "mosaic_gpu_v2" in text


def test_a_kernel_is_the_same_wherever_it_stands_in_a_program():
    def twice(x, y, w):
        return gemm(x, w, num_ctas=2), gemm(y, w, num_ctas=2), gemm(y, w, num_ctas=1)

    x, w = (jax.ShapeDtypeStruct((rows, 64), jnp.bfloat16) for rows in (64, 256))
    text = kernel_runs.lowered(twice, x, x, w)
    first, second, other = re.findall(r'kernel_hash = "(.*?[^\\])"', text)
    assert first == second != other


@kernel_runs.needs_interpreter
def test_an_interpreted_kernel_tells_of_races_until_the_interpreter_is_reset():
    x = jnp.ones((8, 64))
    for _ in range(2):
        found = gemm(x, x, num_ctas=1, interpret=kernel_runs.interpreted())
        np.testing.assert_array_equal(found, 64.0)
        assert not compat.races_found()
        compat.reset_interpreter()


def test_kernels_of_a_gpu_that_is_not_there_cannot_be_seen():
    if jax.devices()[0].platform == "gpu":
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeError, match="CUPTI"):
        compat.device_kernels(lambda: None)


def test_a_jax_without_the_triton_backend_is_told_of(monkeypatch):
    monkeypatch.setattr(compat, "plt", None)
    with pytest.raises(ValueError, match=r"jax .* has no Triton backend of Pallas; 0.12.0.1"):
        compat.triton_call(
            print, out_shape=(), grid=(1,), num_warps=4, num_stages=1, interpret=True
        )


def test_a_function_on_a_stream_is_the_function_and_has_no_calls_within():
    @jax.jit
    def inner(x):
        return x + 1

    def outer(x, pair):
        y, factor = pair
        return {"sum": inner(x) * factor, "closed": shift + y}

    def run(x, y):
        return compat.start_on_stream(outer, [x, (y, 3)], stream=0)

    shift, x, y = jnp.arange(3.0), jnp.ones(3), 2 * jnp.ones(3)
    found, read = run(x, y)
    assert jax.tree.all(jax.tree.map(np.array_equal, found, outer(x, (y, 3))))
    assert len(read) == 3
    text = jax.jit(run).lower(x, y).as_text()
    assert '_xla_stream_annotation = "0"' in text
    assert text.count(" = call @") == 1


def test_a_function_without_results_is_not_started():
    assert compat.start_on_stream(lambda x: (None, None), [jnp.ones(3)], stream=0) == (
        (None, None),
        [],
    )
