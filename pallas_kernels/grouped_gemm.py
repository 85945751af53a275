"""Product of rows with the weight of their expert, on as many SMs as it is given.

Bound by reading the experts' weights until some 200 rows of each share them (an H200 makes about
206 bfloat16 operations per byte of memory), beyond that by arithmetic.

`plan_groups` says where each token goes: rows sorted by expert, those of each expert padded to
whole tiles, of which only as many are computed as there are. Then

    hidden = grouped_gemm(permute(x, groups), gate_up, groups, gated=True)
    y = combine(grouped_gemm(hidden, down, groups), groups, shares)

The kernel is that of `gemm`, whose tiles of rows each ask which weight is theirs.

Accuracy: as `gemm`; shares are applied, and a token's experts added, in float32.

Source: sorted and padded groups as in MegaBlocks (Gale et al., arXiv 2211.15841), section 4.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int32

from pallas_kernels import checks, mosaic
from pallas_kernels.gemm import check_dtypes, check_scale, default_out_dtype, filled, padded
from pallas_kernels.gemm_role import (
    Factor,
    GemmRefs,
    GemmTile,
    GroupRefs,
    default_rows,
    default_tile,
    gemm_role,
)


class Groups(NamedTuple):
    """Where the rows of each expert are; C tiles of rows of the same size, R rows in all."""

    sources: Int32[Array, "R"]  # token of a row; T in one that only pads
    places: Int32[Array, "T A"]  # row of each of a token's experts
    counts: Int32[Array, "E"]  # rows of each expert, padding left out
    tile_expert: Int32[Array, "C"]
    num_tiles: Int32[Array, "1"]  # used tiles; rows after them hold anything


def max_row_tiles(num_rows: int, num_experts: int, *, tile_rows: int) -> int:
    """Tiles that are enough for so many rows, however they fall to the experts."""
    return (num_rows + min(num_rows, num_experts) * (tile_rows - 1)) // tile_rows


def plan_groups(
    experts: Int32[Array, "T A"], *, num_experts: int, tile_rows: int | None = None
) -> Groups:
    """Sort tokens by expert; runs on the device.

    Args:
        experts: Of each token, in [0, num_experts]; num_experts is none, and its share must be 0.
        num_experts: E.
        tile_rows: Rows of a tile, those of the `GemmTile` to use; `default_rows` for the rows that
            an expert has on average unless given.

    Raises:
        ValueError: experts is no [T, A] of integers, or there is no expert, or no row in a tile.
    """
    if experts.ndim != 2 or not jnp.issubdtype(experts.dtype, jnp.integer):
        raise ValueError(f"experts is {experts.dtype}{experts.shape}, not integers [T, A]")
    if num_experts < 1 or (tile_rows is not None and tile_rows < 1):
        raise ValueError(
            f"num_experts={num_experts} or tile_rows={tile_rows} is not at least 1; tile_rows may "
            "be None"
        )
    num_tokens, active = experts.shape
    if tile_rows is None:
        tile_rows = default_rows(pl.cdiv(experts.size, num_experts))
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    expert = jnp.arange(num_experts + 1, dtype=flat.dtype)
    # Not by bisection: a loop on the device, of a few kernels each turn.
    starts = jnp.searchsorted(flat[order], expert, method="compare_all").astype(jnp.int32)
    counts = jnp.diff(starts)
    tiles = (counts + tile_rows - 1) // tile_rows
    tile_ends = jnp.cumsum(tiles, dtype=jnp.int32)
    capacity = max_row_tiles(flat.size, num_experts, tile_rows=tile_rows)
    tile = jnp.arange(capacity, dtype=jnp.int32)
    tile_expert = jnp.searchsorted(tile_ends, tile, side="right", method="compare_all")
    # From an expert's place among sorted choices to its first row.
    shift = (tile_ends - tiles) * tile_rows - starts[:-1]
    rows = jnp.arange(flat.size, dtype=jnp.int32) + shift[flat[order]]
    return Groups(
        sources=jnp.full(capacity * tile_rows, num_tokens, jnp.int32).at[rows].set(order // active),
        places=jnp.zeros_like(order).at[order].set(rows).reshape(experts.shape),
        counts=counts,
        tile_expert=jnp.minimum(tile_expert.astype(jnp.int32), num_experts - 1),
        num_tiles=tile_ends[-1:],
    )


def permute(x: Float[Array, "T *D"], groups: Groups) -> Float[Array, "R *D"]:
    """Rows, or what there is of each (scales), in the order of their experts; padding is zeros."""
    return x.at[groups.sources].get(mode="fill", fill_value=0)


def combine(
    y: Float[Array, "R D"], groups: Groups, shares: Float[Array, "T A"]
) -> Float[Array, "T D"]:
    """Sum of each token's rows by share, in float32 and rounded once to y's dtype.

    A share of 0 leaves a row out, whatever it holds.
    """
    share = shares.astype(jnp.float32)[:, :, None]
    weighted = jnp.where(share == 0, 0.0, y[groups.places].astype(jnp.float32) * share)
    return weighted.sum(axis=1).astype(y.dtype)


def grouped_gemm(
    x: Float[Array, "R D"],
    w: Float[Array, "E F2 D"],
    groups: Groups,
    *,
    gated: bool = False,
    x_scale: Float[Array, "*R"] | None = None,
    w_scale: Float[Array, "*EF2"] | None = None,
    out_dtype: Any = None,
    num_ctas: int = 132,
    tile: GemmTile | None = None,
    token: Array | None = None,
    interpret: Any = None,
) -> Float[Array, "R F"]:
    """Each row times the weight of its expert: x @ w[e].T, or silu(x @ gate.T) * (x @ up.T).

    Args:
        x: bfloat16, float16, float32 or float8_e4m3fn, from `permute`.
        w: Output-major, of x's dtype; where gated, the gate's rows above those of up.
        groups: From `plan_groups` with the tile's rows.
        gated: Whether w holds gate and up.
        x_scale: float32, what x is to be multiplied by: one number, or one for each row.
        w_scale: The same of w: one number, one for each expert, or [E, F2] of output channels.
        out_dtype: bfloat16, float16 or float32; x's unless given, or bfloat16 where that is
            float8_e4m3fn.
        num_ctas: Most SMs to use.
        tile: How the product is cut; `default_tile` for the rows of the plan unless given.
        token: Read by nobody; orders this kernel after the one that makes it.
        interpret: None on a GPU, or InterpretGPUParams.

    Returns:
        The products; anything in rows after the used tiles.

    Raises:
        ValueError: Shapes or dtypes do not fit each other, or the tile.
    """
    kernel = prepare_grouped_gemm(
        x,
        w,
        groups,
        gated=gated,
        x_scale=x_scale,
        w_scale=w_scale,
        out_dtype=out_dtype,
        tile=tile,
    )
    return mosaic.run(kernel, num_ctas=num_ctas, token=token, interpret=interpret)


def prepare_grouped_gemm(
    x: Float[Array, "R D"],
    w: Float[Array, "E F2 D"],
    groups: Groups,
    *,
    gated: bool = False,
    x_scale: Float[Array, "*R"] | None = None,
    w_scale: Float[Array, "*EF2"] | None = None,
    out_dtype: Any = None,
    tile: GemmTile | None = None,
) -> mosaic.Kernel:
    """The kernel of `grouped_gemm`, to run on a share of a grid; takes and refuses the same."""
    checks.check_arrays(x=x, w=w, **checks.given(x_scale=x_scale, w_scale=w_scale))
    if 0 in (*x.shape, *w.shape):
        raise ValueError(f"x{x.shape} and w{w.shape} must not be empty")
    check_dtypes(x, w)
    _check_groups(groups)
    num_tiles = groups.tile_expert.shape[0]
    result_dtype = checks.check_out_dtype(out_dtype or default_out_dtype(x.dtype))
    chosen = tile or default_tile(
        x.dtype,
        groups.sources.shape[0] // num_tiles,
        num_factors=2 if gated else 1,
        out_dtype=result_dtype,
    )
    _check(x, w, groups, gated=gated, tile=chosen)
    num_experts, weight_rows, _ = w.shape
    check_scale("x_scale", x_scale, x.shape[:1])
    check_scale("w_scale", w_scale, w.shape[:1], w.shape[:2])
    num_columns = weight_rows // 2 if gated else weight_rows
    operands = [
        padded(x, 1, chosen.depth),
        padded(w.reshape(-1, w.shape[2]), mosaic.TILE_ROWS, chosen.depth),
        groups.tile_expert,
        groups.num_tiles,
    ]
    if x_scale is not None:
        operands.append(filled(x_scale, x.shape[0], x.shape[0]))
    if w_scale is not None:
        channels = _by_channel(w_scale, (num_experts, weight_rows)).reshape(-1)
        # The last columns of a tile may be none.
        operands.append(filled(channels, channels.size, channels.size + chosen.columns))

    def role(index: Any, num_workers: Any, *refs: Any) -> None:
        x_ref, w_ref, tile_group, used_tiles, *scales, out = refs
        w_scale_ref = scales.pop() if w_scale is not None else None
        first_rows = (0, num_columns) if gated else (0,)
        product = GemmRefs(
            x=x_ref,
            factors=tuple(
                Factor(ref=w_ref, first_row=first, scale=w_scale_ref) for first in first_rows
            ),
            out=out,
            x_scale=scales.pop() if x_scale is not None else None,
            groups=GroupRefs(tile_group=tile_group, num_tiles=used_tiles, weight_rows=weight_rows),
        )
        gemm_role(index, num_workers, product, chosen)

    return mosaic.Kernel(
        operands=operands,
        results=(
            jax.ShapeDtypeStruct(
                (x.shape[0], chosen.out_columns(num_columns, result_dtype)), result_dtype
            ),
        ),
        role=role,
        finish=lambda out: out[:, :num_columns],
        most_ctas=num_tiles * pl.cdiv(num_columns, chosen.columns),
    )


def grouped_gemm_reference(
    x: Float[Array, "R D"],
    w: Float[Array, "E F2 D"],
    groups: Groups,
    *,
    gated: bool = False,
    x_scale: Float[Array, "*R"] | None = None,
    w_scale: Float[Array, "*EF2"] | None = None,
    out_dtype: Any = None,
) -> Float[Array, "R F"]:
    """The meaning of `grouped_gemm`, with zeros in rows after the used tiles."""
    tile = jnp.arange(groups.tile_expert.shape[0])
    expert = jnp.where(tile < groups.num_tiles, groups.tile_expert, w.shape[0])
    expert = jnp.repeat(expert, x.shape[0] // tile.size)

    scales = jnp.ones((), jnp.float32) if w_scale is None else w_scale

    def add(y: Float[Array, "R F2"], one: Any) -> tuple[Float[Array, "R F2"], None]:
        index, weight, scale = one
        product = jnp.einsum("RD,FD->RF", x, weight, preferred_element_type=jnp.float32)
        if x_scale is not None:
            product = product * x_scale.reshape(-1, 1)
        product = product * scale[None]
        return jnp.where((expert == index)[:, None], product, y), None

    nothing = jnp.zeros((x.shape[0], w.shape[1]), jnp.float32)
    y, _ = lax.scan(add, nothing, (jnp.arange(w.shape[0]), w, _by_channel(scales, w.shape[:2])))
    if gated:
        gate, up = jnp.split(y, 2, axis=1)
        y = jax.nn.silu(gate) * up
    return y.astype(out_dtype or default_out_dtype(x.dtype))


def _by_channel(scale: Float[Array, "*EF2"], shape: tuple[int, ...]) -> Float[Array, "E F2"]:
    """Scales of all output channels of all experts."""
    return jnp.broadcast_to(scale.reshape(scale.shape + (1,) * (2 - scale.ndim)), shape)


def _check_groups(groups: Groups) -> None:
    read = {name: getattr(groups, name) for name in ("sources", "tile_expert", "num_tiles")}
    checks.check_arrays(**{f"groups.{name}": array for name, array in read.items()})
    sources, tile_expert, num_tiles = read.values()
    is_planned = sources.ndim == tile_expert.ndim == 1 and tile_expert.size > 0
    if not is_planned or num_tiles.shape != (1,):
        raise ValueError(
            f"groups.sources{sources.shape}, tile_expert{tile_expert.shape} and "
            f"num_tiles{num_tiles.shape} are not [R], [C] and [1]"
        )
    dtypes = [str(array.dtype) for array in read.values()]
    if dtypes != ["int32"] * len(dtypes):
        raise ValueError(f"groups are {dtypes}, not int32; take them from plan_groups")


def _check(x: Any, w: Any, groups: Groups, *, gated: bool, tile: GemmTile) -> None:
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[2]:
        raise ValueError(f"x{x.shape} and w{w.shape} are not [R, D] and [E, F, D]")
    multiple = mosaic.TILE_ROWS * (2 if gated else 1)
    if w.shape[1] % multiple:
        raise ValueError(f"{w.shape[1]} weight rows of an expert are no multiple of {multiple}")
    wanted = groups.tile_expert.shape[0] * tile.rows
    if x.shape[0] != wanted or groups.sources.shape[0] != wanted:
        raise ValueError(
            f"x{x.shape} and {groups.sources.shape[0]} planned rows are not {wanted}, which is "
            f"{groups.tile_expert.shape[0]} tiles of {tile.rows} rows"
        )
