"""Compiles programs for a GPU that is not there, once for all tests that look at them."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import pytest

from nanoflow_jax import compat
from nanoflow_jax.deviceless import compiler
from nanoflow_jax.deviceless.program import Kernel, Program

# A jax that GPU machines do not have shows with few programs that it compiles them as well.
_SLOW_ON_OTHER_JAX = () if compat.CAN_INTERPRET_MOSAIC else (pytest.mark.slow,)


def slow_on_other_jax(test: Callable[..., None]) -> Callable[..., None]:
    """Makes a test slow on a jax that GPU machines do not have."""
    for mark in _SLOW_ON_OTHER_JAX:
        test = mark(test)
    return test


def skip_without_compiler() -> None:
    """Skips the test where wheels are missing."""
    if reason := compiler.what_is_missing():
        pytest.skip(f"{reason}: install the deviceless extra")


def cases(values: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Arguments of a test that compiles a kernel for seconds: all but one slow on another jax."""
    first, *others = (pytest.param(*value) for value in values)
    return [first, *(pytest.param(*one.values, marks=_SLOW_ON_OTHER_JAX) for one in others)]


def cache_folder() -> pathlib.Path | None:
    """Where compiled programs are kept; None, which keeps nothing, where jax keeps none either."""
    kept = jax.config.jax_compilation_cache_dir
    return None if not kept else pathlib.Path(kept) / "deviceless"


def program(function: Callable[..., Any], *arguments: Any, **more: Any) -> Program:
    """A function compiled for an H200; skips the test where there is no compiler.

    Args:
        function: Jitted, if arguments are donated.
        arguments: Shapes and dtypes.
        more: Of `compiler.compile_program`.
    """
    skip_without_compiler()
    jitted = function if isinstance(function, jax.stages.Wrapped) else jax.jit(function)
    return compiler.compile_program(jitted, *arguments, cache=cache_folder(), **more)


def compiled(function: Callable[..., Any], *shapes: jax.ShapeDtypeStruct) -> tuple[Kernel, ...]:
    """Mosaic kernels of a function for an H200; skips the test where there is no compiler."""
    return program(function, *shapes).mosaic_kernels
