"""What one CTA of a product does; see `gemm`."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from nanoflow_jax import compat
from pallas_kernels import mosaic

_NUM_SLOTS = 2
# Rows of one product of a warpgroup (WGMMA), and the most columns.
_PRODUCT_ROWS = 64
_MOST_COLUMNS = 256
_STEP_BYTES = 128
_BARRIER_BYTES = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class GemmTile:
    """What one CTA computes at a time.

    Attributes:
        rows: Of the output; 64, or a multiple of 128.
        columns: Of the output.
        depth: Of one step along the summed axis.
        stages: Steps fetched ahead.
        band: Tiles in a row of the snake.
        slice_columns: Columns that leave at a time.

    Raises:
        ValueError: No CTA can compute that. Whether it fits shared memory is known only with
            dtypes, when the kernel is compiled.
    """

    rows: int = 128
    columns: int = 128
    depth: int = 64
    stages: int = 4
    band: int = 8
    slice_columns: int = 64

    def __post_init__(self) -> None:
        least = {"depth": 1, "stages": 2, "band": 1, "slice_columns": 1, "columns": 1, "rows": 1}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise ValueError(f"{self} is no tile: {name} is not at least {number}")
        if self.rows != _PRODUCT_ROWS and self.rows % (2 * _PRODUCT_ROWS):
            raise ValueError(
                f"{self} is no tile: rows must be {_PRODUCT_ROWS}, or a multiple of "
                f"{2 * _PRODUCT_ROWS} of which each of two warpgroups has half"
            )
        if self.warpgroup_columns % self.slice_columns or self.columns > _MOST_COLUMNS:
            raise ValueError(
                f"{self} is no tile: the {self.warpgroup_columns} columns of a warpgroup must be a "
                f"multiple of slice_columns, and columns at most {_MOST_COLUMNS}"
            )

    def out_columns(self, num_columns: int, dtype: Any) -> int:
        """Columns of the array that a result of so many is written to: slices are stored swizzled.

        Raises:
            ValueError: A slice is no multiple of 32 bytes.
        """
        return up(num_columns, mosaic.swizzled_columns(self.slice_columns, dtype))

    @property
    def warpgroup_rows(self) -> int:
        """Rows that one warpgroup multiplies."""
        return max(self.rows // mosaic.COMPUTE_WARPGROUPS, _PRODUCT_ROWS)

    @property
    def warpgroup_columns(self) -> int:
        """Columns that one warpgroup multiplies."""
        shared_by = self.rows // self.warpgroup_rows
        return self.columns * shared_by // mosaic.COMPUTE_WARPGROUPS


def up(size: int, multiple: int) -> int:
    """The least multiple that is no smaller."""
    return -(-size // multiple) * multiple


def default_rows(num_rows: int) -> int:
    """Rows of a tile where a weight multiplies so many.

    64, the fewest that a warpgroup multiplies, where they are enough: all beyond the rows that
    there are is work for nothing. Above that 128, so that a weight is multiplied by twice as many
    rows each time it comes from L2.
    """
    return _PRODUCT_ROWS if num_rows <= _PRODUCT_ROWS else 2 * _PRODUCT_ROWS


def default_tile(
    dtype: Any, num_rows: int, *, num_factors: int = 1, out_dtype: Any = jnp.bfloat16
) -> GemmTile:
    """Tile of `default_rows`, its steps one swizzled row of 128 bytes deep.

    It has four stages, or as many as fit into shared memory beside slices on their way out.

    Args:
        dtype: Of the operands.
        num_rows: That a weight multiplies.
        num_factors: 2 in a gated layer.
        out_dtype: Of the result.
    """
    depth = _STEP_BYTES // jnp.dtype(dtype).itemsize
    tile = GemmTile(rows=default_rows(num_rows), depth=depth)
    slots = mosaic.COMPUTE_WARPGROUPS * _NUM_SLOTS
    slice_bytes = tile.warpgroup_rows * tile.slice_columns * jnp.dtype(out_dtype).itemsize
    left = mosaic.SHARED_BYTES - _BARRIER_BYTES - slots * slice_bytes
    stages = left // (_STEP_BYTES * (tile.rows + num_factors * tile.columns))
    return dataclasses.replace(tile, stages=min(tile.stages, stages))


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
        self._slots = min(_NUM_SLOTS, tile.warpgroup_columns // tile.slice_columns)

    def run(self, index: Any, num_workers: Any) -> None:
        tile, refs = self._tile, self._refs
        nothing = lambda *_, **__: None  # noqa: E731
        allocations = self._pipeline(nothing, nothing).get_allocations(refs.x, *self._weights)
        one_slice = (tile.warpgroup_rows, tile.slice_columns)
        slice_shape = (mosaic.COMPUTE_WARPGROUPS, self._slots, *one_slice)
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

    def _share(self) -> tuple[Any, Any]:
        """First row and first column in a tile of what this warpgroup computes."""
        warpgroup = lax.axis_index("warpgroup")
        if self._tile.warpgroup_rows < self._tile.rows:
            return warpgroup * self._tile.warpgroup_rows, 0
        return 0, warpgroup * self._tile.warpgroup_columns

    def _one_tile(self, place: Any, allocations: Any, out_s: Any, arrived: Any) -> None:
        tile = self._tile
        first_row, first_column = self._share()
        rows = pl.ds(first_row, tile.warpgroup_rows)
        columns = pl.ds(first_column, tile.warpgroup_columns)

        def multiply(_: Any, x_s: Any, *rest: Any) -> Any:
            *weights_s, accumulators = rest
            for accumulator, w_s in zip(accumulators, weights_s, strict=True):
                plgpu.wgmma(accumulator, x_s.at[rows], w_s.at[columns].transpose((1, 0)))
            plgpu.wgmma_wait(self._delay)
            return accumulators

        def compute(run_pipeline: Any) -> None:
            def with_accumulators(*accumulators: Any) -> None:
                run_pipeline(accumulators)
                sums = [accumulator[...] for accumulator in accumulators]
                self._store(sums, place, out_s, arrived)

            shape = (tile.warpgroup_rows, tile.warpgroup_columns)
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
        first_row, first_column = self._share()
        rows = pl.ds(place[0] * tile.rows + first_row, tile.warpgroup_rows)
        x_scale = None
        if refs.x_scale is not None:
            x_scale = compat.load_row(refs.x_scale, rows, layout=plgpu.Layout.WGMMA.reduce(1))
        for i in range(tile.warpgroup_columns // tile.slice_columns):
            start = i * tile.slice_columns
            column = first_column + start
            columns = pl.ds(place[1] * tile.columns + column, tile.slice_columns)
            slot = out_s.at[warpgroup, i % self._slots]
            # The store from this slot, `slots` slices ago, has read it.
            plgpu.wait_smem_to_gmem(self._slots - 1, wait_read_only=True)
            y, *rest = [one[:, start : start + tile.slice_columns] for one in sums]
            y, *rest = [
                self._scaled(one, factor, x_scale, self._first_weight(place, factor) + column)
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
