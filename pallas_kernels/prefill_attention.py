"""Attention of prompt chunks over a paged cache, on as many SMs as it is given.

Bound by arithmetic: a tile of 128 query rows multiplies each key and value that it fetches 128
times (an H200 makes about 206 bfloat16 operations per byte of memory, and tiles that run at the
same time share what they fetch in L2). Where there are fewer tiles than SMs, as of a short chunk
over a long context, the plan cuts keys into parts, whose results leave in float32, which a second
small kernel merges.

CTAs are persistent. A tile holds some consecutive tokens and all query heads of one KV head, cut
into granules of eight tokens of one head; each of two warpgroups owns eight granules and keeps a
running softmax (Milakov and Gimelshein, arXiv 1805.02867), while a third one fetches queries and
pages (TMA) some steps ahead. While one warpgroup multiplies, the other one exponentiates.

Accuracy: products of the inputs as they are and sums in float32; weights of the values are rounded
to the cache's dtype; exponentials by the approximate instruction (2 units in the last place of
float32). About 4e-3 of the result in bfloat16.

Source: FlashAttention-3 (Shah et al., arXiv 2407.08608), sections 3.1 and 3.2: warp specialisation
and two warpgroups that take turns; pages as in PagedAttention (Kwon et al., arXiv 2309.06180).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import checks, mosaic
from pallas_kernels.merge_parts import COLUMN_MULTIPLE, merge_runs
from pallas_kernels.prefill_role import PrefillForm, PrefillRefs, prefill_role
from pallas_kernels.prefill_tiles import GRANULE, TILE_GRANULES, PrefillTiles, tile_len

_DTYPES = ("bfloat16", "float16")
_HEAD_DIMS = (64, 128, 256)
_PAGE_SIZES = (16, 32, 64, 128)


def prefill_attention(
    q: Float[Array, "T N H"],
    cache: Float[Array, "P 2 K S H"],
    page_table: Int32[Array, "R M"],
    tiles: PrefillTiles,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    aligned: bool = False,
    num_ctas: int = 132,
    token: Array | None = None,
    interpret: Any = None,
) -> Float[Array, "T N H"]:
    """Query tiles of prompt chunks against their cached contexts, causal.

    Args:
        q: The dense batch.
        cache: Cache of one layer, of q's dtype, the chunks' own tokens already appended.
        page_table: Pages of each row, in order; entries past its last page may be anything.
        tiles: What to do, from `build_prefill_tiles`.
        scale: Factor on q times k.
        window: Newest tokens a query sees, itself included; None sees all.
        softcap: Scores s become softcap * tanh(s / softcap); None leaves them.
        aligned: Whether all chunks start at multiples of 8 (`build_prefill_tiles` checks). The
            result is then written where it belongs; otherwise XLA gathers it from the tiles.
        num_ctas: Most SMs to use.
        token: Read by nobody; orders this kernel after the one that makes it.
        interpret: None on a GPU, or InterpretGPUParams.

    Returns:
        Attention output in q's dtype. Of tokens in no tile: zeros, or anything where aligned.

    Raises:
        ValueError: Shapes or dtypes do not fit each other, or the kernel cannot do them.
    """
    kernel = prepare_prefill(
        q,
        cache,
        page_table,
        tiles,
        scale=scale,
        window=window,
        softcap=softcap,
        aligned=aligned,
        merge_ctas=num_ctas,
        interpret=interpret,
    )
    return mosaic.run(kernel, num_ctas=num_ctas, token=token, interpret=interpret)


def prepare_prefill(
    q: Float[Array, "T N H"],
    cache: Float[Array, "P 2 K S H"],
    page_table: Int32[Array, "R M"],
    tiles: PrefillTiles,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    aligned: bool = False,
    merge_ctas: int = 132,
    interpret: Any = None,
) -> mosaic.Kernel:
    """The kernel of `prefill_attention`, to run on a share of a grid; takes and refuses the same.

    It is to be run with the same `interpret`, by any number of CTAs. A merge on at most merge_ctas
    CTAs follows where the tiles have room for parts.
    """
    checks.check_scores(scale=scale, window=window, softcap=softcap)
    _check(q, cache, page_table, tiles)
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, page_size = cache.shape[2:4]
    capacity, num_parts = tiles.starts.shape[0], 2 * tiles.groups.shape[0]
    form = PrefillForm(
        head_dim=head_dim,
        page_size=page_size,
        num_kv_heads=num_kv_heads,
        group=num_heads // num_kv_heads,
        dtype=q.dtype,
        scale=scale,
        window=window,
        softcap=softcap,
        in_place=aligned,
        max_parts=num_parts,
        is_simulated=interpret is not None,
    )
    if num_tokens % GRANULE:
        q = jnp.pad(q, ((0, -num_tokens % GRANULE), (0, 0), (0, 0)))
    pages = cache.reshape(-1, page_size, head_dim)
    num_rows = q.shape[0] if aligned else capacity * form.slots
    results = [jax.ShapeDtypeStruct((num_rows, num_heads, head_dim), q.dtype)]
    if num_parts:
        shape = (num_kv_heads * TILE_GRANULES * num_parts, GRANULE)
        columns = -(-head_dim // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
        results.append(jax.ShapeDtypeStruct((*shape, columns), jnp.float32))
        results.append(jax.ShapeDtypeStruct(shape, jnp.float32))

    def finish(out: Any, parts: Any = None, weights: Any = None) -> Float[Array, "T N H"]:
        if parts is not None:
            merged = merge_runs(
                parts,
                weights,
                _part_runs(tiles, form),
                num_rows=GRANULE,
                dtype=out.dtype,
                num_ctas=merge_ctas,
                interpret=interpret,
            )
            out = _with_merged(out, merged[..., :head_dim], tiles=tiles, form=form)
        if aligned:
            return out[:num_tokens]
        return gather_results(out, tiles)

    read = (tiles.starts, tiles.counts, tiles.positions, tiles.rows, tiles.num_tiles, tiles.cuts)
    return mosaic.Kernel(
        operands=[q, pages, page_table, *(jnp.asarray(field) for field in read)],
        results=tuple(results),
        role=lambda index, num_workers, *refs: prefill_role(
            index, num_workers, PrefillRefs(*refs), form
        ),
        finish=finish,
        most_ctas=capacity * num_kv_heads,
        approx_math=True,
    )


def prefill_attention_reference(
    q: Float[Array, "T N H"],
    cache: Float[Array, "P 2 K S H"],
    page_table: Int32[Array, "R M"],
    tiles: PrefillTiles,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Float[Array, "T N H"]:
    """The meaning of `prefill_attention`: each token against all that its row's pages hold."""
    group = q.shape[1] // cache.shape[2]
    slots = tile_len(group)
    tile = jnp.asarray(tiles.sources) // slots
    is_query = tile < tiles.starts.shape[0]
    position = jnp.asarray(tiles.positions).at[tile].get(mode="clip") + tiles.sources % slots
    pages = page_table[jnp.asarray(tiles.rows).at[tile].get(mode="clip")]  # [T, M]
    both = cache.at[pages].get(mode="clip").astype(jnp.float32)  # [T, M, 2, K, S, H]
    k, v = jnp.moveaxis(both, 2, 0).swapaxes(2, 3)  # [T, K, M, S, H]
    k, v = (x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in (k, v))  # [T, K, M S, H]
    grouped = q.astype(jnp.float32).reshape(q.shape[0], -1, group, q.shape[2])
    scores = scale * jnp.einsum("TKGH,TKCH->TKGC", grouped, k, precision="highest")
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    key = jnp.arange(k.shape[2])[None]
    is_seen = is_query[:, None] & (key <= position[:, None])
    if window is not None:
        is_seen &= key > position[:, None] - window
    weights = jax.nn.softmax(scores, axis=-1, where=is_seen[:, None, None])
    v = jnp.where(is_seen[:, None, :, None], v, 0.0)
    mixed = jnp.einsum("TKGC,TKCH->TKGH", weights, v, precision="highest")
    return jnp.where(is_query[:, None, None], mixed.reshape(q.shape), 0.0).astype(q.dtype)


