"""Attention over a paged cache in plain JAX, for decode rows and for chunks of prompt.

Context length is not compiled in: both loop over pages up to a bound known at run time and
keep a running softmax (Milakov and Gimelshein, arXiv 1805.02867), so one program serves all.

A token at position p sees cached positions (p - window, p], or [0, p] without a window.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from nanoflow_jax.kv_cache.layout import KvLayout
from nanoflow_jax.kv_cache.tiles import PrefillTiles

# Stands for minus infinity where a difference is taken: -inf - -inf would be NaN.
_LOWEST = -1e30


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Options:
    """What a model says of its scores; see `decode_attention`."""

    scale: float
    window: int | None
    softcap: float | None


def decode_attention(
    layout: KvLayout,
    q: Float[Array, "R N H"],
    cache: Any,
    page_table: Int32[Array, "R M"],
    context_lens: Int32[Array, "R"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Float[Array, "R N H"]:
    """One query per row against that row's cached tokens.

    Args:
        layout: Layout of the cache.
        q: The row's newest token.
        cache: Cache of this layer, the newest token already appended.
        page_table: Pages of each row, in order; entries past its last page may be anything.
        context_lens: Cached tokens of each row, its newest included; 0 in an unused row.
        scale: Factor on q times k.
        window: Newest tokens a query sees, itself included; None sees all.
        softcap: Scores s become softcap * tanh(s / softcap); None leaves them.

    Returns:
        Attention output in q's dtype; zeros in unused rows.

    Accuracy: Products, softmax and sums in float32.
    """
    options = _Options(scale=scale, window=window, softcap=softcap)
    last = context_lens - 1
    return _attend(layout, q[:, None], cache, page_table, last[:, None], options)[:, 0]


def prefill_attention(
    layout: KvLayout,
    q: Float[Array, "T N H"],
    cache: Any,
    page_table: Int32[Array, "R M"],
    tiles: PrefillTiles,
    *,
    tile_len: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Float[Array, "T N H"]:
    """Query tiles of prompt chunks against their cached contexts, causal.

    Args:
        layout: Layout of the cache.
        q: The dense batch; tokens outside every tile are not read.
        cache: Cache of this layer, the chunks' own tokens already appended.
        page_table: Pages of each row, in order; entries past its last page may be anything.
        tiles: What to do, from `build_prefill_tiles` with the same tile_len.
        tile_len: Tokens in a full tile.
        scale: Factor on q times k.
        window: Newest tokens a query sees, itself included; None sees all.
        softcap: Scores s become softcap * tanh(s / softcap); None leaves them.

    Returns:
        Attention output in q's dtype; zeros for tokens in no tile.

    Accuracy: Products, softmax and sums in float32.
    """
    options = _Options(scale=scale, window=window, softcap=softcap)
    num_tokens = q.shape[0]
    token = jnp.arange(tile_len, dtype=jnp.int32)
    # Room at the end, or dynamic_slice would shift a tile that reaches over it.
    padded = jnp.pad(q, ((0, tile_len), (0, 0), (0, 0)))

    def one_tile(tile: Int32[Array, ""], out: Float[Array, "U N H"]) -> Float[Array, "U N H"]:
        start, count = tiles.starts[tile], tiles.counts[tile]
        is_query = token < count
        result = _attend(
            layout,
            jax.lax.dynamic_slice_in_dim(padded, start, tile_len)[None],
            cache,
            page_table[tiles.rows[tile]][None],
            jnp.where(is_query, tiles.positions[tile] + token, -1)[None],
            options,
        )[0]
        # The tokens after a short tile belong to another one.
        kept = jax.lax.dynamic_slice_in_dim(out, start, tile_len)
        result = jnp.where(is_query[:, None, None], result, kept)
        return jax.lax.dynamic_update_slice_in_dim(out, result, start, axis=0)

    num_used = jnp.sum(tiles.counts > 0, dtype=jnp.int32)
    return jax.lax.fori_loop(0, num_used, one_tile, jnp.zeros_like(padded))[:num_tokens]


def attention_reference(
    q: Float[Array, "B N H"],
    k: Float[Array, "C K H"],
    v: Float[Array, "C K H"],
    positions: Int32[Array, "B"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Float[Array, "B N H"]:
    """What the functions above mean, for one request with its C keys and values side by side.

    Query head n reads KV head n // G. A query at position -1 sees nothing and answers zeros.
    """
    group = q.shape[1] // k.shape[1]

    def one_query(query: Float[Array, "N H"], position: Int32[Array, ""]) -> Float[Array, "N H"]:
        scores = scale * jnp.einsum(
            "NH,CNH->NC", query, jnp.repeat(k, group, axis=1), precision="highest"
        )
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        token = jnp.arange(k.shape[0])
        is_seen = token <= position
        if window is not None:
            is_seen &= token > position - window
        weights = jax.nn.softmax(scores, axis=-1, where=is_seen[None])
        mixed = jnp.einsum("NC,CNH->NH", weights, jnp.repeat(v, group, axis=1), precision="highest")
        return jnp.where(position >= 0, mixed, 0.0)

    return jax.vmap(one_query)(q, positions)


class _Rows(NamedTuple):
    """Contexts to attend to, one per row; Q is B queries of a row times G heads of a KV head."""

    q: Float[Array, "R K Q H"]
    pages: Int32[Array, "R M"]
    positions: Int32[Array, "R B"]  # -1: a query that sees nothing
    first_page: Int32[Array, "R"]  # the row's queries see pages [first, first + num) of its table
    num_pages: Int32[Array, "R"]


class _Running(NamedTuple):
    """Softmax of each query over the pages read so far."""

    top: Float[Array, "R K Q"]
    total: Float[Array, "R K Q"]
    mixed: Float[Array, "R K Q H"]


def _attend(
    layout: KvLayout,
    q: Float[Array, "R B N H"],
    cache: Any,
    page_table: Int32[Array, "R M"],
    positions: Int32[Array, "R B"],
    options: _Options,
) -> Float[Array, "R B N H"]:
    """B queries per row, at `positions` of the row's context; a query at -1 answers zeros."""
    R, B, N, H = q.shape
    K = layout.shape.num_kv_heads
    grouped = q.astype(jnp.float32).reshape(R, B, K, N // K, H).swapaxes(1, 2).reshape(R, K, -1, H)
    first_page, num_pages = _pages_seen(positions, layout.shape.page_size, options.window)
    rows = _Rows(grouped, page_table, positions, first_page, num_pages)
    block = min(R, layout.pages_at_once)
    if block == R:
        out = _attend_in_blocks(layout, cache, rows, block, options)
    else:
        # Longest first: each column of pages is then read for a prefix of the rows only.
        order = jnp.argsort(-num_pages)
        out = _attend_in_blocks(layout, cache, _take_rows(rows, order), block, options)
        out = out[jnp.argsort(order)]
    out = out.reshape(R, K, B, N // K, H).swapaxes(1, 2).reshape(R, B, N, H)
    return out.astype(q.dtype)


def _pages_seen(
    positions: Int32[Array, "R B"], page_size: int, window: int | None
) -> tuple[Int32[Array, "R"], Int32[Array, "R"]]:
    """First page that a query of the row sees, and how many from there on."""
    end = (jnp.max(positions, axis=1) + page_size) // page_size
    if window is None:
        return jnp.zeros_like(end), end
    oldest = jnp.min(jnp.where(positions < 0, jnp.iinfo(jnp.int32).max, positions), axis=1)
    first = jnp.minimum(jnp.maximum(oldest - (window - 1), 0) // page_size, end)
    return first, end - first


def _take_rows(rows: _Rows, order: Int32[Array, "R"]) -> _Rows:
    return _Rows(*(field[order] for field in rows))


def _attend_in_blocks(
    layout: KvLayout, cache: Any, rows: _Rows, block: int, options: _Options
) -> Float[Array, "R K Q H"]:
    """Reads one page of `block` rows at a time; rows beyond a block have no more pages than it."""
    R = rows.num_pages.shape[0]
    padding = -R % block
    if padding:  # rows without pages
        rows = _Rows(*(jnp.pad(x, ((0, padding),) + ((0, 0),) * (x.ndim - 1)) for x in rows))

    def one_column(step: Int32[Array, ""], running: _Running) -> _Running:
        def one_block(index: Int32[Array, ""], running: _Running) -> _Running:
            start = index * block
            some = _Rows(*(jax.lax.dynamic_slice_in_dim(x, start, block) for x in rows))
            kept = _Running(*(jax.lax.dynamic_slice_in_dim(x, start, block) for x in running))
            new = _read_page(layout, cache, some, step, kept, options)
            return _Running(
                *(
                    jax.lax.dynamic_update_slice_in_dim(x, y, start, axis=0)
                    for x, y in zip(running, new, strict=True)
                )
            )

        if block >= R:
            return _read_page(layout, cache, rows, step, running, options)
        num_active = jnp.sum(rows.num_pages > step, dtype=jnp.int32)
        return jax.lax.fori_loop(0, (num_active + block - 1) // block, one_block, running)

    sizes = rows.q.shape
    nothing = _Running(
        top=jnp.full(sizes[:3], _LOWEST), total=jnp.zeros(sizes[:3]), mixed=jnp.zeros(sizes)
    )
    running = jax.lax.fori_loop(0, jnp.max(rows.num_pages), one_column, nothing)
    total = running.total[..., None]
    # Not `total > 0`: what is no number must come through and fail its request, not turn into 0.
    is_empty = total == 0
    return jnp.where(is_empty, 0.0, running.mixed / jnp.where(is_empty, 1.0, total))[:R]


def _read_page(
    layout: KvLayout,
    cache: Any,
    rows: _Rows,
    step: Int32[Array, ""],
    running: _Running,
    options: _Options,
) -> _Running:
    """Adds each row's page number `step`, counted from its first."""
    S = layout.shape.page_size
    group = rows.q.shape[2] // rows.positions.shape[1]
    column = rows.first_page + step
    pages = jnp.take_along_axis(rows.pages, column[:, None], axis=1, mode="clip")[:, 0]
    token = column[:, None] * S + jnp.arange(S, dtype=jnp.int32)[None]  # [R, S]
    is_seen = _is_seen(rows.positions, token, options.window)  # [R, B, S]
    is_seen_grouped = jnp.repeat(is_seen, group, axis=1)[:, None]  # [R, 1, Q, S]
    scores = layout.scores(cache, rows.q, pages, scale=options.scale)
    if options.softcap is not None:
        scores = options.softcap * jnp.tanh(scores / options.softcap)
    scores = jnp.where(is_seen_grouped, scores, _LOWEST)
    top = jnp.maximum(running.top, jnp.max(scores, axis=-1))
    weights = jnp.where(is_seen_grouped, jnp.exp(scores - top[..., None]), 0.0)
    fade = jnp.exp(running.top - top)
    mixed = layout.mix(cache, weights, pages, jnp.any(is_seen, axis=1))
    return _Running(
        top=top,
        total=running.total * fade + jnp.sum(weights, axis=-1),
        mixed=running.mixed * fade[..., None] + mixed,
    )


def _is_seen(
    positions: Int32[Array, "R B"], token: Int32[Array, "R S"], window: int | None
) -> Bool[Array, "R B S"]:
    query = positions[:, :, None]
    key = token[:, None, :]
    seen = key <= query
    return seen if window is None else seen & (key > query - window)
