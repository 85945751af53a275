"""What the kernels share of Pallas' Mosaic GPU backend, which changes with every release.

Everything here is for Hopper: tensor memory access (TMA), warpgroup products (WGMMA), three
warpgroups per CTA of which the last one only moves memory.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from nanoflow_jax import compat
from pallas_kernels import checks

COMPUTE_WARPGROUPS = 2
# One that moves memory, beside those that compute.
NUM_WARPGROUPS = COMPUTE_WARPGROUPS + 1
MEMORY_WARPGROUP = COMPUTE_WARPGROUPS
# Registers a thread: 2 x 232 + 40 for 128 threads each fit into the 65536 of an SM.
COMPUTE_REGISTERS = 232
MEMORY_REGISTERS = 40
# Shared memory that one CTA may have on Hopper, bytes (CUDA C programming guide, table of
# compute capabilities).
SHARED_BYTES = 232_448
_SWIZZLES = (128, 64, 32)
# TMA wants tiles of a multiple of so many rows.
TILE_ROWS = 8


def swizzled(
    num_columns: int, dtype: Any, *, most_columns: int | None = None
) -> tuple[plgpu.Transform, ...]:
    """How WGMMA wants rows of so many columns laid out in shared memory.

    Args:
        num_columns: Of a row.
        dtype: Of what is in it.
        most_columns: Of the tiles that rows are cut into; a product sums over a multiple of them.

    Raises:
        ValueError: The row is no multiple of 32 bytes.
    """
    tile_columns = swizzled_columns(num_columns, dtype)
    if most_columns is not None:
        tile_columns = swizzled_columns(math.gcd(tile_columns, most_columns), dtype)
    tiling = plgpu.TilingTransform((TILE_ROWS, tile_columns))
    return (tiling, plgpu.SwizzleTransform(tile_columns * jnp.dtype(dtype).itemsize))


def swizzled_columns(num_columns: int, dtype: Any) -> int:
    """Columns of the tiles that rows of so many columns are cut into by `swizzled`.

    Raises:
        ValueError: The row is no multiple of 32 bytes.
    """
    itemsize = jnp.dtype(dtype).itemsize
    for swizzle in _SWIZZLES:
        if num_columns * itemsize % swizzle == 0:
            return swizzle // itemsize
    raise ValueError(
        f"a tile row of {num_columns} x {itemsize} bytes is no multiple of {_SWIZZLES[-1]} bytes; "
        "take a wider tile"
    )


def call(
    body: Callable[..., None],
    *,
    out_type: Any,
    num_ctas: int,
    operands: Sequence[jax.Array],
    token: jax.Array | None,
    scratch: Mapping[str, Any] | None = None,
    approx_math: bool = False,
    interpret: Any = None,
) -> Any:
    """Runs a kernel of so many persistent CTAs.

    Args:
        body: Takes refs of operands, then of outputs, then scratch by name.
        out_type: Shapes and dtypes of what it writes.
        num_ctas: The grid; `jax.lax.axis_index("cta")` is the index in it.
        operands: In global memory.
        token: Read by nobody; the kernel is ordered after whatever makes it.
        scratch: Shared memory and barriers by name.
        approx_math: Whether exp2 and the like may take the fast hardware path.
        interpret: None to run on a GPU, or InterpretGPUParams.

    Raises:
        ValueError: The token is no array of numbers.
    """
    checks.check_arrays(**checks.given(token=token))
    compat.name_kernels()
    given = list(operands)
    if token is not None:
        given.append(token)

    def entry(*refs: Any, **scratch_refs: Any) -> None:
        read, written = refs[: len(operands)], refs[len(given) :]
        body(*read, *written, **scratch_refs)

    more = {} if interpret is None else {"interpret": interpret}
    return plgpu.kernel(
        entry,
        out_type=out_type,
        scratch_types=dict(scratch or {}),
        grid=(num_ctas,),
        grid_names=("cta",),
        num_threads=NUM_WARPGROUPS,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            # The default differs between releases.
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            approx_math=approx_math,
        ),
        **more,
    )(*given)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """A kernel that can be given any share of a grid.

    Attributes:
        operands: In global memory.
        results: Shapes and dtypes of what it writes.
        role: What one CTA does. Takes its index among the CTAs of this kernel and their number,
            which may be values that the device computes, then refs of operands and of results.
        finish: Makes the answer from the results.
        most_ctas: How many can be of use; the role is never played by more.
        approx_math: Whether exp2 and the like may take the fast hardware path.
    """

    operands: Sequence[jax.Array]
    results: tuple[jax.ShapeDtypeStruct, ...]
    role: Callable[..., None]
    finish: Callable[..., Any]
    most_ctas: int
    approx_math: bool = False


def run(kernel: Kernel, *, num_ctas: int, token: jax.Array | None, interpret: Any) -> Any:
    """Answer of a kernel that has a grid to itself, of at most so many CTAs; see `call`.

    Raises:
        ValueError: There is no CTA, or the token is no array of numbers.
    """
    checks.check_count("num_ctas", num_ctas)
    num_ctas = min(num_ctas, kernel.most_ctas)
    results = call(
        lambda *refs: kernel.role(lax.axis_index("cta"), num_ctas, *refs),
        out_type=kernel.results,
        num_ctas=num_ctas,
        operands=kernel.operands,
        token=token,
        approx_math=kernel.approx_math,
        interpret=interpret,
    )
    return kernel.finish(*results)
