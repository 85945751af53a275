"""Prefill attention against its reference, and compiled at the sizes that are served."""

import deviceless
import jax
import jax.numpy as jnp
import kernel_runs
import numpy as np
import prefill_runs
import pytest

from nanoflow_jax import compat
from nanoflow_jax.kv_cache import attention, tiles
from nanoflow_jax.kv_cache.layout import CacheShape, PageMajorLayout
from pallas_kernels.prefill_attention import prefill_attention, prefill_attention_reference
from pallas_kernels.prefill_tiles import KeySplit, PrefillTiles, build_prefill_tiles

# The interpreter multiplies in numpy, which warns of the NaN in keys that nobody sees.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

# Weights rounded to bfloat16, and the output.
_RELATIVE = 4e-3


def _check(operands, **more):
    with kernel_runs.interpreting() as interpret:
        found = prefill_attention(**operands, **more, interpret=interpret)
    _compare(found, operands, relative=_RELATIVE, **more)


def _compare(found, operands, *, relative, **more):
    wanted = prefill_attention_reference(**operands)
    if more.get("aligned"):
        sources = operands["tiles"].sources
        found = jnp.where((sources < sources.max())[:, None, None], found, 0)
    kernel_runs.check_close(found, wanted, relative=relative)


@kernel_runs.needs_interpreter
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("more", "num_ctas"), prefill_runs.CASES)
def test_chunks_get_their_reference_on_any_number_of_ctas(more, num_ctas):
    _check(prefill_runs.operands(**more), num_ctas=num_ctas)


def _split(num_ctas, num_kv_heads=1, num_parts=4):
    return KeySplit(
        num_kv_heads=num_kv_heads,
        num_ctas=num_ctas,
        max_parts=num_parts,
        least_len=128,
        part_cost=0,
    )


_CUT = [
    # A tile that is cut and one that is not, in place; windows and pages before them, unused parts.
    (
        {
            "chunks": [(8, 14, 400, 0), (24, 5, 30, 1)],
            "num_tokens": 32,
            "heads": (4, 2),
            "window": 300,
            "softcap": 20.0,
            "page_size": 32,
            "aligned": True,
            "split": _split(6, num_kv_heads=2),
        },
        2,
    ),
    # Rows of a tile that are no tokens, two chunks cut, a step of 64 keys; chunks of other requests
    # in the same eight tokens.
    (
        {
            "chunks": [(3, 9, 250, 0), (12, 5, 290, 1)],
            "num_tokens": 21,
            "heads": (3, 1),
            "head_dim": 256,
            "split": _split(4),
        },
        2,
    ),
]


@kernel_runs.needs_interpreter
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("more", "num_ctas"), _CUT, ids=["in_place", "wide"])
def test_tiles_whose_keys_are_cut_get_their_reference_on_any_number_of_ctas(more, num_ctas):
    operands = prefill_runs.operands(**more)
    assert operands["tiles"].cuts[:, 1].max() > 1
    _check(operands, num_ctas=num_ctas, **{name: True for name in ("aligned",) if name in more})


@kernel_runs.needs_interpreter
@pytest.mark.timeout(120)
def test_a_token_has_the_same_bits_wherever_its_chunk_begins_and_lies():
    size = {"num_tokens": 72, "heads": (4, 2), "window": 263}
    # Tokens [383, 423) of a request: as one chunk; as two, at other places beside another request.
    # The oldest token that the second of them sees lies in another step of 128 keys.
    whole = prefill_runs.operands([(0, 40, 383, 0)], **size)
    parts = prefill_runs.operands([(3, 24, 383, 0), (27, 5, 9, 1), (48, 16, 407, 0)], **size)
    one = np.asarray(whole["q"])
    parts["q"] = parts["q"].at[3:27].set(one[:24]).at[48:64].set(one[24:40])
    parts["cache"], parts["page_table"] = _with_row(parts, whole)
    with kernel_runs.interpreting() as interpret:
        found = [prefill_attention(**o, num_ctas=2, interpret=interpret) for o in (whole, parts)]
    for one, operands in zip(found, (whole, parts), strict=True):
        _compare(one, operands, relative=_RELATIVE)
    together, apart = map(np.asarray, found)
    np.testing.assert_array_equal(np.concatenate([apart[3:27], apart[48:64]]), together[:40])


