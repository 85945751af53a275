"""Compiles programs for a GPU that is not there, once for all tests that look at them."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import pytest

from nanoflow_jax.deviceless import compiler
from nanoflow_jax.deviceless.program import Kernel, Program


def skip_without_compiler() -> None:
    """Skips the test where wheels are missing."""
    if reason := compiler.what_is_missing():
        pytest.skip(f"{reason}: install the deviceless extra")


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
