"""Attention of one query per request over its pages, on as many SMs as it is given.

Bound by memory: each cached byte is read once and takes part in about N / K operations. What counts
is how many bytes are on their way to an SM: one that runs alone on 1/48 of the bandwidth of an H200
needs some 90 KB, and here pages are fetched into all shared memory that queries leave free.

The kernel itself is in `decode_role`; the shares of its workers come from `work_list`. A segment
that is not cut leaves the kernel as it is; of the others, parts leave in float32, which a second
small kernel merges. Heads of 192 and 256 are read in half tiles, to leave all values in registers;
jax 0.10.2 cannot compile that, and spills 16 and 500 bytes. Other heads above 176 spill on any jax.

Accuracy: products of the inputs as they are, summed in float32; running softmax to the base 2 in
float32, with the GPU's exp2 (2 units of the last place); weights rounded to the cache's dtype
before they multiply values, as FlashAttention does; the result rounded once.

Source: split keys: Flash-Decoding (Dao et al., 2023), and Stream-K (arXiv 2301.03598) for the
shares; running softmax: Milakov and Gimelshein, arXiv 1805.02867.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import checks, mosaic
from pallas_kernels.decode_role import DecodeOptions, DecodeRefs, decode_role
from pallas_kernels.merge_parts import COLUMN_MULTIPLE, merge_runs
from pallas_kernels.work_list import PARTS_PER_GROUP, TILE_LEN, WORKERS_PER_CTA, WorkList

# Stands for minus infinity where a difference is taken: -inf - -inf would be NaN.
_LOWEST = -1e30
_DTYPES = ("bfloat16", "float16")
_MOST_GROUP = 16
_MOST_HEAD_DIM = 256
_COLUMN_MULTIPLE = 16


def decode_attention(
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
    interpret: Any = None,
) -> Float[Array, "R N H"]:
    """One query per request against that request's cached tokens.

    CTA i of n does what CTAs i, i + n, ... of the plan have to do: any number of them gives the
    same bits.

    Args:
        q: The newest token of each request, of the cache's dtype.
        cache: bfloat16 or float16.
        page_table: Pages of each request, in order; entries past its last page may be anything.
        context_lens: Cached tokens of each request, its newest included; 0 in unused rows.
        work: From `plan_decode` for these context_lens and this window.
        scale: Factor on q times k.
        window: Newest tokens a query sees, itself included; None sees all.
        softcap: Scores s become softcap * tanh(s / softcap); None leaves them.
        num_ctas: Most SMs to use; no more than the plan has room for are.
        token: Read by nobody; orders this kernel after the one that makes it.
        interpret: None on a GPU, or InterpretGPUParams.

    Returns:
        Attention output; zeros in unused rows.

    Raises:
        ValueError: Shapes, dtypes or numbers do not fit each other or the kernel.
    """
    kernel = prepare_decode(
        q,
        cache,
        page_table,
        context_lens,
        work,
        scale=scale,
        window=window,
        softcap=softcap,
        merge_ctas=num_ctas,
        interpret=interpret,
    )
    return mosaic.run(kernel, num_ctas=num_ctas, token=token, interpret=interpret)


def prepare_decode(
    q: Float[Array, "R N H"],
    cache: Float[Array, "P 2 K S H"],
    page_table: Int32[Array, "R M"],
    context_lens: Int32[Array, "R"],
    work: WorkList,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    merge_ctas: int = 132,
    interpret: Any = None,
) -> mosaic.Kernel:
    """The kernel of `decode_attention`, to run on a share of a grid; takes and refuses the same.

    It is to be run with the same `interpret`; a merge of parts on at most merge_ctas CTAs follows.
    """
    options = DecodeOptions(
        scale=scale, window=window, softcap=softcap, interpreted=interpret is not None
    )
    _check(q, cache, page_table, context_lens, work)
    (R, N, H), K = q.shape, cache.shape[2]
    group, num_parts = N // K, PARTS_PER_GROUP * work.groups.shape[0]
    padded = -(-group // mosaic.TILE_ROWS) * mosaic.TILE_ROWS
    columns = -(-H // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
    rows = jnp.pad(q.reshape(R * K, group, H), ((0, 0), (0, padded - group), (0, 0)))
    tables = (page_table, context_lens, work.live, work.workers)

    def finish(out: Any, parts: Any, part_weights: Any) -> Float[Array, "R N H"]:
        merged = merge_runs(
            parts,
            part_weights,
            jnp.asarray(work.groups),
            num_rows=group,
            dtype=out.dtype,
            num_ctas=merge_ctas,
            interpret=interpret,
        )
        return finish_decode(out[:, :group], merged[:, :, :H], context_lens, work)

    return mosaic.Kernel(
        operands=[rows, cache, *(jnp.asarray(table) for table in tables)],
        results=(
            jax.ShapeDtypeStruct(rows.shape, q.dtype),
            jax.ShapeDtypeStruct((num_parts, padded, columns), jnp.float32),
            jax.ShapeDtypeStruct((num_parts, padded), jnp.float32),
        ),
        role=lambda index, num_ctas, *refs: decode_role(
            index, num_ctas, DecodeRefs(*refs), options
        ),
        finish=finish,
        most_ctas=work.workers.shape[0] // WORKERS_PER_CTA,
        approx_math=True,
    )


def decode_attention_reference(
    q: Float[Array, "R N H"],
    cache: Float[Array, "P 2 K S H"],
    page_table: Int32[Array, "R M"],
    context_lens: Int32[Array, "R"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Float[Array, "R N H"]:
    """The meaning of `decode_attention`."""
    R, N, H = q.shape
    K, S = cache.shape[2:4]
    pages = cache.at[page_table].get(mode="clip").astype(jnp.float32)  # [R, M, 2, K, S, H]
    k, v = jnp.moveaxis(pages, 2, 0)  # each [R, M, K, S, H]
    grouped = q.astype(jnp.float32).reshape(R, K, N // K, H)
    scores = scale * jnp.einsum("RKGH,RMKSH->RKGMS", grouped, k, precision="highest")
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    position = jnp.arange(page_table.shape[1] * S, dtype=jnp.int32).reshape(1, -1, S)
    length = context_lens[:, None, None]
    is_seen = position < length
    if window is not None:
        is_seen &= position >= length - window
    scores = jnp.where(is_seen[:, None, None], scores, _LOWEST)
    weights = jax.nn.softmax(scores, axis=(-2, -1))
    v = jnp.where(is_seen[:, :, None, :, None], v, 0.0)
    mixed = jnp.einsum("RKGMS,RMKSH->RKGH", weights, v, precision="highest")
    return jnp.where(length > 0, mixed.reshape(R, N, H), 0.0).astype(q.dtype)


def finish_decode(
    out: Float[Array, "RK G H"],
    merged: Float[Array, "B G H"],
    context_lens: Int32[Array, "R"],
    work: WorkList,
) -> Float[Array, "R N H"]:
    """Results of all rows, from those of whole segments and those merged from parts."""
    row_groups = jnp.asarray(work.row_groups)
    is_merged = (row_groups < merged.shape[0])[:, None, None]
    out = jnp.where(is_merged, merged.at[row_groups].get(mode="clip"), out)
    out = out.reshape(context_lens.shape[0], -1, out.shape[2])
    # Kernels write nothing for rows without tokens.
    return jnp.where(context_lens[:, None, None] > 0, out, jnp.zeros((), out.dtype))


def check_batch(
    q: Any,
    cache: Any,
    page_table: Any,
    context_lens: Any,
    work: WorkList,
    *,
    dtypes: Sequence[str],
    most_group: int,
) -> None:
    """Raises ValueError unless operands fit each other and the plan, and these limits.

    Args:
        q: Queries, as the other operands those of `decode_attention`.
        cache: Pages.
        page_table: Pages of each request.
        context_lens: Tokens of each request.
        work: The plan.
        dtypes: That q and the cache may have.
        most_group: Query heads that a kv head may have.
    """
    fields = {f"work.{name}": field for name, field in work._asdict().items()}
    tables = {"page_table": page_table, "context_lens": context_lens}
    checks.check_arrays(q=q, cache=cache, **tables, **fields)
    if q.ndim != 3 or cache.ndim != 5 or cache.shape[1] != 2 or q.shape[2] != cache.shape[4]:
        raise ValueError(f"q{q.shape} and cache{cache.shape} are not [R, N, H] and [P, 2, K, S, H]")
    if 0 in (*q.shape, *cache.shape, *page_table.shape):
        raise ValueError(
            f"q{q.shape}, cache{cache.shape} and page_table{page_table.shape} must not be empty"
        )
    if q.dtype != cache.dtype or str(q.dtype) not in dtypes:
        raise ValueError(
            f"q is {q.dtype} and cache {cache.dtype}; both must be {' or '.join(dtypes)}"
        )
    (R, N, _), K = q.shape, cache.shape[2]
    group, rest = divmod(N, K)
    if rest or group > most_group:
        raise ValueError(f"N={N} query heads are not 1 to {most_group} for each of K={K} kv heads")
    for (name, table), axes in zip(tables.items(), ("R M", "R"), strict=True):
        if table.shape[:1] != (R,) or table.ndim != len(axes.split()) or table.dtype != jnp.int32:
            raise ValueError(
                f"{name} is {table.dtype}{table.shape}, not int32 [{axes.replace(' ', ', ')}] with "
                f"R={R}"
            )
    found = tuple(field.shape for field in work)
    num_workers, num_groups = work.workers.size // 5, work.groups.size // 2
    wanted = ((R, 4), (num_workers, 5), (num_groups, 2), (R * K,))
    is_planned = num_workers > 0 and num_workers % WORKERS_PER_CTA == 0 and num_groups > 0
    if found != wanted or not is_planned:
        raise ValueError(
            f"work has shapes {found}; a plan for R={R} requests and K={K} kv heads has {wanted}"
        )
    dtypes_found = [str(field.dtype) for field in work]
    if any(name not in ("int32", "int64") for name in dtypes_found):
        raise ValueError(f"work is {dtypes_found}, not int32; take it from plan_decode")


def _check(q: Any, cache: Any, page_table: Any, context_lens: Any, work: WorkList) -> None:
    check_batch(q, cache, page_table, context_lens, work, dtypes=_DTYPES, most_group=_MOST_GROUP)
    S, H = cache.shape[3:]
    if H % _COLUMN_MULTIPLE or H > _MOST_HEAD_DIM:
        raise ValueError(
            f"head_dim={H} is no multiple of {_COLUMN_MULTIPLE} up to {_MOST_HEAD_DIM}"
        )
    if S < mosaic.TILE_ROWS or (TILE_LEN % S and S % TILE_LEN):
        raise ValueError(
            f"page_size={S} must be at least {mosaic.TILE_ROWS} and divide {TILE_LEN}, "
            "or be a multiple of it"
        )
