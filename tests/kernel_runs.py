"""Runs Mosaic kernels on a CPU, lowers them for a GPU that is not there, and compares."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanoflow_jax import compat

needs_interpreter = pytest.mark.skipif(
    not compat.CAN_INTERPRET_MOSAIC,
    reason=f"jax {jax.__version__} cannot interpret these kernels; jax 0.11, on Python 3.12, can",
)


def interpreted(**options: Any) -> Any:
    """Parameters under which races are found and what was never written reads as NaN."""
    return compat.interpret_gpu_params(
        detect_races=True, out_of_bounds_reads="uninitialized", **options
    )


@contextlib.contextmanager
def interpreting() -> Iterator[Any]:
    """Parameters to run kernels with; afterwards fails if one had a race."""
    try:
        yield interpreted()
        assert not compat.races_found()
    finally:
        compat.reset_interpreter()


def normal(seed: int, *shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    """Standard normal numbers."""
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), dtype)


def check_close(found: jax.Array, wanted: jax.Array, *, relative: float) -> None:
    """Raises unless dtypes are the same and values near, in the 2-norm of all."""
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    one, other = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert np.isfinite(one).all()
    assert np.linalg.norm(one - other) <= relative * max(np.linalg.norm(other), 1e-30)


def lowered(function: Callable[..., Any], *shapes: jax.ShapeDtypeStruct) -> str:
    """The program of a function for an H200, as text; the machine needs none."""
    with compat.abstract_gpu("NVIDIA H200", 132):
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
