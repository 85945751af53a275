"""The check of kernels: what it calls good, what it finds, and that it runs without a GPU."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import kernel_runs
import numpy as np
import pytest

from nanoflow_jax import compat
from nanoflow_jax.bench import draw, gpu_check, kernel_cases


@pytest.fixture(autouse=True)
def _little_poison(monkeypatch):
    monkeypatch.setattr(gpu_check, "_POISON_BYTES", 1 << 10)


def _double(x, *, num_ctas, interpret):
    return (x * 2,)


_CASE = kernel_cases.Case(
    name="double",
    operands=(jnp.arange(1.0, 5.0),),
    kernel=_double,
    reference=lambda x: (x + x,),
    relative_error=1e-3,
    num_ctas=(1, 3),
)


def _outcomes(**changes):
    case = dataclasses.replace(_CASE, **changes)
    return list(gpu_check._check_case(case, interpret=None, repeats=3))


def test_a_kernel_that_is_its_reference_is_good_on_each_number_of_ctas():
    found = _outcomes()
    assert [(one.ok, one.check, one.detail) for one in found] == [
        (True, "1 CTAs", "error 0.0e+00 of 1e-03"),
        (True, "3 CTAs", "error 0.0e+00 of 1e-03"),
    ]


@pytest.mark.parametrize("fault", [0.1, jnp.nan])
def test_a_wrong_result_is_found(fault):
    def kernel(x, *, num_ctas, interpret):
        return (x * 2 + (fault if num_ctas == 3 else 0.0),)

    assert [one.ok for one in _outcomes(kernel=kernel)] == [True, False]


def test_results_that_change_between_runs_are_found():
    calls = iter(range(100))

    def kernel(x, *, num_ctas, interpret):
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        return (x * 2 + 1e-6 * jax.pure_callback(lambda: np.float32(next(calls)), shape),)

    first, _ = _outcomes(kernel=kernel)
    assert not first.ok
    assert first.detail.endswith("; 2 of 2 repeats gave other bits")


def test_a_kernel_that_the_device_fails_is_an_outcome():
    def kernel(x, *, num_ctas, interpret):
        def fail():
            raise RuntimeError("no such tile")

        return (jax.pure_callback(fail, jax.ShapeDtypeStruct(x.shape, x.dtype)),)

    found = _outcomes(kernel=kernel)
    assert [one.ok for one in found] == [False, False]
    assert found[0].detail.startswith("failed: ")


@pytest.mark.parametrize("fault", [ValueError("no such layout\nat 3"), NotImplementedError()])
def test_a_kernel_that_cannot_be_lowered_is_an_outcome_and_the_next_one_is_checked(fault):
    def kernel(x, *, num_ctas, interpret):
        if num_ctas == 1:
            raise fault
        return (x * 2,)

    wrong, right = _outcomes(kernel=kernel)
    assert (wrong.ok, right.ok) == (False, True)
    assert wrong.detail in ("failed: no such layout", "failed: NotImplementedError")


def test_the_same_seed_draws_the_same_operands_and_another_one_does_not():
    drawn = [
        [
            np.asarray(x, np.float32)
            for case in kernel_cases.cases(kernel_cases.TINY, seed)
            for x in case.operands
        ]
        for seed in (1, 1, 2)
    ]
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(*drawn[:2], strict=True))
    assert not np.array_equal(drawn[0][0], drawn[2][0])


def test_pages_hold_nothing_where_no_request_has_written():
    cache, table = draw.Draw(0).pages([0, 5, 16], heads=1, head_dim=8, page_size=8)
    written = ~np.isnan(np.asarray(cache, np.float32)).any(axis=(1, 2, 4))  # [P, S]
    assert written.sum() == 21
    assert written[np.asarray(table)[2]].all()
    assert written[np.asarray(table)[1, 0]].tolist() == [True] * 5 + [False] * 3


def _without_mosaic(monkeypatch):
    monkeypatch.setattr(compat, "CAN_INTERPRET_MOSAIC", False)
    return (
        f"jax {jax.__version__} cannot interpret the kernels; use jax 0.11 or newer, on Python 3.12"
    )


def test_where_one_makers_kernels_cannot_run_they_are_named_and_the_others_checked(monkeypatch):
    reason = _without_mosaic(monkeypatch)
    *found, graphs = gpu_check.run(seed=4, repeats=2)
    is_triton = [one.name.endswith(", Triton") for one in found]
    assert [one.ok for one in found] == [True if here else None for here in is_triton]
    assert sum(is_triton) == 8  # decode on two page sizes, prefill on two sizes, on two CTA counts
    assert {one.detail for one, here in zip(found, is_triton, strict=True) if not here} == {reason}
    assert (graphs.ok, graphs.detail) == (None, "needs a GPU")


def test_where_no_kernel_can_run_the_reasons_are_told(monkeypatch):
    reason = _without_mosaic(monkeypatch)
    monkeypatch.setattr(compat, "plt", None)
    message = (
        f"Mosaic kernels: {reason}; Triton kernels: jax {jax.__version__} has no Triton backend of "
        "Pallas; 0.12.0.1 still has it"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        next(gpu_check.run(seed=0, repeats=1))


@kernel_runs.needs_interpreter
@pytest.mark.timeout(200)
def test_kernels_are_interpreted_where_there_is_no_gpu(monkeypatch):
    few = kernel_cases.cases(kernel_cases.TINY, 5)[2:3]
    monkeypatch.setattr(kernel_cases, "cases", lambda sizes, seed: few)
    *found, graphs = gpu_check.run(seed=5, repeats=1)
    assert [one.ok for one in found] == [True, True]
    assert (graphs.ok, graphs.detail) == (None, "needs a GPU")


@kernel_runs.needs_interpreter
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_all_kernels_pass_where_there_is_no_gpu():
    *found, _ = gpu_check.run(seed=6, repeats=1)
    assert len(found) > 25
    assert all(one.ok for one in found), found


@pytest.mark.gpu
def test_all_kernels_pass_on_a_gpu():
    found = list(gpu_check.run(seed=7, repeats=3))
    assert all(one.ok for one in found), found
