"""Kernels in one grid against the references of each, for several splits of one executable."""

import deviceless
import jax
import jax.numpy as jnp
import kernel_runs
import numpy as np
import pytest

from pallas_kernels import mosaic
from pallas_kernels.decode_attention import decode_attention_reference, prepare_decode
from pallas_kernels.gemm import gemm_reference, prepare_gemm
from pallas_kernels.gemm_role import GemmTile
from pallas_kernels.prefill_attention import prefill_attention_reference, prepare_prefill
from pallas_kernels.prefill_tiles import PrefillTiles, build_prefill_tiles
from pallas_kernels.side_by_side import side_by_side
from pallas_kernels.work_list import WorkList, plan_decode

_LENS = (65, 0, 150)
_SCALE = 0.2


def _gemm_operands():
    """x, w and residual."""
    return tuple(
        kernel_runs.normal(seed, *shape)
        for seed, shape in enumerate([(200, 128), (136, 128), (200, 136)])
    )


def _decode_operands():
    """q, cache, page table, lengths: 2 query heads on one kv head."""
    rng = np.random.default_rng(3)
    table = jnp.asarray(rng.permutation(8)[:6].reshape(3, 2), jnp.int32)
    return (
        kernel_runs.normal(3, 3, 2, 32),
        kernel_runs.normal(4, 8, 2, 1, 64, 32),
        jnp.concatenate([table, table[::-1, :1]], axis=1),
        jnp.asarray(_LENS, jnp.int32),
    )


def _prefill_operands():
    """q, cache, page table, tiles: a chunk of 40 tokens behind 90, and one of 9."""
    tiles = build_prefill_tiles([(0, 40, 90, 1), (40, 9, 0, 0)], group=4, capacity=4, num_tokens=56)
    return (
        kernel_runs.normal(5, 56, 4, 64),
        kernel_runs.normal(6, 6, 2, 1, 64, 64),
        jnp.asarray([[4, 5, 5], [2, 0, 3]], jnp.int32),
        PrefillTiles(*map(jnp.asarray, tiles)),
    )


def _prepared(name, operands, work, *, interpret):
    if name == "gemm":
        x, w, residual = operands
        return prepare_gemm(x, w, residual=residual)
    if name == "decode":
        return prepare_decode(*operands, work, scale=_SCALE, interpret=interpret)
    return prepare_prefill(*operands, scale=_SCALE, interpret=interpret)


def _reference(name, operands):
    if name == "gemm":
        x, w, residual = operands
        return gemm_reference(x, w, residual=residual)
    if name == "decode":
        return decode_attention_reference(*operands, scale=_SCALE)
    return prefill_attention_reference(*operands, scale=_SCALE)


_MAKERS = {"gemm": _gemm_operands, "decode": _decode_operands, "prefill": _prefill_operands}


def _check_splits(names, num_ctas, splits, interpret):
    """Runs one executable for all splits; decode comes last and has the rest."""
    operands = [_MAKERS[name]() for name in names]

    def run(operands, work, shares):
        kernels = [
            _prepared(name, one, work, interpret=interpret)
            for name, one in zip(names, operands, strict=True)
        ]
        return side_by_side(kernels, shares, num_ctas=num_ctas, interpret=interpret)

    # For fewer CTAs than it gets of some splits, and more than of others.
    work = plan_decode(_LENS, num_kv_heads=1, num_ctas=2)

    given = [(work, jnp.asarray(shares, jnp.int32)) for shares in splits]
    executable = jax.jit(run).lower(operands, *given[0]).compile()
    found = jax.block_until_ready([executable(operands, *one) for one in given])
    for i, name in enumerate(names):
        wanted = _reference(name, operands[i])
        relative = 2e-3 if name == "gemm" else 5e-3 if interpret is not None else 1e-2
        for results in found:
            kernel_runs.check_close(results[i], wanted, relative=relative)


# What runs beside what, and splits of six CTAs; the product has four tiles.
_COMPANY = {
    "decode_beside_gemm": (("gemm", "decode"), [(1,), (3,), (5,)]),
    "pod": (("prefill", "decode"), [(1,), (5,)]),
    "prefill_beside_gemm": (("prefill", "gemm"), [(1,), (4,)]),
    "all_three": (("gemm", "prefill", "decode"), [(1, 1), (2, 3)]),
}


@kernel_runs.needs_interpreter
@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", ["decode_beside_gemm", "all_three"])
def test_one_executable_gives_the_results_of_all_kernels_for_every_split(name):
    names, splits = _COMPANY[name]
    with kernel_runs.interpreting() as interpret:
        _check_splits(names, 6, splits, interpret)


@pytest.mark.gpu
@pytest.mark.parametrize("name", _COMPANY)
def test_one_executable_gives_all_results_on_a_gpu(name):
    names, _ = _COMPANY[name]
    splits = [(1,), (40,), (131,)] if len(names) == 2 else [(1, 1), (40, 30), (100, 31)]
    _check_splits(names, 132, splits, None)


def _shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


def _ints(*sizes):
    return _shape(*sizes, dtype=jnp.int32)