def _with_row(operands, other):
    """The cache with that of another appended, and row 0 of the table as there."""
    cache, table, first = operands["cache"], operands["page_table"], other["page_table"][0]
    row = jnp.pad(first + len(cache), (0, table.shape[1] - len(first)))
    return jnp.concatenate([cache, other["cache"]]), table.at[0].set(row)


@kernel_runs.needs_interpreter
@pytest.mark.timeout(120)
def test_ragged_chunks_may_share_pages():
    operands = prefill_runs.operands(page_size=128, head_dim=128, heads=(7, 1), softcap=3.0)
    table = operands["page_table"]
    operands["page_table"] = table.at[3, 0].set(table[0, 0])
    _check(operands, num_ctas=2, token=jnp.full((3,), jnp.nan))


@kernel_runs.needs_interpreter
@pytest.mark.timeout(120)
def test_a_step_without_chunks_gives_zeros():
    operands = prefill_runs.operands([(0, 0, 5, 0)], num_tokens=8, heads=(1, 1))
    with kernel_runs.interpreting() as interpret:
        found = prefill_attention(**operands, interpret=interpret)
    assert not found.any()


def test_the_reference_is_the_plain_path():
    operands = prefill_runs.operands(window=60, softcap=2.0, page_size=16)
    cache = operands["cache"]
    shape = CacheShape(
        num_pages=cache.shape[0], page_size=16, num_kv_heads=1, head_dim=64, dtype=cache.dtype
    )
    plain = attention.prefill_attention(
        PageMajorLayout(shape=shape),
        operands["q"],
        cache,
        operands["page_table"],
        tiles.PrefillTiles(
            *map(
                jnp.asarray,
                tiles.build_prefill_tiles(
                    [tiles.Chunk(*chunk) for chunk in prefill_runs.RAGGED], tile_len=8, capacity=10
                ),
            )
        ),
        tile_len=8,
        scale=operands["scale"],
        window=60,
        softcap=2.0,
    )
    kernel_runs.check_close(prefill_attention_reference(**operands), plain, relative=1e-3)


