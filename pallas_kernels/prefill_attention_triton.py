"""Prefill attention for GPUs without Hopper's units, through Pallas' Triton backend.

Means what `prefill_attention` means and takes the same tiles: 128 query rows, which are some
consecutive tokens and all query heads of one kv head, against the keys of their request. Bound by
arithmetic. Keys come as in `triton_pages`; a CTA takes tiles in turn. Heads of 256 are slow: some
registers are spilled, and keys come 16 at a time.

Accuracy: that of `prefill_attention`; with float32 operands all products are in float32.

Source: FlashAttention-2 (Dao, arXiv 2307.08691), section 3.1, over pages.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int32

from nanoflow_jax import compat
from pallas_kernels import checks, triton_pages
from pallas_kernels.decode_role import DecodeOptions
from pallas_kernels.prefill_attention import check_chunks, gather_results
from pallas_kernels.prefill_tiles import GRANULE, TILE_GRANULES, PrefillTiles, tile_len
from pallas_kernels.triton_pages import Tile, padded

_ROWS = TILE_GRANULES * GRANULE
_NUM_WARPS = 8
# Of a query: the most, and above which few keys fit beside 128 of them.
_MOST_ROW_BYTES = 512
_WIDE_ROW_BYTES = 256


def prefill_attention_triton(
    q: Float[Array, "T N H"],
    cache: Float[Array, "P 2 K S H"],
    page_table: Int32[Array, "R M"],
    tiles: PrefillTiles,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    num_ctas: int = 108,
    token: Array | None = None,
    tile: Tile | None = None,
    interpret: bool = False,
) -> Float[Array, "T N H"]:
    """Query tiles of prompt chunks against their cached contexts, causal.

    The reference is `prefill_attention_reference`.

    Args:
        q: The dense batch.
        cache: bfloat16, float16 or float32 as q, the chunks' own tokens already appended.
        page_table: Pages of each row, in order; entries past its last page may be anything.
        tiles: What to do, from `build_prefill_tiles` without a split.
        scale: Factor on q times k.
        window: Newest tokens a query sees, itself included; None sees all.
        softcap: Scores s become softcap * tanh(s / softcap); None leaves them.
        num_ctas: Most SMs to use.
        token: Read by nobody; orders this kernel after the one that makes it.
        tile: How the kernel runs; from the sizes unless given.
        interpret: Whether to run on whatever is at hand instead of a GPU.

    Returns:
        Attention output in q's dtype; zeros for tokens in no tile.

    Raises:
        ValueError: Shapes, dtypes or numbers do not fit each other or the kernel, or this jax has
            no such backend.
    """
    check_chunks(q, cache, page_table, tiles, dtypes=triton_pages.DTYPES)
    (_, N, H), K = q.shape, cache.shape[2]
    checks.check_count("num_ctas", num_ctas)
    checks.check_arrays(**checks.given(token=token))
    tile = tile or _default_tile(H, q.dtype)
    if tiles.groups.size:
        raise ValueError("the tiles have parts, which this kernel cannot merge; build them unsplit")
    options = DecodeOptions(scale=scale, window=window, softcap=softcap, interpreted=interpret)
    slots, capacity = tile_len(N // K), tiles.starts.shape[0]
    read = (tiles.starts, tiles.counts, tiles.positions, tiles.rows, tiles.num_tiles)
    operands = [q, cache, page_table, *(jnp.asarray(field) for field in read)]
    given = operands if token is None else [*operands, token]
    num_ctas = min(num_ctas, capacity * K)

    def prefill_attention_kernel(*refs: Any) -> None:
        used = [*refs[: len(operands)], refs[-1]]
        _kernel(_Refs(*used), options, tile, num_ctas)

    out = compat.triton_call(
        prefill_attention_kernel,
        out_shape=jax.ShapeDtypeStruct((capacity * slots, N, H), q.dtype),
        grid=(num_ctas,),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        interpret=interpret,
    )(*given)
    return gather_results(out, tiles)


def _default_tile(head_dim: int, dtype: Any) -> Tile:
    """What leaves room for the queries in the 99 KiB of a CTA on Ada."""
    row_bytes = pl.next_power_of_2(head_dim) * jnp.dtype(dtype).itemsize
    if row_bytes > _MOST_ROW_BYTES:
        raise ValueError(
            f"a head of {head_dim} x {dtype} takes more than {_MOST_ROW_BYTES} bytes; "
            "use the plain path"
        )
    if row_bytes > _WIDE_ROW_BYTES:
        return Tile(step_len=16, num_warps=_NUM_WARPS, num_stages=3)
    return Tile(step_len=64, num_warps=_NUM_WARPS, num_stages=5)


@dataclasses.dataclass(frozen=True)
class _Refs:
    """Operands and the result in global memory."""

    q: Any
    cache: Any
    page_table: Any
    starts: Any
    counts: Any
    positions: Any
    rows: Any
    num_tiles: Any
    out: Any


def _kernel(refs: _Refs, options: DecodeOptions, tile: Tile, num_ctas: int) -> None:
    num_items = refs.num_tiles[0] * refs.cache.shape[2]
    index = pl.program_id(0)

    def one_turn(turn: Any, _: None) -> None:
        _one_item(refs, options, tile, index + turn * num_ctas)

    lax.fori_loop(0, lax.div(num_items - index + num_ctas - 1, num_ctas), one_turn, None)


def _one_item(refs: _Refs, options: DecodeOptions, tile: Tile, item: Any) -> None:
    num_kv_heads, H = refs.cache.shape[2], refs.cache.shape[4]
    group = refs.q.shape[1] // num_kv_heads
    slots = tile_len(group)
    number, head = lax.div(item, num_kv_heads), lax.rem(item, num_kv_heads)
    count, first_position = refs.counts[number], refs.positions[number]
    row, columns = jnp.arange(_ROWS, dtype=jnp.int32), padded(H)
    slot, query_head = lax.div(row, group), head * group + lax.rem(row, group)
    position = first_position + slot
    is_real = (slot < count)[:, None] & (columns < H)[None]
    query = compat.plt.load(
        refs.q.at[(refs.starts[number] + slot)[:, None], query_head[:, None], columns[None]],
        mask=is_real,
        other=0,
    )

    def sees(key: Int32[Array, "1 C"]) -> Any:
        is_seen = key <= position[:, None]
        if options.window is not None:
            is_seen &= key > position[:, None] - options.window
        return is_seen

    oldest = 0 if options.window is None else first_position - (options.window - 1)
    context = triton_pages.Context(
        cache=refs.cache,
        page_table=refs.page_table,
        row=refs.rows[number],
        head=head,
        first=jnp.maximum(oldest, 0),
        end=first_position + count,
    )
    mixed, _, _ = triton_pages.attend(query, context, options, tile, sees=sees)
    compat.plt.store(
        refs.out.at[(number * slots + slot)[:, None], query_head[:, None], columns[None]],
        mixed.astype(refs.out.dtype),
        mask=is_real,
    )
