"""Dense product with fused epilogues, on as many SMs as it is given.

Bound by arithmetic from some 200 rows on (an H200 makes about 206 bfloat16 operations per byte of
memory), below that by reading the weight.

CTAs are persistent: CTA i of n computes output tiles i, i + n, ... . Two warpgroups each own half
of a tile's rows and multiply (WGMMA) what a third one fetches (TMA) some steps ahead. A tile leaves
through shared memory in slices of columns, while the next tile's first products run.

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
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from nanoflow_jax import compat
from pallas_kernels import mosaic

_NUM_SLOTS = 2
_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float8_e4m3fn)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GemmTile:
    """What one CTA computes at a time.

    Attributes:
        rows: Of the output; each of two warpgroups has half.
        columns: Of the output.
        depth: Of one step along the summed axis.
        stages: Steps fetched ahead.
        band: Tiles in a row of the snake.
        slice_columns: Columns that leave at a time.
    """

    rows: int = 128
    columns: int = 128
    depth: int = 64
    stages: int = 4
    band: int = 8
    slice_columns: int = 64

    def __post_init__(self) -> None:
        if self.rows % 128 or self.columns % self.slice_columns or self.columns > 256:
            raise ValueError(
                f"{self} is no tile: rows must be a multiple of 128 (two warpgroups of 64), and "
                "columns of slice_columns, at most 256"
            )


def gemm(
    x: Float[Array, "T D"],
    w: Float[Array, "F D"],
    *,
    w_up: Float[Array, "F D"] | None = None,
    x_scale: Float[Array, "*T"] | None = None,
    w_scale: Float[Array, "*F"] | None = None,
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
        w_up: Second factor of a gated layer.
        x_scale: float32, what x is to be multiplied by: one number, or one for each row.
        w_scale: The same of w, whose rows are output channels.
        w_up_scale: The same of w_up.
        bias: Any float dtype.
        residual: Of the output's dtype.
        out_dtype: x's unless given; bfloat16 where that is float8_e4m3fn.
        num_ctas: Most SMs to use.
        tile: How the product is cut.
        token: Read by nobody; orders this kernel after the one that makes it.
        interpret: None on a GPU, or InterpretGPUParams.

    Raises:
        ValueError: Shapes or dtypes do not fit each other.
    """
    kernel = prepare_gemm(
        x,
        w,
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
    w: Float[Array, "F D"],
    *,
    w_up: Float[Array, "F D"] | None = None,
    x_scale: Float[Array, "*T"] | None = None,
    w_scale: Float[Array, "*F"] | None = None,
    w_up_scale: Float[Array, "*F"] | None = None,
    bias: Float[Array, "F"] | None = None,
    residual: Float[Array, "T F"] | None = None,
    out_dtype: Any = None,
    tile: GemmTile | None = None,
) -> mosaic.Kernel:
    """The kernel of `gemm`, to run on a share of a grid; takes and refuses the same."""
    tile = tile or _default_tile(x.dtype)
    out_dtype = jnp.dtype(out_dtype or _out_dtype(x.dtype))
    _check(x, w, w_up=w_up, bias=bias, residual=residual, out_dtype=out_dtype)
    _check_scales(x, w, x_scale=x_scale, w_scale=w_scale, w_up=w_up, w_up_scale=w_up_scale)
    num_rows, num_columns = x.shape[0], w.shape[0]
    x = padded(x, mosaic.TILE_ROWS, tile.depth)
    weights = [padded(one, mosaic.TILE_ROWS, tile.depth) for one in (w, w_up) if one is not None]
    shape = (x.shape[0], _up(num_columns, mosaic.TILE_ROWS))
    operands = [x, *weights]
    height, width = _up(num_rows, tile.rows), _up(num_columns, tile.columns)
    for scale, size, filled in (
        (w_scale, num_columns, width),
        (w_up_scale, num_columns, width),
        (x_scale, num_rows, height),
    ):
        if scale is not None:
            operands.append(jnp.pad(jnp.broadcast_to(scale, size), (0, filled - size)))
    if bias is not None:
        operands.append(jnp.pad(bias.astype(jnp.float32), (0, width - num_columns)))
    if residual is not None:
        operands.append(
            jnp.pad(residual, [(0, n - m) for n, m in zip(shape, residual.shape, strict=True)])
        )
    parts = _Parts(
        gated=w_up is not None,
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
    w: Float[Array, "F D"],
    *,
    w_up: Float[Array, "F D"] | None = None,
    x_scale: Float[Array, "*T"] | None = None,
    w_scale: Float[Array, "*F"] | None = None,
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

    y = product(w, w_scale)
    if bias is not None:
        y = y + bias.astype(jnp.float32)[None]
    if w_up is not None:
        y = jax.nn.silu(y) * product(w_up, w_up_scale)
    if residual is not None:
        y = y + residual.astype(jnp.float32)
    return y.astype(out_dtype or _out_dtype(x.dtype))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Factor:
    """A weight [F, D], which may be some rows of a larger one, and the scale of each row."""

    ref: Any
    first_row: int = 0
    scale: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupRefs:
    """Rows of x in groups that have weights of their own, one below the other in a factor's ref.

    Attributes:
        tile_group: Group of each tile of rows.
        num_tiles: [1], used tiles of rows.
        weight_rows: From the weight of one group to that of the next.
    """

    tile_group: Any
    num_tiles: Any
    weight_rows: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class GemmRefs:
    """Refs of one product in global memory.

    Attributes:
        x: [T, D].
        factors: The weight, and the second one of a gated layer.
        out: [T, F].
        x_scale: [T] in float32.
        bias: [F] in float32.
        residual: As out.
        groups: None if all rows have the same weight.
    """

    x: Any
    factors: tuple[Factor, ...]
    out: Any
    x_scale: Any = None
    bias: Any = None
    residual: Any = None
    groups: GroupRefs | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Parts:
    """Which optional operands there are."""

    gated: bool
    w_scale: bool
    w_up_scale: bool
    x_scale: bool
    bias: bool
    residual: bool

    def named(self, refs: tuple[Any, ...]) -> GemmRefs:
        left = list(refs)
        take = lambda there: left.pop(0) if there else None  # noqa: E731
        x, w, w_up = take(True), take(True), take(self.gated)
        factors = [Factor(ref=w, scale=take(self.w_scale))]
        if self.gated:
            factors.append(Factor(ref=w_up, scale=take(self.w_up_scale)))
        return GemmRefs(
            x=x,
            factors=tuple(factors),
            x_scale=take(self.x_scale),
            bias=take(self.bias),
            residual=take(self.residual),
            out=take(True),
        )


def gemm_role(index: Any, num_workers: Any, refs: GemmRefs, tile: GemmTile) -> None:
    """What CTA `index` of `num_workers` does; both may be values that the device computes."""
    _Gemm(refs, tile).run(index, num_workers)


class _Gemm:
    """The kernel of one product, as it is traced."""

    def __init__(self, refs: GemmRefs, tile: GemmTile) -> None:
        self._refs, self._tile = refs, tile
        self._weights = [factor.ref for factor in refs.factors]
        (self._num_rows, self._num_columns), self._depth = refs.out.shape, refs.x.shape[1]
        self._steps = pl.cdiv(self._depth, tile.depth)
        # One product stays in flight; with a single step there is none to wait for later.
        self._delay = min(1, self._steps - 1)
        self._half = tile.rows // mosaic.COMPUTE_WARPGROUPS
        self._slots = min(_NUM_SLOTS, tile.columns // tile.slice_columns)

    def run(self, index: Any, num_workers: Any) -> None:
        tile, refs = self._tile, self._refs
        nothing = lambda *_, **__: None  # noqa: E731
        allocations = self._pipeline(nothing, nothing).get_allocations(refs.x, *self._weights)
        slice_shape = (mosaic.COMPUTE_WARPGROUPS, self._slots, self._half, tile.slice_columns)
        out_s = plgpu.SMEM(
            slice_shape,
            refs.out.dtype,
            transforms=mosaic.swizzled(tile.slice_columns, refs.out.dtype),
        )
        row_tiles = pl.cdiv(self._num_rows, tile.rows)
        if refs.groups is not None:
            row_tiles = refs.groups.num_tiles[0]
        grid = (row_tiles, pl.cdiv(self._num_columns, tile.columns))

        def scope(allocations: Any, out_s: Any, arrived: Any) -> None:
            @pl.loop(0, lax.div(grid[0] * grid[1] - index + num_workers - 1, num_workers))
            def _(turn: Any) -> None:
                place = plgpu.planar_snake(index + turn * num_workers, grid, 0, tile.band)
                self._one_tile(place, allocations, out_s, arrived)

        num_barriers = mosaic.COMPUTE_WARPGROUPS * self._slots
        pl.run_scoped(
            scope,
            allocations,
            out_s,
            plgpu.Barrier(num_barriers=num_barriers) if refs.residual is not None else None,
            collective_axes="warpgroup",
        )
        plgpu.wait_smem_to_gmem(0)

    def _pipeline(self, body: Any, compute: Any) -> Any:
        tile, dtype = self._tile, self._refs.x.dtype
        transforms = mosaic.swizzled(tile.depth, dtype)

        def spec(rows: int) -> plgpu.BlockSpec:
            return plgpu.BlockSpec(
                (rows, tile.depth),
                lambda k: (0, k),
                transforms=transforms,
                delay_release=self._delay,
            )

        return plgpu.emit_pipeline_warp_specialized(
            body,
            grid=(self._steps,),
            in_specs=[spec(tile.rows), *(spec(tile.columns) for _ in self._weights)],
            max_concurrent_steps=tile.stages,
            memory_registers=mosaic.MEMORY_REGISTERS,
            num_compute_wgs=mosaic.COMPUTE_WARPGROUPS,
            wg_axis="warpgroup",
            compute_context=compute,
        )

    def _one_tile(self, place: Any, allocations: Any, out_s: Any, arrived: Any) -> None:
        tile = self._tile
        warpgroup = lax.axis_index("warpgroup")
        mine = pl.ds(warpgroup * self._half, self._half)

        def multiply(_: Any, x_s: Any, *rest: Any) -> Any:
            *weights_s, accumulators = rest
            for accumulator, w_s in zip(accumulators, weights_s, strict=True):
                plgpu.wgmma(accumulator, x_s.at[mine], w_s.transpose((1, 0)))
            plgpu.wgmma_wait(self._delay)
            return accumulators

        def compute(run_pipeline: Any) -> None:
            def with_accumulators(*accumulators: Any) -> None:
                run_pipeline(accumulators)
                sums = [accumulator[...] for accumulator in accumulators]
                self._store(sums, place, out_s, arrived)

            shape = (self._half, tile.columns)
            wanted = [plgpu.ACC(shape, jnp.float32) for _ in self._weights]
            pl.run_scoped(with_accumulators, *wanted)

        self._pipeline(multiply, compute)(
            self._refs.x.at[pl.ds(place[0] * tile.rows, tile.rows)],
            *(
                factor.ref.at[pl.ds(self._first_weight(place, factor), tile.columns)]
                for factor in self._refs.factors
            ),
            allocations=allocations,
        )

    def _first_weight(self, place: Any, factor: Factor) -> Any:
        """First row of a factor that a tile needs."""
        first = place[1] * self._tile.columns + factor.first_row
        if (groups := self._refs.groups) is None:
            return first
        return first + groups.tile_group[place[0]] * groups.weight_rows

    def _store(self, sums: list[Any], place: Any, out_s: Any, arrived: Any) -> None:
        tile, refs = self._tile, self._refs
        warpgroup = lax.axis_index("warpgroup")
        rows = pl.ds(place[0] * tile.rows + warpgroup * self._half, self._half)
        x_scale = None
        if refs.x_scale is not None:
            x_scale = compat.load_row(refs.x_scale, rows, layout=plgpu.Layout.WGMMA.reduce(1))
        for i in range(tile.columns // tile.slice_columns):
            start = i * tile.slice_columns
            columns = pl.ds(place[1] * tile.columns + start, tile.slice_columns)
            slot = out_s.at[warpgroup, i % self._slots]
            # The store from this slot, `slots` slices ago, has read it.
            plgpu.wait_smem_to_gmem(self._slots - 1, wait_read_only=True)
            y, *rest = [one[:, start : start + tile.slice_columns] for one in sums]
            y, *rest = [
                self._scaled(one, factor, x_scale, self._first_weight(place, factor) + start)
                for one, factor in zip((y, *rest), refs.factors, strict=True)
            ]
            if refs.bias is not None:
                y = y + self._along_columns(refs.bias, columns.start, y.shape)
            if rest:
                y = y * (1.0 / (1.0 + jnp.exp(-y))) * rest[0]
            if refs.residual is not None:
                barrier = arrived.at[warpgroup * self._slots + i % self._slots]
                plgpu.copy_gmem_to_smem(refs.residual.at[rows, columns], slot, barrier)
                plgpu.barrier_wait(barrier)
                y = y + slot[...].astype(jnp.float32)
            slot[...] = y.astype(refs.out.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(slot, refs.out.at[rows, columns])

    def _scaled(self, y: Any, factor: Factor, x_scale: Any, first_weight: Any) -> Any:
        if factor.scale is not None:
            y = y * self._along_columns(factor.scale, first_weight, y.shape)
        return y if x_scale is None else y * lax.broadcast_in_dim(x_scale, y.shape, [0])

    def _along_columns(self, ref: Any, first: Any, shape: tuple[int, int]) -> Any:
        layout = plgpu.Layout.WGMMA.reduce(0)
        row = compat.load_row(ref, pl.ds(first, shape[1]), layout=layout)
        return lax.broadcast_in_dim(row, shape, [1])


def _default_tile(dtype: Any) -> GemmTile:
    """Steps of one swizzled row, 128 bytes."""
    return GemmTile(depth=128 if dtype == jnp.float8_e4m3fn else 64)


def _out_dtype(dtype: Any) -> Any:
    return jnp.bfloat16 if dtype == jnp.float8_e4m3fn else dtype


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def padded(x: Float[Array, "M N"], rows: int, columns: int) -> Float[Array, "M2 N2"]:
    """Zeros up to multiples of rows and columns; nothing is copied where there are none to add."""
    widths = [(0, -x.shape[0] % rows), (0, -x.shape[1] % columns)]
    return jnp.pad(x, widths) if any(after for _, after in widths) else x


def _check(x: Any, w: Any, *, w_up: Any, bias: Any, residual: Any, out_dtype: Any) -> None:
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(f"x{x.shape} and w{w.shape} are not [T, D] and [F, D]")
    if 0 in (*x.shape, *w.shape):
        raise ValueError(f"x{x.shape} and w{w.shape} must not be empty")
    if x.dtype != w.dtype or x.dtype not in _DTYPES:
        raise ValueError(
            f"x is {x.dtype} and w {w.dtype}; both must be bfloat16, float16, float32 or "
            "float8_e4m3fn"
        )
    if w_up is not None and (w_up.shape != w.shape or w_up.dtype != w.dtype):
        raise ValueError(f"w_up is {w_up.dtype}{w_up.shape} and w {w.dtype}{w.shape}: not the same")
    if bias is not None and bias.shape != w.shape[:1]:
        raise ValueError(f"bias{bias.shape} is not [F] = {w.shape[:1]}")
    expected = (x.shape[0], w.shape[0])
    if residual is not None and (residual.shape != expected or residual.dtype != out_dtype):
        raise ValueError(
            f"residual is {residual.dtype}{residual.shape}, not {out_dtype}{expected} as the output"
        )


def _check_scales(
    x: Any, w: Any, *, x_scale: Any, w_scale: Any, w_up: Any, w_up_scale: Any
) -> None:
    for name, scale, size in (
        ("x_scale", x_scale, x.shape[0]),
        ("w_scale", w_scale, w.shape[0]),
        ("w_up_scale", w_up_scale, w.shape[0]),
    ):
        if scale is None:
            continue
        if scale.shape not in ((), (size,)) or scale.dtype != jnp.float32:
            raise ValueError(
                f"{name} is {scale.dtype}{scale.shape}, not float32 of shape () or ({size},)"
            )
    if w_up is None and w_up_scale is not None:
        raise ValueError("there is a w_up_scale and no w_up")
