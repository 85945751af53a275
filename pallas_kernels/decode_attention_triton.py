"""Decode attention for GPUs without Hopper's units, through Pallas' Triton backend.

Means what `decode_attention` means, takes the same plan, and is bound by memory as it is: each
cached byte is read once. A CTA does what its workers in the plan would do, one after the other, and
an SM of an A100 has some 20 GB/s to itself, for which the two steps of `triton_pages` that are on
their way are enough. Queries of a kv head are padded to the 16 rows of a tensor core's product.

Accuracy: that of `decode_attention`; with float32 operands all products are in float32.

Source: as for `decode_attention`.
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
from pallas_kernels.decode_attention import check_batch, finish_decode
from pallas_kernels.decode_role import DecodeOptions
from pallas_kernels.decode_walk import Item, Walk
from pallas_kernels.merge_parts import merge_runs_reference
from pallas_kernels.triton_pages import Tile, padded
from pallas_kernels.work_list import PARTS_PER_GROUP, TILE_LEN, WORKERS_PER_CTA, WorkList

_MOST_GROUP = 64
_NUM_WARPS = 4


def decode_attention_triton(
    q: Float[Array, "R N H"],
    cache: Float[Array, "P 2 K S H"],
    page_table: Int32[Array, "R M"],
    context_lens: Int32[Array, "R"],
    work: WorkList,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    num_ctas: int = 132,
    token: Array | None = None,
    tile: Tile | None = None,
    interpret: bool = False,
) -> Float[Array, "R N H"]:
    """One query per request against that request's cached tokens.

    The reference is `decode_attention_reference`. Any number of CTAs gives the same bits.

    Args:
        q: The newest token of each request, of the cache's dtype.
        cache: bfloat16, float16 or float32.
        page_table: Pages of each request, in order; entries past its last page may be anything.
        context_lens: Cached tokens of each request, its newest included; 0 in unused rows.
        work: From `plan_decode` for these context_lens and this window.
        scale: Factor on q times k.
        window: Newest tokens a query sees, itself included; None sees all.
        softcap: Scores s become softcap * tanh(s / softcap); None leaves them.
        num_ctas: Most SMs to use; no more than the plan has room for are.
        token: Read by nobody; orders this kernel after the one that makes it.
        tile: How the kernel runs; from the sizes unless given.
        interpret: Whether to run on whatever is at hand instead of a GPU.

    Returns:
        Attention output; zeros in unused rows.

    Raises:
        ValueError: Shapes, dtypes or numbers do not fit each other or the kernel, or this jax has
            no such backend.
    """
    checks.check_count("num_ctas", num_ctas)
    checks.check_arrays(**checks.given(token=token))
    check_batch(
        q,
        cache,
        page_table,
        context_lens,
        work,
        dtypes=triton_pages.DTYPES,
        most_group=_MOST_GROUP,
    )
    (R, N, H), K = q.shape, cache.shape[2]
    if H > triton_pages.MOST_HEAD_DIM:
        raise ValueError(f"head_dim={H} is above {triton_pages.MOST_HEAD_DIM}")
    tile = tile or triton_pages.default_tile(
        head_dim=H, itemsize=q.dtype.itemsize, num_warps=_NUM_WARPS
    )
    options = DecodeOptions(scale=scale, window=window, softcap=softcap, interpreted=interpret)
    group, num_parts = N // K, PARTS_PER_GROUP * work.groups.shape[0]
    operands = [q.reshape(R * K, group, H), cache, page_table, context_lens]
    operands += [jnp.asarray(table) for table in (work.live, work.workers)]
    given = operands if token is None else [*operands, token]

    def decode_attention_kernel(*refs: Any) -> None:
        _kernel(_Refs(*refs[: len(operands)], *refs[len(given) :]), options, tile)

    out, parts, part_weights = compat.triton_call(
        decode_attention_kernel,
        out_shape=(
            jax.ShapeDtypeStruct((R * K, group, H), q.dtype),
            jax.ShapeDtypeStruct((num_parts, group, H), jnp.float32),
            jax.ShapeDtypeStruct((num_parts, group), jnp.float32),
        ),
        grid=(min(num_ctas, work.workers.shape[0] // WORKERS_PER_CTA),),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        interpret=interpret,
    )(*given)
    merged = merge_runs_reference(
        parts, part_weights, jnp.asarray(work.groups), num_rows=group, dtype=out.dtype
    )
    return finish_decode(out, merged, context_lens, work)


@dataclasses.dataclass(frozen=True)
class _Refs:
    """Operands and results in global memory."""

    q: Any
    cache: Any
    page_table: Any
    context_lens: Any
    live: Any
    workers: Any
    out: Any
    parts: Any
    part_weights: Any


def _kernel(refs: _Refs, options: DecodeOptions, tile: Tile) -> None:
    index, num_ctas = pl.program_id(0), pl.num_programs(0)
    walk = Walk(
        live=refs.live,
        workers=refs.workers,
        context_lens=refs.context_lens,
        num_kv_heads=refs.cache.shape[2],
    )

    def one_worker(number: Any, _: None) -> None:
        turn = lax.div(number, WORKERS_PER_CTA)
        slot = lax.rem(number, WORKERS_PER_CTA)
        place, num_items, part = walk.begin((index + turn * num_ctas) * WORKERS_PER_CTA + slot)

        def one_item(_: Any, state: Any) -> Any:
            place, part = state
            item = walk.item(place)
            _store(refs, item, part, _attend(refs, item, options, tile))
            return item.after, jnp.where(item.is_whole, part, part + 1)

        lax.fori_loop(0, num_items, one_item, (place, part))

    lax.fori_loop(0, walk.planned_ctas(index, num_ctas) * WORKERS_PER_CTA, one_worker, None)


def _attend(
    refs: _Refs, item: Item, options: DecodeOptions, tile: Tile
) -> tuple[Float[Array, "G H"], Float[Array, "G"], Float[Array, "G"]]:
    """See `triton_pages.attend`; over the tokens of an item."""
    _, group, H = refs.q.shape
    rows, columns = padded(group), padded(H)
    query = compat.plt.load(
        refs.q.at[_row(refs, item), rows[:, None], columns[None]],
        mask=(rows < group)[:, None] & (columns < H)[None],
        other=0,
    )
    length = item.length
    oldest = 0 if options.window is None else jnp.maximum(length - options.window, 0)
    context = triton_pages.Context(
        cache=refs.cache,
        page_table=refs.page_table,
        row=item.request,
        head=item.head,
        first=jnp.maximum(item.first_tile * TILE_LEN, oldest),
        end=jnp.minimum((item.first_tile + item.num_tiles) * TILE_LEN, length),
    )
    return triton_pages.attend(
        query, context, options, tile, sees=lambda key: jnp.full_like(key, True, dtype=jnp.bool_)
    )


def _store(refs: _Refs, item: Item, part: Any, result: Any) -> None:
    mixed, top, total = result
    _, group, H = refs.q.shape
    rows, columns = padded(group), padded(H)
    is_row = rows < group
    is_real = is_row[:, None] & (columns < H)[None]
    is_part = jnp.logical_not(item.is_whole)
    compat.plt.store(
        refs.out.at[_row(refs, item), rows[:, None], columns[None]],
        mixed.astype(refs.out.dtype),
        mask=is_real & item.is_whole,
    )
    compat.plt.store(
        refs.parts.at[part, rows[:, None], columns[None]], mixed, mask=is_real & is_part
    )
    compat.plt.store(refs.part_weights.at[part, rows], top + jnp.log2(total), mask=is_row & is_part)


def _row(refs: _Refs, item: Item) -> Any:
    return item.request * refs.cache.shape[2] + item.head
