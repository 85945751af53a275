"""Kernels that any jax can run in no time, for tests of what times them."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from nanoflow_jax.bench import kernel_bench, kernel_tasks
from nanoflow_jax.bench.kernel_ways import Setting, Task, Variant, Way
from nanoflow_jax.engine import kernel_choice
from pallas_kernels import problem_shapes


def task(shape: Any, *variants: Variant, **missing: str) -> Task:
    """Doubles a vector."""
    return Task(
        shape=shape,
        draw=lambda seed: jnp.arange(4.0) + seed,
        reference=lambda x: (x + x,),
        relative_error=1e-3,
        variants=variants,
        missing=missing,
    )


def variant(function: Callable[..., Any], name: str = "pallas", **fields: Any) -> Variant:
    """A way that gives what the function does."""
    how = {key: fields.pop(key) for key in ("view", "compiled", "slack") if key in fields}
    return Variant(way=Way(name=name, function=lambda *x: (function(*x),), **how), **fields)


def double(x: Any, *more: Any) -> Any:
    return 2 * x


def build(shape: Any, setting: Setting) -> Task:
    """Stands for kernel_tasks.build."""
    one = variant(double).way
    return task(
        shape,
        Variant(way=one, num_ctas=1),
        Variant(way=one, num_ctas=2),
        variant(double, "xla"),
        torch="is not installed",
    )


def replace(patch: Callable[[Any, str, Any], None]) -> None:
    """Puts these in the place of Pallas' kernels, by setattr or a monkeypatch's."""
    patch(kernel_tasks, "build", build)
    patch(kernel_choice, "check_interpreter", lambda machine: None)


def options(root: pathlib.Path, **changes: Any) -> kernel_bench.Options:
    """To time the tiny problems."""
    fields = {"budget_s": 1000.0, "root": root, "command": ("bench", "kernels")}
    return kernel_bench.Options(**{**fields, **changes})


NAMES = [problem.name for problem in problem_shapes.tiny_problems()]
