"""Attention and a product at the same time, in one kernel that shares the SMs out between them.

Bound by arithmetic on some SMs and by memory on the others: the product leaves the memory idle and
the attention the tensor cores, and each saturates what it is bound by with fewer SMs than there
are. CTAs [0, g) take the role of the product, the rest that of the attention; either role's shared
memory lets one CTA only live on an SM, so that the shares are exact. g is an operand: one
executable serves all splits, and a search over them compiles nothing.

Accuracy: as of the two kernels. The product's epilogue takes the fast exp that the attention takes,
so that a gated product may differ in the last place from one that runs alone.

Source: NanoFlow (Zhu et al., arXiv 2408.12757, section 4) for the pair; POD-Attention (Kamath et
al., arXiv 2410.18038) for roles of CTAs in one kernel.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Int32

from pallas_kernels import mosaic


def attention_beside_gemm(
    product: mosaic.Kernel,
    attention: mosaic.Kernel,
    gemm_ctas: int | Int32[Array, ""],
    *,
    num_ctas: int = 132,
    token: Array | None = None,
    interpret: Any = None,
) -> tuple[Array, Array]:
    """Answers of both kernels; each means what it means alone.

    Args:
        product: From `prepare_gemm`.
        attention: From `prepare_decode`, its work planned for the CTAs that the product leaves,
            with room (max_ctas) for num_ctas.
        gemm_ctas: g, how many CTAs the product gets; at least 1, and less than num_ctas.
        num_ctas: Of both together; the SMs it uses.
        token: Read by nobody; orders this kernel after the one that makes it.
        interpret: None on a GPU, or InterpretGPUParams.

    Raises:
        ValueError: A number is out of its range, or the plan has not enough room. A gemm_ctas that
            only the device knows is not checked.
    """
    _check(attention, gemm_ctas, num_ctas)
    split = jnp.asarray(gemm_ctas, jnp.int32).reshape(1)
    kernels = (product, attention)
    ends = [len(product.operands), len(product.operands) + len(attention.operands)]
    num_results = len(product.results)

    def body(*refs: Any) -> None:
        read, written = refs[: ends[1]], refs[ends[1] + 1 :]
        share, cta = refs[ends[1]][0], lax.axis_index("cta")

        @pl.when(cta < share)
        def _() -> None:
            product.role(cta, share, *read[: ends[0]], *written[:num_results])

        @pl.when(cta >= share)
        def _() -> None:
            attention.role(cta - share, num_ctas - share, *read[ends[0] :], *written[num_results:])

    results = mosaic.call(
        body,
        out_type=tuple(result for kernel in kernels for result in kernel.results),
        num_ctas=num_ctas,
        operands=[operand for kernel in kernels for operand in kernel.operands] + [split],
        token=token,
        approx_math=any(kernel.approx_math for kernel in kernels),
        interpret=interpret,
    )
    return product.finish(*results[:num_results]), attention.finish(*results[num_results:])


def _check(attention: mosaic.Kernel, gemm_ctas: Any, num_ctas: int) -> None:
    if num_ctas < 2:
        raise ValueError(f"num_ctas={num_ctas} is not at least 2, one for each kernel")
    if isinstance(gemm_ctas, int) and not 1 <= gemm_ctas < num_ctas:
        raise ValueError(f"gemm_ctas={gemm_ctas} is outside [1, num_ctas={num_ctas})")
    if attention.most_ctas < num_ctas:
        raise ValueError(
            f"the attention is planned with room for {attention.most_ctas} CTAs; the grid has "
            f"{num_ctas}: plan with max_ctas={num_ctas}"
        )
