"""Decode attention of GPUs before Hopper against its reference, and compiled for three of them."""

import functools

import decode_runs
import deviceless
import jax
import jax.numpy as jnp
import kernel_runs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoflow_jax import compat
from pallas_kernels.decode_attention import decode_attention_reference
from pallas_kernels.decode_attention_triton import decode_attention_triton
from pallas_kernels.triton_pages import Tile
from pallas_kernels.work_list import WorkList, plan_decode

pytestmark = pytest.mark.skipif(
    not compat.HAS_PALLAS_TRITON, reason=f"jax {jax.__version__} has no Triton backend of Pallas"
)
_LEAST_SHARED_BYTES = 101_376  # that a CTA may have on Ada
# Rounding of weights and of the output to the cache's dtype.
_RELATIVE = {"bfloat16": 5e-3, "float16": 1e-3, "float32": 2e-6}


@functools.cache
def _interpreted(options, **more):
    """One program for each kind of batch."""
    return jax.jit(
        lambda *operands: (
            decode_attention_triton(*operands, **dict(options), **more, interpret=True),
            decode_attention_reference(*operands[:4], **dict(options)),
        )
    )


def _check(case, *, max_ctas=None, **more):
    run = _interpreted(tuple(case.all_options.items()), **more)
    found, wanted = run(*case.operands(), case.plan(max_ctas=max_ctas))
    kernel_runs.check_close(found, wanted, relative=_RELATIVE[case.dtype])
    assert not np.asarray(found)[np.asarray(case.lens) == 0].any()


@pytest.mark.parametrize("name", decode_runs.CASES)
def test_decode_attention_is_its_reference(name):
    _check(decode_runs.CASES[name])


_KINDS = (
    {"S": 16, "H": 64, "dtype": "float32"},
    {"N": 14, "K": 2, "S": 32, "H": 80, "options": {"window": 37}},
    {"N": 17, "S": 128, "H": 128, "dtype": "float16", "options": {"softcap": 2.0}},
    {"N": 4, "K": 2, "S": 64, "H": 256, "options": {"window": 130, "softcap": 30.0}},
    {"N": 33, "S": 48, "H": 100, "dtype": "float32"},
)


@given(
    kind=st.sampled_from(_KINDS),
    lens=st.lists(st.integers(0, 290), min_size=4, max_size=4),
    num_ctas=st.integers(1, 4),
)
def test_any_lengths_on_any_number_of_ctas_give_the_reference(kind, lens, num_ctas):
    _check(decode_runs.Case(lens=tuple(lens), num_ctas=num_ctas, room=290, **kind), max_ctas=4)


def test_steps_shorter_than_the_tiles_of_the_plan_change_nothing():
    case = decode_runs.Case(lens=(0, 15, 16, 130), S=32, H=64, options={"window": 40})
    _check(case, tile=Tile(step_len=16, num_warps=2, num_stages=3))


def test_a_request_with_nan_fails_alone_and_a_token_is_not_read():
    case = decode_runs.Case(lens=(64, 300, 70), num_ctas=2)
    q, cache, table, lens = case.operands()
    broken = cache.at[table[1, 2], 1, 0, 5].set(jnp.nan)
    run = jax.jit(
        functools.partial(
            decode_attention_triton,
            **case.all_options,
            token=jnp.full((3,), jnp.nan),
            interpret=True,
        )
    )
    found = run(q, broken, table, lens, case.plan())
    wanted = decode_attention_reference(q, cache, table, lens, **case.all_options)
    assert np.isnan(np.asarray(found[1], np.float32)).all()
    kernel_runs.check_close(found[::2], wanted[::2], relative=_RELATIVE["bfloat16"])


def _run(q, cache, page_table, context_lens, *work, **options):
    return decode_attention_triton(
        q, cache, page_table, context_lens, WorkList(*work), scale=0.1, **options
    )


_SERVED = {
    "llama 8b": {},
    "llama 70b, a share of 8": {"N": 8, "K": 1},
    "16 query heads, pages of 16": {"N": 128, "S": 16},
    "pages of 32, heads of 64": {"S": 32, "H": 64},
    "pages of 128, heads of 96": {"S": 128, "H": 96},
    "heads of 80": {"N": 8, "H": 80},
    "heads of 256": {"H": 256, "num_ctas": 108},
    "float16": {"dtype": jnp.float16},
    "float32": {"dtype": jnp.float32},
    "float32, heads of 256": {"H": 256, "dtype": jnp.float32},
}


@pytest.mark.parametrize("name", _SERVED)
def test_decode_attention_lowers_for_triton(name):
    text = kernel_runs.lowered(
        lambda *x: _run(*x, window=4096, softcap=30.0), *decode_runs.shapes(**_SERVED[name])
    )
    assert "triton" in text


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("llama 8b", "A100"),
        ("16 query heads, pages of 16", "L4"),
        ("heads of 256", "L4"),
        ("heads of 256", "A100"),
        ("16 query heads, pages of 16", "H200"),
    ],
)
def test_decode_attention_compiles_without_spills_to_speak_of(name, device):
    program = deviceless.program(_run, *decode_runs.shapes(**_SERVED[name]), device=device)
    kernel = program.kernel("decode_attention_kernel")
    assert kernel.grid == (_SERVED[name].get("num_ctas", 48), 1, 1)
    # A Hopper GPU, which has a kernel of its own, is a second opinion.
    assert kernel.spill_bytes <= (16 if device == "H200" else 0)
    assert kernel.registers <= 168
    # Two steps of keys and values lie in shared memory: pages come ahead of their use.
    assert 2 * (32 << 10) < kernel.shared_bytes <= _LEAST_SHARED_BYTES
    assert "cp.async.cg.shared.global" in kernel.ptx
    assert "mma.sync" in kernel.ptx


_GOOD = {
    "q": jnp.zeros((3, 4, 32)),
    "cache": jnp.zeros((5, 2, 2, 16, 32)),
    "page_table": jnp.zeros((3, 2), jnp.int32),
    "context_lens": jnp.zeros((3,), jnp.int32),
    "work": plan_decode([1, 2, 3], num_kv_heads=2, num_ctas=1),
    "scale": 1.0,
    "interpret": True,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"q": jnp.zeros((3, 4, 32), jnp.int32)},
            "q is int32 and cache float32; both must be bfloat16 or float16 or float32",
        ),
        ({"q": jnp.zeros((3, 130, 32))}, "N=130 query heads are not 1 to 64 for each of K=2"),
        (
            {"q": jnp.zeros((3, 4, 257)), "cache": jnp.zeros((5, 2, 2, 16, 257))},
            "head_dim=257 is above 256",
        ),
        ({"window": 0}, "window=0 is not at least 1"),
        ({"softcap": 0.0}, "softcap=0.0 is not above 0"),
    ],
)
def test_operands_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        decode_attention_triton(**{**_GOOD, **change})


@pytest.mark.parametrize("step_len", [8, 48, 128])
def test_steps_of_another_length_are_refused(step_len):
    with pytest.raises(ValueError, match=f"step_len={step_len} is none of 16, 32 and 64"):
        Tile(step_len=step_len, num_warps=4, num_stages=5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", decode_runs.CASES)
def test_decode_attention_on_a_gpu_is_its_reference(name):
    case = decode_runs.CASES[name]
    operands = case.operands()
    found = decode_attention_triton(*operands, case.plan(max_ctas=132), **case.all_options)
    wanted = decode_attention_reference(*operands, **case.all_options)
    kernel_runs.check_close(found, wanted, relative=1e-2)