# Llama 8b: 512 rows of products, a chunk of 512 tokens, 256 requests of up to 8 k tokens.
_CACHE = _shape(4096, 2, 8, 64, 128)
_SERVED_SHAPES = {
    "kqv": (_shape(512, 4096), _shape(6144, 4096)),
    "gated": (_shape(512, 4096), _shape(14336, 4096), _shape(14336, 4096)),
    "decode": (
        _shape(256, 32, 128),
        _CACHE,
        _ints(256, 128),
        _ints(256),
        *(_ints(*field.shape) for field in plan_decode([1] * 256, num_kv_heads=8, num_ctas=132)),
    ),
    "prefill": (
        _shape(512, 32, 128),
        _CACHE,
        _ints(256, 128),
        *(
            _ints(*field.shape)
            for field in build_prefill_tiles([], group=4, capacity=32, num_tokens=512)
        ),
    ),
}


def _served_kernel(name, arrays):
    if name == "kqv":
        return prepare_gemm(*arrays, tile=GemmTile(columns=256))
    if name == "gated":
        x, w, w_up = arrays
        return prepare_gemm(x, w, w_up=w_up)
    if name == "decode":
        return prepare_decode(*arrays[:4], WorkList(*arrays[4:]), scale=0.1)
    return prepare_prefill(*arrays[:3], PrefillTiles(*arrays[3:]), scale=0.1)


def _fused(names):
    """A function of the operands of all, and of the shares; and their shapes."""
    shapes = [_SERVED_SHAPES[name] for name in names]

    def run(*arrays):
        kernels, left = [], list(arrays)
        for name, own in zip(names, shapes, strict=True):
            kernels.append(_served_kernel(name, left[: len(own)]))
            del left[: len(own)]
        return side_by_side(kernels, *left)

    return run, *(shape for own in shapes for shape in own), _ints(len(names) - 1)


_SERVED = [("kqv", "decode"), ("gated", "decode"), ("gated", "prefill", "decode")]


@pytest.mark.parametrize("names", _SERVED, ids="-".join)
def test_kernels_of_llama_8b_lower_for_hopper_in_one(names):
    # Decode attention has a second one, which merges parts.
    num_kernels = 1 + ("decode" in names)
    assert kernel_runs.lowered(*_fused(names)).count("mosaic_gpu_v2") == num_kernels


@pytest.mark.timeout(120)
@pytest.mark.parametrize("names", deviceless.cases([(names,) for names in _SERVED]), ids="-".join)
def test_kernels_in_one_spill_nothing_to_speak_of_and_leave_no_room_for_a_second_cta(names):
    kernel, *_ = deviceless.compiled(*_fused(names))
    # Of three, ptxas puts some values away: see the module of the kernel.
    _check_one_cta_per_sm(kernel, most_spilled=44 if len(names) == 3 else 0)


def _check_one_cta_per_sm(kernel, *, most_spilled=0):
    assert kernel.grid == (132, 1, 1)
    assert kernel.spill_bytes <= most_spilled
    # More than half of what an SM has of either, for 384 threads.
    assert kernel.registers == 168
    assert mosaic.SHARED_BYTES // 2 < kernel.shared_bytes <= mosaic.SHARED_BYTES


@pytest.mark.timeout(120)
@deviceless.slow_on_other_jax
def test_prefill_beside_decode_adds_barriers_alone_to_the_shared_memory_of_decode():
    def decode(*arrays):
        kernel = _served_kernel("decode", arrays)
        return mosaic.run(kernel, num_ctas=132, token=None, interpret=None)

    both, _ = deviceless.compiled(*_fused(("prefill", "decode")))
    _check_one_cta_per_sm(both)
    alone, _ = deviceless.compiled(decode, *_SERVED_SHAPES["decode"])
    assert alone.shared_bytes <= both.shared_bytes < alone.shared_bytes + 1024


@pytest.mark.parametrize(
    ("num_kernels", "shares", "num_ctas", "message"),
    [
        (2, (1,), 1, "num_ctas=1 is not at least 2, one for each kernel"),
        (2, (0,), 4, r"shares \[0\] of num_ctas=4 are no whole numbers, or leave a kernel with"),
        (3, (2, 2), 4, r"shares \[2, 2\] of num_ctas=4 are no whole numbers, or leave"),
        (2, np.asarray([4]), 4, r"shares \[4\] of num_ctas=4 are no whole numbers, or leave"),
        (2, [1.5], 4, r"shares \[1\.5\] of num_ctas=4 are no whole numbers, or leave"),
        (2, (1, 1), 4, "2 shares for 2 kernels: give at least two kernels, and a share of each"),
        (2, jnp.zeros(2, jnp.int32), 4, "2 shares for 2 kernels"),
        (1, (), 4, "0 shares for 1 kernels"),
    ],
)
def test_splits_that_leave_a_kernel_without_ctas_are_refused(
    num_kernels, shares, num_ctas, message
):
    x, w, _ = _gemm_operands()
    with pytest.raises(ValueError, match=message):
        side_by_side([prepare_gemm(x, w)] * num_kernels, shares, num_ctas=num_ctas)
