"""Chunks for prefill attention, whichever kernel runs it."""

import jax.numpy as jnp
import kernel_runs
import numpy as np

from pallas_kernels.prefill_tiles import build_prefill_tiles, max_tiles

# Nothing, one token at the end of a page, a chunk over its own pages only, one in mid-page.
RAGGED = ((3, 6, 0, 1), (9, 40, 100, 0), (49, 0, 5, 2), (49, 1, 127, 3))


def operands(
    chunks=RAGGED,
    *,
    num_tokens=56,
    heads=(4, 1),
    head_dim=64,
    page_size=64,
    dtype=jnp.bfloat16,
    window=None,
    softcap=None,
    aligned=False,
    split=None,
):
    """Chunks over shuffled pages; NaN wherever no request has written."""
    num_heads, num_kv_heads = heads
    random = np.random.default_rng([num_tokens, head_dim, page_size])
    num_rows = 1 + max(row for *_, row in chunks)
    ends = np.zeros(num_rows, int)
    for _, length, position, row in chunks:
        ends[row] = position + length
    pages_each = -(-ends // page_size)
    pages = random.permutation(pages_each.sum() + 2)
    table = np.full((num_rows, pages_each.max() + 1), pages[-1])
    cache = np.full((len(pages), 2, num_kv_heads, page_size, head_dim), np.nan)
    for row, end in enumerate(ends):
        own, pages = np.split(pages, [pages_each[row]])
        table[row, : len(own)] = own
        for page in own:
            written = min(page_size, end)
            shape = (2, num_kv_heads, written, head_dim)
            cache[page, :, :, :written] = random.standard_normal(shape)
            end -= written
    group = num_heads // num_kv_heads
    room = 0 if split is None else split.max_parts
    return {
        "q": kernel_runs.normal(1, num_tokens, num_heads, head_dim, dtype=dtype),
        "cache": jnp.asarray(cache, dtype),
        "page_table": jnp.asarray(table, jnp.int32),
        "tiles": build_prefill_tiles(
            chunks,
            group=group,
            capacity=max_tiles(num_tokens, num_rows, group=group) + room,
            num_tokens=num_tokens,
            window=window,
            aligned=aligned,
            split=split,
        ),
        "scale": head_dim**-0.5,
        "window": window,
        "softcap": softcap,
    }


CASES = [
    ({"chunks": [(2, 9, 0, 0)], "page_size": 16, "heads": (3, 1), "window": 4}, 2),
    ({"chunks": [(0, 9, 130, 0)], "page_size": 128, "head_dim": 256, "heads": (16, 1)}, 1),
    (
        {
            "chunks": [(0, 140, 14, 0)],
            "num_tokens": 140,
            "heads": (1, 1),
            "page_size": 16,
            "dtype": jnp.float16,
        },
        132,
    ),
]
