"""A kernel on some CTAs of a larger grid gives what it gives alone, by one executable."""

import deviceless
import jax
import jax.numpy as jnp
import kernel_runs
import numpy as np
import pytest

from pallas_kernels import mosaic, problem_shapes
from pallas_kernels.gemm import gemm_reference, prepare_gemm
from pallas_kernels.side_by_side import on_share


@kernel_runs.needs_interpreter
@pytest.mark.timeout(120)
def test_one_executable_gives_the_result_for_every_share():
    # Four tiles.
    x, w = kernel_runs.normal(0, 200, 128), kernel_runs.normal(1, 136, 128)
    with kernel_runs.interpreting() as interpret:

        def run(x, w, share):
            return on_share(prepare_gemm(x, w), share, num_ctas=6, interpret=interpret)

        executable = jax.jit(run).lower(x, w, jnp.int32(1)).compile()
        for share in (1, 3, 6):
            kernel_runs.check_close(
                executable(x, w, jnp.int32(share)), gemm_reference(x, w), relative=2e-3
            )


@pytest.mark.timeout(120)
def test_a_share_that_the_device_knows_costs_no_spills():
    product = problem_shapes.products(problem_shapes.LLAMA_3_8B, 2048)["gate_up"]
    weight = jax.ShapeDtypeStruct((product.num_columns, product.depth), jnp.bfloat16)
    x = jax.ShapeDtypeStruct((product.num_tokens, product.depth), jnp.bfloat16)

    def run(x, w, w_up, share):
        return on_share(prepare_gemm(x, w, w_up=w_up), share)

    share = jax.ShapeDtypeStruct((), jnp.int32)
    (kernel,) = deviceless.compiled(run, x, weight, weight, share)
    assert kernel.grid == (132, 1, 1)
    assert kernel.spill_bytes == 0
    assert kernel.shared_bytes <= mosaic.SHARED_BYTES


@pytest.mark.parametrize("share", [0, 5, np.int64(5), np.asarray(0), 1.5])
def test_shares_that_are_no_part_of_the_grid_are_refused(share):
    x = jnp.zeros((8, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match=rf"share={share} is outside \[1, num_ctas=4\]"):
        on_share(prepare_gemm(x, x), share, num_ctas=4)


def test_a_grid_without_ctas_is_refused():
    x = jnp.zeros((8, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="num_ctas=0 is not at least 1"):
        on_share(prepare_gemm(x, x), jnp.int32(1), num_ctas=0)
