"""Results of attention over parts of the keys, merged to results over all of them.

`merge_runs` is a kernel for many small groups, whose parts follow one another. Bound by latency:
some hundred parts of a few KB each, which lie in the L2 cache. Each warpgroup takes a group at a
time, and reads a few of its parts at once. `merge_parts` leaves few parts of many rows to XLA.

Accuracy: summed in float32, always in one order, whatever the number of CTAs; rounded once.

Source: merging of partial softmaxes: Flash-Decoding (Dao et al., 2023).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from nanoflow_jax import compat
from pallas_kernels import checks, mosaic

# Stands for minus infinity where a difference is taken: -inf - -inf would be NaN.
_LOWEST = -1e30
# Of a part in its group: less than any rounding, and enough for what is no number to be seen.
_LEAST_SHARE = 1e-30
# Threads of a warpgroup; each holds as many columns of a row as another.
COLUMN_MULTIPLE = 128
# Parts that are read at once, to wait for memory once.
_AT_ONCE = 4


def merge_runs(
    parts: Float[Array, "C G H"],
    weights: Float[Array, "C G"],
    groups: Int32[Array, "B 2"],
    *,
    num_rows: int,
    dtype: Any,
    num_ctas: int = 132,
    interpret: Any = None,
) -> Float[Array, "B {num_rows} H"]:
    """Means of parts, each weighing as much as the sum of its exponentials.

    Args:
        parts: float32, results of softmax over a part of the keys; H a multiple of 128.
        weights: float32, logarithm to the base 2 of the sum of exponentials of each.
        groups: [first, end) of the parts of each group.
        num_rows: The first so many rows of each part are merged.
        dtype: Of the result: bfloat16, float16 or float32.
        num_ctas: Most SMs to use.
        interpret: None on a GPU, or InterpretGPUParams.

    Returns:
        Results of softmax over all keys of a group; anything where it has no parts. What is no
        number makes NaN in its own group, and nothing in another.

    Raises:
        ValueError: Shapes or dtypes do not fit each other or the kernel, or there is no CTA.
    """
    checks.check_count("num_ctas", num_ctas)
    checks.check_count("num_rows", num_rows)
    _check_runs(parts, weights, groups)
    dtype = checks.check_out_dtype(dtype)
    num_groups, num_columns = groups.shape[0], parts.shape[2]
    if num_columns % COLUMN_MULTIPLE or num_rows > parts.shape[1]:
        raise ValueError(
            f"parts{parts.shape} have no multiple of {COLUMN_MULTIPLE} columns, or not "
            f"num_rows={num_rows} rows"
        )
    return mosaic.call(
        functools.partial(_kernel, num_groups=num_groups),
        out_type=jax.ShapeDtypeStruct((num_groups, num_rows, num_columns), dtype),
        num_ctas=min(num_ctas, pl.cdiv(num_groups, mosaic.NUM_WARPGROUPS)),
        operands=[parts, weights, groups],
        token=None,
        approx_math=True,
        interpret=interpret,
    )


def merge_runs_reference(
    parts: Float[Array, "C G H"],
    weights: Float[Array, "C G"],
    groups: Int32[Array, "B 2"],
    *,
    num_rows: int,
    dtype: Any,
) -> Float[Array, "B {num_rows} H"]:
    """The meaning of `merge_runs`; zeros where a group has no parts."""
    number = jnp.arange(parts.shape[0], dtype=jnp.int32)[None]
    is_in = (number >= groups[:, :1]) & (number < groups[:, 1:])
    owner = jnp.where(is_in.any(axis=0), is_in.argmax(axis=0), len(groups)).astype(jnp.int32)
    merged = merge_parts(parts, weights, owner, num_groups=len(groups))
    return merged[:, :num_rows].astype(dtype)


def merge_parts(
    parts: Float[Array, "C G H"],
    weights: Float[Array, "C G"],
    part_groups: Int32[Array, "C"],
    *,
    num_groups: int,
) -> Float[Array, "W G H"]:
    """Means of parts, each weighing as much as the sum of its exponentials.

    Few parts, whatever the batch: a product with who-is-in-which-group is cheap, and unlike a
    scattered sum it always adds in one order.

    Args:
        parts: Results of softmax over a part of the keys.
        weights: Logarithm to the base 2 of the sum of exponentials of each.
        part_groups: Which group a part is in; num_groups for a part to leave out, which may hold
            anything.
        num_groups: W.

    Returns:
        Results of softmax over all keys of a group; zeros where it has no parts. What is no number
        makes itself NaN in its own group, and nothing in another.
    """
    is_in = part_groups[None] == jnp.arange(num_groups, dtype=jnp.int32)[:, None]  # [W, C]
    is_sound = jnp.isfinite(parts) & jnp.isfinite(weights)[..., None]
    weights = jnp.where((part_groups < num_groups)[:, None], weights, _LOWEST)
    weights = jnp.where(jnp.isfinite(weights), weights, -_LOWEST)
    top = jnp.max(jnp.where(is_in[..., None], weights[None], _LOWEST), axis=1)  # [W, G]
    share = jnp.maximum(jnp.exp2(weights[None] - top[:, None]), _LEAST_SHARE)
    share = jnp.where(is_in[..., None], share, 0.0)  # [W, C, G]
    # One product for all sums. What is no number is counted instead: times 0 it is still none.
    H = parts.shape[2]
    sides = (jnp.where(is_sound, parts, 0.0), ~is_sound, jnp.ones_like(parts[..., :1]))
    counted = jnp.concatenate([side.astype(jnp.float32) for side in sides], axis=-1)
    sums = jnp.einsum("WCG,CGI->WGI", share, counted, precision="highest")
    merged = sums[..., :H] / jnp.maximum(sums[..., 2 * H :], _LEAST_SHARE)
    return jnp.where(sums[..., H : 2 * H] > 0, jnp.nan, merged)


def _check_runs(parts: Any, weights: Any, groups: Any) -> None:
    checks.check_arrays(parts=parts, weights=weights, groups=groups)
    if parts.ndim != 3 or weights.shape != parts.shape[:2] or groups.shape[1:] != (2,):
        raise ValueError(
            f"parts{parts.shape}, weights{weights.shape} and groups{groups.shape} are not "
            "[C, G, H], [C, G] and [B, 2]"
        )
    if 0 in (*parts.shape, *groups.shape):
        raise ValueError(f"parts{parts.shape} and groups{groups.shape} must not be empty")
    dtypes = [str(array.dtype) for array in (parts, weights, groups)]
    if dtypes != ["float32", "float32", "int32"]:
        raise ValueError(f"parts, weights and groups are {dtypes}, not float32, float32 and int32")


def _kernel(parts: Any, weights: Any, groups: Any, out: Any, *, num_groups: int) -> None:
    num_workers = lax.axis_size("cta") * mosaic.NUM_WARPGROUPS
    first = lax.axis_index("cta") * mosaic.NUM_WARPGROUPS + lax.axis_index("warpgroup")

    def one_group(i: Any, nothing: None) -> None:
        group = first + i * num_workers
        begin, end = groups[group, 0], groups[group, 1]

        @pl.when(end > begin)
        def _() -> None:
            _merge(parts, weights, begin, end, out.at[group])

        return nothing

    lax.fori_loop(0, lax.div(num_groups - first + num_workers - 1, num_workers), one_group, None)


def _merge(parts: Any, weights: Any, begin: Any, end: Any, out: Any) -> None:
    num_rows, num_columns = out.shape
    layout = plgpu.Layout.WG_STRIDED((num_columns,), vec_size=num_columns // COLUMN_MULTIPLE)

    def some_parts(i: Any, running: Any) -> Any:
        number = begin + i * _AT_ONCE
        # Past the last part it is read again, to weigh nothing.
        numbers = [jnp.minimum(number + j, end - 1) for j in range(_AT_ONCE)]
        is_there = [number + j < end for j in range(_AT_ONCE)]
        return tuple(
            _add(parts, weights, row, numbers, is_there, running[row], layout)
            for row in range(num_rows)
        )

    nothing = plgpu.layout_cast(jnp.zeros((num_columns,), jnp.float32), layout)
    zero, lowest = jnp.float32(0), jnp.float32(_LOWEST)
    running = lax.fori_loop(
        0,
        lax.div(end - begin + _AT_ONCE - 1, _AT_ONCE),
        some_parts,
        ((nothing, lowest, zero),) * num_rows,
    )
    for row, (mixed, _, total) in enumerate(running):
        out[row] = (mixed * (1.0 / total)).astype(out.dtype)


def _add(
    parts: Any, weights: Any, row: int, numbers: Any, is_there: Any, running: Any, layout: Any
) -> Any:
    """Adds one row of some parts: its weighted sum, the largest weight, the sum of weights."""
    mixed, top, total = running
    some = [
        jnp.where(there, weights[number, row], _LOWEST)
        for number, there in zip(numbers, is_there, strict=True)
    ]
    new_top = functools.reduce(jnp.maximum, some, top)
    fade = jnp.exp2(top - new_top)
    mixed, total = mixed * fade, total * fade
    for weight, number in zip(some, numbers, strict=True):
        share = jnp.exp2(weight - new_top)
        columns = pl.ds(0, mixed.shape[0])
        mixed += share * compat.load_row(parts.at[number, row], columns, layout=layout)
        total += share
    return mixed, new_top, total