def _shapes(num_heads, num_kv_heads, head_dim, page_size, num_parts=0):
    ints = [
        (256, 512),
        *[(128,)] * 4,
        (1,),
        (2048,),
        (128, 3),
        (num_parts // 2, 2),
        (num_parts // 2,),
    ]
    return [
        jax.ShapeDtypeStruct((2048, num_heads, head_dim), jnp.bfloat16),
        jax.ShapeDtypeStruct((4096, 2, num_kv_heads, page_size, head_dim), jnp.bfloat16),
        *(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ints),
    ]


def _served(more):
    def run(q, cache, page_table, *fields):
        return prefill_attention(
            q, cache, page_table, PrefillTiles(*fields), scale=0.1, num_ctas=100, **more
        )

    return run


_NAMES = ["llama_8b", "llama_70b_of_8", "gemma_9b", "gpt_oss"]
_SERVED = [
    ((32, 8, 128, 64), {}),
    ((8, 1, 128, 16, 132), {"aligned": True}),
    ((16, 8, 256, 32, 34), {"window": 4096, "softcap": 50.0}),
    ((64, 8, 64, 128), {"window": 128}),
]


@pytest.mark.parametrize(("sizes", "more"), _SERVED, ids=_NAMES)
def test_served_sizes_lower_for_hopper(sizes, more):
    assert "mosaic_gpu_v2" in kernel_runs.lowered(_served(more), *_shapes(*sizes))


@pytest.mark.parametrize(("sizes", "more"), deviceless.cases(_SERVED), ids=_NAMES)
def test_served_sizes_compile_without_spills_into_warpgroup_products(sizes, more):
    kernels = deviceless.compiled(_served(more), *_shapes(*sizes))
    assert all(kernel.grid == (100, 1, 1) for kernel in kernels)
    # With heads of 256, a window and a soft-cap jax 0.11 puts 12 values of a thread away.
    most_spilled = 48 if compat.CAN_INTERPRET_MOSAIC and more.get("softcap") else 0
    assert max(kernel.spill_bytes for kernel in kernels) <= most_spilled
    # Where the plan has room for parts, a second one merges them.
    assert len(kernels) == len(sizes) - 3
    (kernel,) = [kernel for kernel in kernels if "wgmma.mma_async" in kernel.ptx]
    assert kernel.registers == 168
    assert kernel.shared_bytes <= 232448
    assert "cp.async.bulk.tensor" in kernel.ptx


_NO_TILES = build_prefill_tiles([], group=2, capacity=2, num_tokens=8)
_GOOD = {
    "q": jnp.zeros((8, 4, 64), jnp.bfloat16),
    "cache": jnp.zeros((3, 2, 2, 16, 64), jnp.bfloat16),
    "page_table": jnp.zeros((1, 3), jnp.int32),
    "tiles": _NO_TILES,
    "scale": 1.0,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"q": jnp.zeros((8, 4, 128), jnp.bfloat16)},
            r"q\(8, 4, 128\) and cache\(3, 2, 2, 16, 64\)",
        ),
        ({"cache": jnp.zeros((3, 1, 2, 16, 64))}, r"not \[T, N, H\] and \[P, 2, K, S, H\]"),
        ({"q": jnp.zeros((0, 4, 64), jnp.bfloat16)}, "must not be empty"),
        ({"q": jnp.zeros((8, 4, 64))}, "q is float32 and the cache bfloat16; both must be"),
        ({"q": jnp.zeros((8, 3, 64), jnp.bfloat16)}, "3 query heads are no multiple of 2 KV heads"),
        (
            {
                "q": jnp.zeros((8, 4, 80), jnp.bfloat16),
                "cache": jnp.zeros((3, 2, 2, 16, 80), jnp.bfloat16),
            },
            r"head width 80 is none of \(64, 128, 256\)",
        ),
        ({"cache": jnp.zeros((3, 2, 2, 8, 64), jnp.bfloat16)}, r"page size 8 is none of \(16, 32"),
        ({"page_table": jnp.zeros((3,), jnp.int32)}, r"page_table is int32\(3,\), not int32"),
        (
            {"tiles": build_prefill_tiles([], group=2, capacity=2, num_tokens=9)},
            r"not \[C\] x 4, \[1\], \[T\] = \(8,\), \[C, 3\], \[B // 2, 2\] and",
        ),
        (
            {"tiles": PrefillTiles(*(jnp.zeros(field.shape) for field in _NO_TILES))},
            "tiles are .*'float32'.*, not int32",
        ),
        ({"q": jnp.zeros((8, 34, 64), jnp.bfloat16)}, "17 query heads for each KV head are not in"),
        ({"window": 0}, "window=0 is not at least 1"),
        ({"scale": None}, "scale=None is a NoneType, not a finite number"),
        ({"page_table": jnp.zeros((1, 0), jnp.int32)}, r"page_table\(1, 0\) must not be empty"),
        ({"tiles": _NO_TILES._replace(rows=None)}, "tiles.rows is a NoneType, not an array"),
        ({"softcap": -1.0}, "softcap=-1.0 is not above 0"),
        ({"num_ctas": 0}, "num_ctas=0 is not at least 1"),
    ],
)
def test_operands_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        prefill_attention(**{**_GOOD, **change})


@pytest.mark.gpu
def test_chunks_on_a_gpu_get_their_reference():
    for more, _ in prefill_runs.CASES + _CUT:
        for num_ctas in (1, 3, 132):
            operands = prefill_runs.operands(**more)
            found = prefill_attention(**operands, num_ctas=num_ctas)
            _compare(found, operands, relative=1e-2)
