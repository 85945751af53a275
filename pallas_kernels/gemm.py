"""Dense product with fused epilogues, on as many SMs as it is given.

Bound by arithmetic from some 200 rows on (an H200 makes about 206 bfloat16 operations per byte of
memory), below that by reading the weight.

CTAs are persistent: CTA i of n computes output tiles i, i + n, ... . Two warpgroups each own half
of a tile's rows, or of its columns where it has 64 rows, and multiply (WGMMA) what a third one
fetches (TMA) some steps ahead. A tile leaves through shared memory in slices of columns, while the
next tile's first products run.

Accuracy: products of the inputs as they are (float32 inputs as TF32), summed in float32; the
epilogue, scales included, is in float32 and rounded once. Hopper sums products of float8 with some
14 bits only (DeepSeek-V3, arXiv 2412.19437, section 3.3.2): about 1e-3 at a depth of 4096.

Source: persistent, warp-specialised GEMM as in CUTLASS 3 ("ping-pong" and "cooperative" kernels);
order of tiles: bands of columns walked as a snake, so that what one band reads stays in L2.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels import checks, mosaic
from pallas_kernels.gemm_role import Factor, GemmRefs, GemmTile, default_tile, gemm_role, up

_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float8_e4m3fn)


def gemm(
    x: Float[Array, "T D"],
    w: Float[Array, "F2 D"],
    *,
    gated: bool = False,
    w_up: Float[Array, "F D"] | None = None,
    x_scale: Float[Array, "*T"] | None = None,
    w_scale: Float[Array, "*F2"] | None = None,
    w_up_scale: Float[Array, "*F"] | None = None,
    bias: Float[Array, "F"] | None = None,
    residual: Float[Array, "T F"] | None = None,
    out_dtype: Any = None,
    num_ctas: int = 132,
    tile: GemmTile | None = None,
    token: Array | None = None,
    interpret: Any = None,
) -> Float[Array, "T F"]:
    """Product x @ w.T, then what is given of: + bias, silu(.) * (x @ w_up.T), + residual.

    Args:
        x: bfloat16, float16, float32 or float8_e4m3fn.
        w: Output-major, of x's dtype.
        gated: Whether w holds the rows of both factors of a gated layer, up's below the gate's.
        w_up: Second factor of a gated layer where it lies apart.
        x_scale: float32, what x is to be multiplied by: one number, or one for each row.
        w_scale: The same of w, whose rows are output channels.
        w_up_scale: The same of w_up.
        bias: Any float dtype.
        residual: Of the output's dtype.
        out_dtype: bfloat16, float16 or float32; x's unless given, or bfloat16 where that is
            float8_e4m3fn.
        num_ctas: Most SMs to use.
        tile: How the product is cut; `default_tile` unless given.
        token: Read by nobody; orders this kernel after the one that makes it.
        interpret: None on a GPU, or InterpretGPUParams.

    Raises:
        ValueError: Shapes or dtypes do not fit each other.
    """
    kernel = prepare_gemm(
        x,
        w,
        gated=gated,
        w_up=w_up,
        x_scale=x_scale,
        w_scale=w_scale,
        w_up_scale=w_up_scale,
        bias=bias,
        residual=residual,
        out_dtype=out_dtype,
        tile=tile,
    )
    return mosaic.run(kernel, num_ctas=num_ctas, token=token, interpret=interpret)


def prepare_gemm(
    x: Float[Array, "T D"],
    w: Float[Array, "F2 D"],
    *,
    gated: bool = False,
    w_up: Float[Array, "F D"] | None = None,
    x_scale: Float[Array, "*T"] | None = None,
    w_scale: Float[Array, "*F2"] | None = None,
    w_up_scale: Float[Array, "*F"] | None = None,
    bias: Float[Array, "F"] | None = None,
    residual: Float[Array, "T F"] | None = None,
    out_dtype: Any = None,
    tile: GemmTile | None = None,
) -> mosaic.Kernel:
    """The kernel of `gemm`, to run on a share of a grid; takes and refuses the same."""
    scales = checks.given(x_scale=x_scale, w_scale=w_scale, w_up_scale=w_up_scale)
    checks.check_arrays(x=x, w=w, **checks.given(w_up=w_up, bias=bias, residual=residual), **scales)
    _check(x, w, gated=gated, w_up=w_up)
    out_dtype = checks.check_out_dtype(out_dtype or default_out_dtype(x.dtype))
    num_factors = 1 if w_up is None and not gated else 2
    tile = tile or default_tile(x.dtype, x.shape[0], num_factors=num_factors, out_dtype=out_dtype)
    num_rows, num_columns = x.shape[0], w.shape[0] // 2 if gated else w.shape[0]
    _check_epilogue((num_rows, num_columns), out_dtype, bias=bias, residual=residual)
    _check_scales(x, w, x_scale=x_scale, w_scale=w_scale, w_up=w_up, w_up_scale=w_up_scale)
    x = padded(x, mosaic.TILE_ROWS, tile.depth)
    weights = [padded(one, mosaic.TILE_ROWS, tile.depth) for one in (w, w_up) if one is not None]
    shape = (x.shape[0], tile.out_columns(num_columns, out_dtype))
    operands = [x, *weights]
    height, width = up(num_rows, tile.rows), up(num_columns, tile.columns)
    vectors = (
        (w_scale, w.shape[0], w.shape[0] - num_columns + width),
        (w_up_scale, num_columns, width),
        (x_scale, num_rows, height),
        (bias, num_columns, width),
    )
    operands += [filled(v, size, to) for v, size, to in vectors if v is not None]
    if residual is not None:
        operands.append(
            jnp.pad(residual, [(0, n - m) for n, m in zip(shape, residual.shape, strict=True)])
        )
    parts = _Parts(
        second_row=num_columns if gated else None,
        w_up=w_up is not None,
        w_scale=w_scale is not None,
        w_up_scale=w_up_scale is not None,
        x_scale=x_scale is not None,
        bias=bias is not None,
        residual=residual is not None,
    )
    return mosaic.Kernel(
        operands=operands,
        results=(jax.ShapeDtypeStruct(shape, out_dtype),),
        role=lambda index, num_workers, *refs: gemm_role(
            index, num_workers, parts.named(refs), tile
        ),
        finish=lambda out: out[:num_rows, :num_columns],
        most_ctas=pl.cdiv(shape[0], tile.rows) * pl.cdiv(shape[1], tile.columns),
    )


def gemm_reference(
    x: Float[Array, "T D"],
    w: Float[Array, "F2 D"],
    *,
    gated: bool = False,
    w_up: Float[Array, "F D"] | None = None,
    x_scale: Float[Array, "*T"] | None = None,
    w_scale: Float[Array, "*F2"] | None = None,
    w_up_scale: Float[Array, "*F"] | None = None,
    bias: Float[Array, "F"] | None = None,
    residual: Float[Array, "T F"] | None = None,
    out_dtype: Any = None,
) -> Float[Array, "T F"]:
    """The meaning of `gemm`."""

    def product(weight: Float[Array, "F D"], scale: Array | None) -> Float[Array, "T F"]:
        y = jnp.einsum("TD,FD->TF", x, weight, preferred_element_type=jnp.float32)
        if x_scale is not None:
            y = y * x_scale.reshape(-1, 1)
        return y if scale is None else y * scale.reshape(1, -1)

    if gated:
        w, w_up = jnp.split(w, 2)
        w_up_scale = w_scale
        if w_scale is not None and w_scale.ndim:
            w_scale, w_up_scale = jnp.split(w_scale, 2)
    y = product(w, w_scale)
    if bias is not None:
        y = y + bias.astype(jnp.float32)[None]
    if w_up is not None:
        y = jax.nn.silu(y) * product(w_up, w_up_scale)
    if residual is not None:
        y = y + residual.astype(jnp.float32)
    return y.astype(out_dtype or default_out_dtype(x.dtype))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Parts:
    """Which optional operands there are, and the row of w where a second factor begins."""

    second_row: int | None
    w_up: bool
    w_scale: bool
    w_up_scale: bool
    x_scale: bool
    bias: bool
    residual: bool

    def named(self, refs: tuple[Any, ...]) -> GemmRefs:
        left = list(refs)
        take = lambda there: left.pop(0) if there else None  # noqa: E731
        x, w, w_up = take(True), take(True), take(self.w_up)
        factors = [Factor(ref=w, scale=take(self.w_scale))]
        if self.second_row is not None:
            factors.append(dataclasses.replace(factors[0], first_row=self.second_row))
        if self.w_up:
            factors.append(Factor(ref=w_up, scale=take(self.w_up_scale)))
        return GemmRefs(
            x=x,
            factors=tuple(factors),
            x_scale=take(self.x_scale),
            bias=take(self.bias),
            residual=take(self.residual),
            out=take(True),
        )


def default_out_dtype(dtype: Any) -> Any:
    """Of a product of such operands: theirs, or bfloat16 for float8."""
    return jnp.bfloat16 if dtype == jnp.float8_e4m3fn else dtype


def padded(x: Float[Array, "M N"], rows: int, columns: int) -> Float[Array, "M2 N2"]:
    """Zeros up to multiples of rows and columns; nothing is copied where there are none to add."""
    widths = [(0, -x.shape[0] % rows), (0, -x.shape[1] % columns)]
    return jnp.pad(x, widths) if any(after for _, after in widths) else x


def filled(vector: Float[Array, "*N"], size: int, to: int) -> Float[Array, "N2"]:
    """A vector, or the one number that stands for it, in float32 and with zeros after its size."""
    whole = jnp.broadcast_to(vector.astype(jnp.float32), size)
    return jnp.pad(whole, (0, to - size)) if to > size else whole


def check_dtypes(x: Any, w: Any) -> None:
    """Raises ValueError unless the kernel multiplies these."""
    if x.dtype != w.dtype or x.dtype not in _DTYPES:
        raise ValueError(
            f"x is {x.dtype} and w {w.dtype}; both must be bfloat16, float16, float32 or "
            "float8_e4m3fn"
        )


def check_scale(name: str, scale: Any, *shapes: tuple[int, ...]) -> None:
    """Raises ValueError unless a scale is None or float32 of one of these shapes, or a number."""
    if scale is None:
        return
    if scale.shape not in ((), *shapes) or scale.dtype != jnp.float32:
        wanted = " or ".join(str(shape) for shape in ((), *shapes))
        raise ValueError(f"{name} is {scale.dtype}{scale.shape}, not float32 of shape {wanted}")


def _check(x: Any, w: Any, *, gated: bool, w_up: Any) -> None:
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(f"x{x.shape} and w{w.shape} are not [T, D] and [F, D]")
    if 0 in (*x.shape, *w.shape):
        raise ValueError(f"x{x.shape} and w{w.shape} must not be empty")
    check_dtypes(x, w)
    if w_up is not None and (w_up.shape != w.shape or w_up.dtype != w.dtype):
        raise ValueError(f"w_up is {w_up.dtype}{w_up.shape} and w {w.dtype}{w.shape}: not the same")
    if gated and w_up is not None:
        raise ValueError("gated says that w holds both factors, and there is a w_up")
    if gated and w.shape[0] % (2 * mosaic.TILE_ROWS):
        raise ValueError(
            f"{w.shape[0]} rows of both factors are no multiple of {2 * mosaic.TILE_ROWS}"
        )


def _check_epilogue(expected: tuple[int, int], out_dtype: Any, *, bias: Any, residual: Any) -> None:
    if bias is not None and bias.shape != expected[1:]:
        raise ValueError(f"bias{bias.shape} is not [F] = {expected[1:]}")
    if bias is not None and not jnp.issubdtype(bias.dtype, jnp.floating):
        raise ValueError(f"bias is {bias.dtype}, not of a float dtype")
    if residual is not None and (residual.shape != expected or residual.dtype != out_dtype):
        raise ValueError(
            f"residual is {residual.dtype}{residual.shape}, not {out_dtype}{expected} as the output"
        )


def _check_scales(
    x: Any, w: Any, *, x_scale: Any, w_scale: Any, w_up: Any, w_up_scale: Any
) -> None:
    check_scale("x_scale", x_scale, x.shape[:1])
    check_scale("w_scale", w_scale, w.shape[:1])
    check_scale("w_up_scale", w_up_scale, w.shape[:1])
    if w_up is None and w_up_scale is not None:
        raise ValueError("there is a w_up_scale and no w_up")
