"""Paged attention against the plain reference: any pages, lengths, groups, windows, soft caps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoflow_jax.kv_cache.attention import (
    attention_reference,
    decode_attention,
    prefill_attention,
)
from nanoflow_jax.kv_cache.layout import CacheShape, PageMajorLayout, TokenMinorLayout
from nanoflow_jax.kv_cache.tiles import Chunk, build_prefill_tiles

LAYOUTS = [PageMajorLayout, TokenMinorLayout]
# Four rows are read one by one, or three and then one: longest first, and a block part empty.
ONE_BY_ONE = functools.partial(TokenMinorLayout, gathered_bytes=1)
THREE_AT_ONCE = functools.partial(TokenMinorLayout, gathered_bytes=3 * 4 * 2 * 12 * 8)
# Layout, cache dtype, K, G, H, window, softcap: each value meets most others, and few compile.
CASES = st.sampled_from(
    [
        (TokenMinorLayout, "float32", 1, 1, 12, None, None),
        (ONE_BY_ONE, "float32", 2, 3, 20, 1, None),
        (ONE_BY_ONE, "float32", 1, 6, 20, 9, 2.0),
        (THREE_AT_ONCE, "bfloat16", 2, 3, 12, None, 2.0),
        (THREE_AT_ONCE, "float32", 2, 1, 12, 9, None),
        (PageMajorLayout, "float32", 2, 1, 20, 5, 2.0),
        (PageMajorLayout, "float32", 1, 6, 12, None, None),
        (PageMajorLayout, "bfloat16", 2, 3, 20, 9, None),
    ]
)
PAGE, TABLE = 8, 5  # tokens in a page, pages of a row


def _filled(make, dtype, K, H, lens, random):
    """A cache whose rows hold `lens` tokens in shuffled pages, everything else NaN.

    Returns the layout, the cache, the page table (unknown entries out of range or somebody
    else's) and the rounded keys and values [R, C, K, H].
    """
    num_pages = len(lens) * TABLE + 3
    shape = CacheShape(
        num_pages=num_pages, page_size=PAGE, num_kv_heads=K, head_dim=H, dtype=np.dtype(dtype)
    )
    layout = make(shape=shape)
    order = random.permutation(num_pages)
    table = random.integers(-2, num_pages + 5, size=(len(lens), TABLE)).astype(np.int32)
    kv = random.normal(size=(2, len(lens), TABLE * PAGE, K, H)).astype(np.float32)
    kv = kv.astype(dtype).astype(np.float32)
    row_of, at = [], []
    for row, n in enumerate(lens):
        used = -(-n // PAGE)
        table[row, :used] = order[row * TABLE : row * TABLE + used]
        row_of += [row] * n
        at += range(n)
    row_of, at = np.asarray(row_of, int), np.asarray(at, int)
    padding = 3 + sum(TABLE * PAGE - n for n in lens)  # one size of append for all examples
    pages = np.append(table[row_of, at // PAGE], [num_pages] * padding).astype(np.int32)
    k, v = (
        np.concatenate([x[row_of, at], np.full((padding, K, H), np.nan, np.float32)]) for x in kv
    )
    offsets = np.append(at % PAGE, [0] * padding).astype(np.int32)
    every = np.indices((num_pages, PAGE), np.int32).reshape(2, -1)
    nothing = np.full((num_pages * PAGE, K, H), np.nan, np.float32)
    cache = _append(layout, layout.allocate(), nothing, nothing, *every)
    return layout, _append(layout, cache, k, v, pages, offsets), table, kv


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _append(layout, cache, k, v, pages, offsets):
    return layout.append(cache, k, v, pages, offsets)


_decode = jax.jit(
    decode_attention, static_argnums=0, static_argnames=("scale", "window", "softcap")
)
_prefill = jax.jit(
    prefill_attention, static_argnums=0, static_argnames=("tile_len", "scale", "window", "softcap")
)
_reference = jax.jit(attention_reference, static_argnames=("scale", "window", "softcap"))


def test_decode_worked_by_hand():
    # One head of width 2, scale 1: scores of the two tokens are 0 and log 3, weights 1/4 and 3/4.
    shape = CacheShape(
        num_pages=1, page_size=4, num_kv_heads=1, head_dim=2, dtype=np.dtype("float32")
    )
    layout = TokenMinorLayout(shape=shape)
    k = np.array([[[5.0, 0.0]], [[7.0, np.log(3.0)]]], np.float32)
    v = np.array([[[4.0, 0.0]], [[0.0, 8.0]]], np.float32)
    page = np.zeros(2, np.int32)
    cache = layout.append(layout.allocate(), k, v, page, np.arange(2, dtype=np.int32))
    q = jnp.array([[[0.0, 1.0]]])
    table = np.zeros((1, 1), np.int32)
    out = decode_attention(layout, q, cache, table, np.array([2], np.int32), scale=1.0)
    np.testing.assert_allclose(out, [[[1.0, 6.0]]], rtol=1e-6)
    out = decode_attention(layout, q, cache, table, np.array([2], np.int32), scale=1.0, window=1)
    np.testing.assert_allclose(out, [[[0.0, 8.0]]], rtol=1e-6)


@given(
    CASES,
    st.lists(st.sampled_from([0, 1, 7, 8, 9, 16, 30, 39, 40]), min_size=4, max_size=4),
    st.integers(0, 99),
)
def test_decode_means_what_the_reference_means(case, lens, seed):
    make, dtype, K, G, H, window, softcap = case
    random = np.random.default_rng(seed)
    layout, cache, table, (k, v) = _filled(make, dtype, K, H, lens, random)
    q = random.normal(size=(len(lens), K * G, H)).astype(np.float32)
    options = {"scale": 0.4, "window": window, "softcap": softcap}
    out = _decode(layout, q, cache, table, np.asarray(lens, np.int32), **options)
    assert out.dtype == q.dtype
    for row, n in enumerate(lens):
        last = np.array([n - 1], np.int32)
        expected = _reference(q[row : row + 1], k[row], v[row], last, **options)[0]
        np.testing.assert_allclose(out[row], expected, atol=3e-6, rtol=1e-5)
        assert n or not np.any(out[row])


@given(CASES, st.integers(0, 99), st.data())
def test_prefill_means_what_the_reference_means(case, seed, data):
    make, dtype, K, G, H, window, softcap = case
    random = np.random.default_rng(seed)
    num_tokens, tile_len, lens, chunks = 48, 8, [], []
    start = data.draw(st.integers(0, 6))  # decode rows before the first chunk
    for row in range(3):
        cached = data.draw(st.sampled_from([0, 1, 8, 13, 24]))
        count = data.draw(st.sampled_from([0, 1, 7, 8, 9, 14]))
        chunks.append(Chunk(start=start, length=count, position=cached, row=row))
        lens.append(cached + count)
        start += count
    layout, cache, table, (k, v) = _filled(make, dtype, K, H, lens, random)
    q = random.normal(size=(num_tokens, K * G, H)).astype(np.float32)
    options = {"scale": 0.4, "window": window, "softcap": softcap}
    tiles = build_prefill_tiles(chunks, tile_len=tile_len, capacity=9)
    out = np.array(_prefill(layout, q, cache, table, tiles, tile_len=tile_len, **options))
    for row, chunk in enumerate(chunks):
        tokens = slice(chunk.start, chunk.start + chunk.length)
        # The reference gets a fixed number of queries, so that it is compiled once.
        queries = np.resize(q[tokens], (14, K * G, H)) if chunk.length else q[:14]
        positions = chunk.position + np.arange(14, dtype=np.int32)
        expected = _reference(queries, k[row], v[row], positions, **options)[: chunk.length]
        np.testing.assert_allclose(out[tokens], expected, atol=3e-6, rtol=1e-5)
        out[tokens] = 0
    assert not np.any(out), "tokens in no tile give zeros"


@pytest.mark.parametrize("make", LAYOUTS)
def test_a_tile_may_reach_over_the_end_of_the_dense_batch(make):
    random = np.random.default_rng(3)
    layout, cache, table, (k, v) = _filled(make, "float32", 1, 12, [20], random)
    q = random.normal(size=(10, 1, 12)).astype(np.float32)
    tiles = build_prefill_tiles(
        [Chunk(start=7, length=3, position=17, row=0)], tile_len=8, capacity=2
    )
    out = _prefill(layout, q, cache, table, tiles, tile_len=8, scale=0.4)
    expected = _reference(q[7:], k[0], v[0], np.arange(17, 20, dtype=np.int32), scale=0.4)
    np.testing.assert_allclose(out[7:], expected, atol=3e-6, rtol=1e-5)
    assert not np.any(out[:7])


@pytest.mark.parametrize("make", LAYOUTS)
def test_activations_in_bfloat16_come_back_in_bfloat16(make):
    random = np.random.default_rng(5)
    layout, cache, table, (k, v) = _filled(make, "bfloat16", 2, 16, [19, 0, 40], random)
    q = jnp.asarray(random.normal(size=(3, 4, 16)), jnp.bfloat16)
    lens = np.array([19, 0, 40], np.int32)
    out = _decode(layout, q, cache, table, lens, scale=0.25)
    assert out.dtype == jnp.bfloat16
    exact = np.asarray(q, np.float32)
    for row, n in ((0, 19), (2, 40)):
        last = np.array([n - 1], np.int32)
        expected = _reference(exact[row : row + 1], k[row], v[row], last, scale=0.25)[0]
        np.testing.assert_allclose(np.asarray(out[row], np.float32), expected, atol=0.02)


@pytest.mark.parametrize("make", LAYOUTS)
def test_a_step_updates_the_donated_cache_without_a_copy(make):
    shape = CacheShape(
        num_pages=64, page_size=64, num_kv_heads=2, head_dim=64, dtype=np.dtype("float32")
    )
    layout = make(shape=shape)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(cache, q, kv, pages, offsets, table, lens, tiles):
        cache = layout.append(cache, kv, kv, pages, offsets)
        out = decode_attention(layout, q[:4], cache, table[:4], lens, scale=0.1)
        return cache, out, prefill_attention(layout, q, cache, table, tiles, tile_len=8, scale=0.1)

    index = jax.ShapeDtypeStruct((20,), jnp.int32)
    tiles = jax.eval_shape(lambda: build_prefill_tiles([], tile_len=8, capacity=3))
    memory = (
        step.lower(
            jax.eval_shape(layout.allocate),
            jax.ShapeDtypeStruct((20, 6, 64), jnp.float32),
            jax.ShapeDtypeStruct((20, 2, 64), jnp.float32),
            index,
            index,
            jax.ShapeDtypeStruct((6, 8), jnp.int32),
            jax.ShapeDtypeStruct((4,), jnp.int32),
            tiles,
        )
        .compile()
        .memory_analysis()
    )
    assert memory.alias_size_in_bytes == shape.cache_bytes
    assert memory.temp_size_in_bytes < shape.cache_bytes // 4
