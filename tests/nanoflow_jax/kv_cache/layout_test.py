"""Cache layouts: what append stores, products find, and what is dropped harms nothing."""

import functools

import deviceless
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoflow_jax.kv_cache.layout import CacheShape, PageMajorLayout, TokenMinorLayout

LAYOUTS = [PageMajorLayout, TokenMinorLayout]


def _shape(dtype="float32", **sizes):
    sizes = {"num_pages": 4, "page_size": 8, "num_kv_heads": 2, "head_dim": 12} | sizes
    return CacheShape(dtype=np.dtype(dtype), **sizes)


def _contents(layout, cache):
    """Keys and values [P, K, S, H] read through the products alone: q = e_h, weights = e_s."""
    s = layout.shape
    pages = np.arange(s.num_pages, dtype=np.int32)

    def units(size):
        return np.broadcast_to(
            np.eye(size, dtype=np.float32), (s.num_pages, s.num_kv_heads, size, size)
        )

    keys = layout.scores(cache, units(s.head_dim), pages, scale=1.0).swapaxes(2, 3)
    seen = np.ones((s.num_pages, s.page_size), bool)
    return np.array(keys), np.array(layout.mix(cache, units(s.page_size), pages, seen))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _append(layout, cache, k, v, pages, offsets):
    return layout.append(cache, k, v, pages, offsets)


@pytest.mark.parametrize("make", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_allocate_takes_the_bytes_it_says(make, dtype):
    layout = make(shape=_shape(dtype))
    cache = layout.allocate()
    assert layout.shape.page_bytes == 2 * 8 * 2 * 12 * np.dtype(dtype).itemsize
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(cache)) == layout.shape.cache_bytes
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(cache))


@pytest.mark.parametrize("make", LAYOUTS)
def test_a_token_lands_at_its_page_and_offset(make):
    layout = make(shape=_shape())
    k = np.arange(24, dtype=np.float32).reshape(1, 2, 12)
    cache = layout.append(
        layout.allocate(), k, k + 100, np.array([2], np.int32), np.array([5], np.int32)
    )
    keys, values = _contents(layout, cache)
    np.testing.assert_array_equal(keys[2, :, 5], k[0])
    np.testing.assert_array_equal(values[2, :, 5], k[0] + 100)
    keys[2, :, 5] = values[2, :, 5] = 0
    assert not keys.any()
    assert not values.any()


@given(
    st.sampled_from(LAYOUTS),
    st.sampled_from(["float32", "bfloat16"]),
    st.lists(st.integers(0, 31), unique=True, max_size=20),
    st.data(),
)
def test_appended_tokens_are_found_and_padding_tokens_change_nothing(make, dtype, slots, data):
    layout = make(shape=_shape(dtype))
    s = layout.shape
    # Padding tokens stand among real ones, carry NaN and any offset.
    num_tokens = 24
    at = sorted(data.draw(st.permutations(range(num_tokens)))[: len(slots)])
    pages = np.full(num_tokens, s.num_pages, np.int32)
    offsets = np.asarray(data.draw(st.lists(st.integers(0, 7), min_size=24, max_size=24)), np.int32)
    k = np.full((num_tokens, 2, 12), np.nan, np.float32)
    v = k.copy()
    random = np.random.default_rng(len(slots))
    expected = np.zeros((2, s.num_pages, 2, 8, 12), np.float32)
    for token, slot in zip(at, slots, strict=True):
        pages[token], offsets[token] = divmod(slot, 8)
        k[token], v[token] = random.normal(size=(2, 2, 12)).astype(np.float32)
        expected[0, slot // 8, :, slot % 8] = k[token]
        expected[1, slot // 8, :, slot % 8] = v[token]
    cache = _append(layout, layout.allocate(), k, v, pages, offsets)
    rounded = expected.astype(s.dtype).astype(np.float32)
    keys, values = _contents(layout, cache)
    np.testing.assert_array_equal(keys, rounded[0])
    np.testing.assert_array_equal(values, rounded[1])


# Not the page-major layout in bfloat16: in place on GPUs, for which it is made, not on CPUs.
@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        (PageMajorLayout, "float32"),
        (TokenMinorLayout, "float32"),
        (TokenMinorLayout, "bfloat16"),
    ],
)
def test_append_writes_a_donated_cache_in_place(make, dtype):
    layout = make(shape=_shape(dtype, num_pages=64, page_size=64, head_dim=64))
    token = jax.ShapeDtypeStruct((4, 2, 64), jnp.float32)
    index = jax.ShapeDtypeStruct((4,), jnp.int32)
    program = jax.jit(layout.append, donate_argnums=0)
    compiled = program.lower(jax.eval_shape(layout.allocate), token, token, index, index).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == layout.shape.cache_bytes
    assert memory.temp_size_in_bytes < layout.shape.cache_bytes // 20


def test_an_append_for_a_gpu_is_one_kernel_in_place():
    layout = PageMajorLayout(
        shape=_shape("bfloat16", num_pages=512, page_size=64, num_kv_heads=8, head_dim=128)
    )
    token = jax.ShapeDtypeStruct((2048, 8, 128), jnp.bfloat16)
    index = jax.ShapeDtypeStruct((2048,), jnp.int32)
    program = deviceless.program(
        jax.jit(layout.append, donate_argnums=0),
        jax.eval_shape(layout.allocate),
        *(token, token, index, index),
    )
    assert len(program.launches) == 1
    assert program.memory.alias_bytes == layout.shape.cache_bytes
    assert program.memory.temp_bytes == 0


def test_a_read_keeps_its_keys_in_the_bytes_it_was_given():
    shape = _shape(page_size=64, head_dim=64)  # 32 KiB of keys in a page
    assert TokenMinorLayout(shape=shape).pages_at_once == 8
    assert TokenMinorLayout(shape=shape, gathered_bytes=100 << 10).pages_at_once == 3
    assert TokenMinorLayout(shape=shape, gathered_bytes=1).pages_at_once == 1
    assert PageMajorLayout(shape=shape).pages_at_once == shape.num_pages