def _slots(form: PrefillForm) -> tuple[Int32[Array, "granules"], Int32[Array, "granules"]]:
    """First slot, and query head of its KV head, of each granule of a tile that may have tokens.

    Granules are octets of tokens, of each query head in turn.
    """
    granule = jnp.arange(form.slots // GRANULE * form.group, dtype=jnp.int32)
    octet, member = jnp.divmod(granule, form.group)
    return octet * GRANULE, member


def _part_runs(tiles: PrefillTiles, form: PrefillForm) -> Int32[Array, "B 2"]:
    """[first, end) of the parts of each KV head, each granule, each tile that is cut."""
    groups = jnp.asarray(tiles.groups)
    counts = jnp.asarray(tiles.counts).at[jnp.asarray(tiles.group_items)].get(mode="clip")
    slot, _ = _slots(form)
    # Nothing where a granule has no tokens.
    has_tokens = (slot[:, None] < counts[None])[..., None]  # [granules, W, 1]
    runs = jnp.where(has_tokens, groups[None], 0)
    head = jnp.arange(form.num_kv_heads, dtype=jnp.int32)[:, None]
    granule = jnp.arange(slot.size, dtype=jnp.int32)[None]
    first = (head * TILE_GRANULES + granule) * form.max_parts
    return (first[..., None, None] + runs[None]).reshape(-1, 2)


def _with_merged(
    out: Float[Array, "U N H"],
    merged: Float[Array, "B rows H"],
    *,
    tiles: PrefillTiles,
    form: PrefillForm,
) -> Float[Array, "U N H"]:
    """The kernel's result, with that of the tiles whose keys are cut into parts."""
    items = jnp.asarray(tiles.group_items)
    starts = form.slots * jnp.arange(tiles.starts.shape[0], dtype=jnp.int32)
    if form.in_place:
        starts = jnp.asarray(tiles.starts)
    start = starts.at[items].get(mode="clip")[None, :, None]
    count = jnp.asarray(tiles.counts).at[items].get(mode="fill", fill_value=0)[None, :, None]
    slot, member = _slots(form)
    slot = slot[:, None, None] + jnp.arange(GRANULE, dtype=jnp.int32)[None, None]
    place = jnp.where(slot < count, start + slot, out.shape[0])[None]  # [1, granules, W, rows]
    head = form.group * jnp.arange(form.num_kv_heads, dtype=jnp.int32)[:, None] + member[None]
    merged = merged.reshape(form.num_kv_heads, *place.shape[1:], -1)
    return out.at[place, head[..., None, None]].set(merged, mode="drop")


def gather_results(out: Float[Array, "C N H"], tiles: PrefillTiles) -> Float[Array, "T N H"]:
    """What tiles say of each token, from the results of all slots; zeros of tokens in no tile."""
    return out.at[jnp.asarray(tiles.sources)].get(mode="fill", fill_value=0)


def check_chunks(
    q: Any, cache: Any, page_table: Any, tiles: PrefillTiles, *, dtypes: Sequence[str]
) -> None:
    """Raises ValueError unless operands of `prefill_attention` fit each other.

    Args:
        q: Queries.
        cache: Pages.
        page_table: Pages of each row.
        tiles: What to do.
        dtypes: That q and the cache may have.
    """
    fields = {f"tiles.{name}": field for name, field in tiles._asdict().items()}
    checks.check_arrays(q=q, cache=cache, page_table=page_table, **fields)
    if q.ndim != 3 or cache.ndim != 5 or cache.shape[1] != 2 or q.shape[2] != cache.shape[4]:
        raise ValueError(f"q{q.shape} and cache{cache.shape} are not [T, N, H] and [P, 2, K, S, H]")
    if 0 in (*q.shape, *cache.shape):
        raise ValueError(f"q{q.shape} and cache{cache.shape} must not be empty")
    if q.dtype != cache.dtype or str(q.dtype) not in dtypes:
        raise ValueError(
            f"q is {q.dtype} and the cache {cache.dtype}; both must be {' or '.join(dtypes)}"
        )
    if q.shape[1] % cache.shape[2]:
        raise ValueError(f"{q.shape[1]} query heads are no multiple of {cache.shape[2]} KV heads")
    if page_table.ndim != 2 or page_table.dtype != jnp.int32:
        raise ValueError(f"page_table is {page_table.dtype}{page_table.shape}, not int32 [R, M]")
    if 0 in page_table.shape:
        raise ValueError(f"page_table{page_table.shape} must not be empty")
    shapes = [field.shape for field in tiles]
    capacity, num_groups = tiles.starts.shape, tiles.group_items.shape
    wanted = [capacity] * 4 + [(1,), q.shape[:1], (*capacity, 3), (*num_groups, 2), num_groups]
    if shapes != wanted or tiles.starts.size == 0:
        raise ValueError(
            f"tiles of shapes {shapes} are not [C] x 4, [1], [T] = {q.shape[:1]}, [C, 3], "
            "[B // 2, 2] and [B // 2]"
        )
    if any(field.dtype != jnp.int32 for field in tiles):
        raise ValueError(f"tiles are {[str(field.dtype) for field in tiles]}, not int32")


def _check(q: Any, cache: Any, page_table: Any, tiles: PrefillTiles) -> None:
    check_chunks(q, cache, page_table, tiles, dtypes=_DTYPES)
    if q.shape[2] not in _HEAD_DIMS:
        raise ValueError(f"head width {q.shape[2]} is none of {_HEAD_DIMS}; use the plain path")
    if cache.shape[3] not in _PAGE_SIZES:
        raise ValueError(f"page size {cache.shape[3]} is none of {_PAGE_SIZES}")
