"""Several kernels at the same time, in one that shares the SMs out among them.

Worth it where they are bound by different things: a product leaves the memory idle and decode
attention the tensor cores, and each saturates what it is bound by with fewer SMs than there are.
CTAs [0, a) take the role of the first kernel, [a, a + b) that of the second, and so on. Registers
(168 for each of 384 threads) let one CTA only live on an SM, so that the shares are exact; a CTA
needs as much shared memory as the role that needs most, and a few barriers. The shares are an
operand: one executable serves all splits, and a search over them compiles nothing. Two kernels
spill no registers as jax 0.11.2 compiles them, and a product, prefill and decode attention together
8 bytes; by 0.10.2, some gated products beside decode attention 8 bytes, and three kernels 44.

Accuracy: as of the kernels. All take the fast exp if one does, so that a gated product beside an
attention may differ in the last place from one that runs alone.

Source: NanoFlow (Zhu et al., arXiv 2408.12757, section 4) for decode attention beside a product;
POD-Attention (Kamath et al., arXiv 2410.18038) for it beside prefill attention, and for roles of
CTAs in one kernel.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Int32

from pallas_kernels import checks, mosaic


def side_by_side(
    kernels: Sequence[mosaic.Kernel],
    shares: Sequence[int] | Int32[Array, "B-1"],
    *,
    num_ctas: int = 132,
    token: Array | None = None,
    interpret: Any = None,
) -> tuple[Any, ...]:
    """Answers of B kernels in their order; each means what it means alone.

    Args:
        kernels: From `prepare_gemm`, `prepare_grouped_gemm`, `prepare_prefill` and
            `prepare_decode`.
        shares: CTAs of each kernel but the last, which has the rest; at least 1 each. A kernel
            leaves idle what it has no use for.
        num_ctas: Of all together; the SMs it uses.
        token: Read by nobody; orders this kernel after the one that makes it.
        interpret: None on a GPU, or InterpretGPUParams.

    Raises:
        ValueError: There are not B - 1 shares for at least two kernels, or a kernel has no CTA.
            Shares in an array of jax's, which the device may know alone, are not looked at.
    """
    _check(kernels, shares, num_ctas)
    operands = [list(kernel.operands) for kernel in kernels]
    results = [list(kernel.results) for kernel in kernels]
    all_operands = list(itertools.chain(*operands))

    def body(*refs: Any) -> None:
        shares_ref, written = refs[len(all_operands)], refs[len(all_operands) + 1 :]
        begins = [jnp.int32(0)]
        for i in range(len(kernels) - 1):
            begins.append(begins[-1] + shares_ref[i])
        ends = [*begins[1:], jnp.int32(num_ctas)]
        all_refs = zip(_cut(refs, operands), _cut(written, results), strict=True)
        for kernel, begin, end, (read, made) in zip(kernels, begins, ends, all_refs, strict=True):
            _take_part(kernel, begin, end, [*read, *made])

    made = mosaic.call(
        body,
        out_type=tuple(itertools.chain(*results)),
        num_ctas=num_ctas,
        operands=[*all_operands, jnp.asarray(shares, jnp.int32)],
        token=token,
        approx_math=any(kernel.approx_math for kernel in kernels),
        interpret=interpret,
    )
    return tuple(
        kernel.finish(*own) for kernel, own in zip(kernels, _cut(made, results), strict=True)
    )


def on_share(
    kernel: mosaic.Kernel,
    share: int | Int32[Array, ""],
    *,
    num_ctas: int = 132,
    token: Array | None = None,
    interpret: Any = None,
) -> Any:
    """Answer of one kernel on the first CTAs of a grid whose others end at once.

    As much as a grid of that size; but one executable serves all sizes.

    Args:
        kernel: From a `prepare_` function.
        share: CTAs that work, at least 1.
        num_ctas: Of the grid.
        token: Read by nobody; orders this kernel after the one that makes it.
        interpret: None on a GPU, or InterpretGPUParams.

    Raises:
        ValueError: There is no CTA, or the share is no part of the grid. One in an array of jax's,
            which the device may know alone, is not looked at.
    """
    checks.check_count("num_ctas", num_ctas)
    if not isinstance(share, jax.Array) and share not in range(1, num_ctas + 1):
        raise ValueError(f"share={share} is outside [1, num_ctas={num_ctas}]")
    num_operands = len(kernel.operands)

    def body(*refs: Any) -> None:
        read, share_ref, made = refs[:num_operands], refs[num_operands], refs[num_operands + 1 :]
        _take_part(kernel, jnp.int32(0), share_ref[0], [*read, *made])

    made = mosaic.call(
        body,
        out_type=tuple(kernel.results),
        num_ctas=num_ctas,
        operands=[*kernel.operands, jnp.asarray(share, jnp.int32).reshape(1)],
        token=token,
        approx_math=kernel.approx_math,
        interpret=interpret,
    )
    return kernel.finish(*made)


def _take_part(kernel: mosaic.Kernel, begin: Any, end: Any, refs: Sequence[Any]) -> None:
    """Plays a kernel's role on those of CTAs [begin, end) that it has a use for."""
    index = lax.axis_index("cta") - begin
    num_workers = jnp.minimum(end - begin, kernel.most_ctas)

    @pl.when((index >= 0) & (index < num_workers))
    def _() -> None:
        kernel.role(index, num_workers, *refs)


def _cut(items: Sequence[Any], like: Sequence[Sequence[Any]]) -> list[Sequence[Any]]:
    """Items in runs as long as those given."""
    ends = list(itertools.accumulate(len(one) for one in like))
    return [items[end - len(one) : end] for one, end in zip(like, ends, strict=True)]


def _check(kernels: Sequence[mosaic.Kernel], shares: Any, num_ctas: int) -> None:
    checks.check_count("num_ctas", num_ctas)
    if num_ctas < len(kernels):
        raise ValueError(f"num_ctas={num_ctas} is not at least {len(kernels)}, one for each kernel")
    num_shares = len(shares)
    if num_shares < 1 or num_shares != len(kernels) - 1:
        raise ValueError(
            f"{num_shares} shares for {len(kernels)} kernels: give at least two kernels, and a "
            "share of each but the last, which has the rest"
        )
    if isinstance(shares, jax.Array):
        return
    possible = range(1, num_ctas)
    if any(share not in possible for share in shares) or sum(shares) not in possible:
        raise ValueError(
            f"shares {np.asarray(shares).tolist()} of num_ctas={num_ctas} are no whole numbers, "
            "or leave a kernel without a CTA"
        )
