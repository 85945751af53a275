"""Times one problem: each way is compared with the reference, then all are timed in rounds."""

import dataclasses
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nanoflow_jax import compat
from nanoflow_jax.bench import clock as clock_lib
from nanoflow_jax.bench.kernel_ways import Task, Variant
from nanoflow_jax.results import kernels

# Operands of one call are not found in the L2 by the next: 50 to 60 MB on Hopper, 96 at most.
_ROTATED_BYTES = 512 << 20
_MOST_SETS, _INTERPRETED_SETS = 8, 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is measured.

    Attributes:
        rounds: Over all modes of a problem, to and fro.
        sample_s: About how long a sample takes.
        interpreted: Whether each call takes so long that one is a sample.
    """

    rounds: int = 6
    sample_s: float = 0.01
    interpreted: bool = False


class _UnfitError(Exception):
    """Why a variant is not timed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Ready:
    """A variant whose numbers are right."""

    variant: Variant
    mode: str
    call: Callable[[int], Any]
    calls: int
    method: str
    error: float


def modes(task: Task) -> list[str]:
    """Names of all that will be timed."""
    return [kernels.mode(**variant.labels) for variant in task.variants]


def measure(
    task: Task,
    case: str,
    *,
    clock: clock_lib.Clock,
    effort: Effort,
    done: Collection[tuple[str, int]] = (),
    is_late: Callable[[], bool] = lambda: False,
) -> Iterator[dict[str, Any]]:
    """Samples of one problem, in the order of time.

    Args:
        task: What to time.
        case: Its name.
        clock: To measure with.
        effort: How much.
        done: Modes and rounds that were measured before.
        is_late: Whether to leave out the rounds that are left, once there is one.

    Raises:
        jax.errors.JaxRuntimeError: Operands or the reference have no room, or the device failed.
        RuntimeError: CUPTI could not be had any more.
    """
    for way, why in task.missing.items():
        if (way, 0) not in done:
            labels = {"way": way, "num_ctas": None, "split": None}
            yield {"case": case, "mode": way, **labels, "fault": why, "is_missing": True}
    sets = _operand_sets(task, effort)
    wanted = jax.block_until_ready(jax.jit(task.reference)(sets[0]))
    ready: list[_Ready] = []
    programs = _Programs(sets[0])
    for variant in task.variants:
        mode = kernels.mode(**variant.labels)
        if all((mode, number) in done for number in range(effort.rounds)):
            continue
        try:
            found = _prepare(variant, mode, task=task, wanted=wanted, programs=programs, sets=sets)
            ready.append(_with_calls(found, clock=clock, effort=effort))
        except _UnfitError as fault:
            if (mode, 0) not in done:
                yield {"case": case, "mode": mode, **variant.labels, "fault": str(fault)}
    for number in range(effort.rounds):
        if number and is_late():
            return
        for one in clock_lib.abba(ready, number):
            if (one.mode, number) not in done:
                sample = {"case": case, "mode": one.mode, **one.variant.labels, "round": number}
                yield sample | _timed(one, clock)


def _timed(ready: _Ready, clock: clock_lib.Clock) -> dict[str, Any]:
    seconds = clock.seconds(ready.call, calls=ready.calls, method=ready.method)
    return {
        "calls": ready.calls,
        "seconds": seconds,
        "method": ready.method,
        "error": ready.error,
    }


class _Programs:
    """Executables by way, compiled when first asked for."""

    def __init__(self, operands: Any) -> None:
        self._operands = operands
        self._found: dict[int, Any] = {}

    def of(self, variant: Variant) -> Any:
        key = id(variant.way)
        if key not in self._found:
            self._found[key] = variant.way.program(self._operands, *variant.more)
        return self._found[key]


def _operand_sets(task: Task, effort: Effort) -> list[Any]:
    first = task.draw(0)
    most = _INTERPRETED_SETS if effort.interpreted else _MOST_SETS
    count = min(max(-(-_ROTATED_BYTES // task.shape.num_bytes), 1), most)
    return [first, *(task.draw(seed) for seed in range(1, count))]


def _prepare(
    variant: Variant,
    mode: str,
    *,
    task: Task,
    wanted: tuple[Any, ...],
    programs: _Programs,
    sets: list[Any],
) -> _Ready:
    """The variant, once it is known to be right.

    Raises:
        _UnfitError: It failed, or is wrong.
    """
    try:
        program = programs.of(variant)
        results = jax.block_until_ready(program(sets[0], *variant.more))
        if variant.way.view is not None:
            results = variant.way.view(sets[0], results)
        error = distance(results, wanted)
    # What libraries raise for a shape that they do not support differs.
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError, TypeError) as failure:
        if compat.CAN_INTERPRET_MOSAIC:
            compat.reset_interpreter()
        said = str(failure).strip() or type(failure).__name__
        raise _UnfitError(f"failed: {said.splitlines()[0]}") from failure
    # A NaN makes an error that no comparison calls small.
    most = variant.way.slack * task.relative_error
    if not error <= most:
        raise _UnfitError(f"wrong: error {error:.1e}, at most {most:.0e} wanted")
    return _Ready(
        variant=variant,
        mode=mode,
        call=lambda number: program(sets[number % len(sets)], *variant.more),
        calls=1,
        method="",
        error=error,
    )


def _with_calls(ready: _Ready, *, clock: clock_lib.Clock, effort: Effort) -> _Ready:
    method = clock_lib.WALL if ready.variant.way.is_wall else clock.method
    if effort.interpreted:
        return dataclasses.replace(ready, method=method)
    seconds = clock.seconds(ready.call, calls=2, method=method)
    calls = clock_lib.calls_for(seconds, sample_s=effort.sample_s)
    return dataclasses.replace(ready, method=method, calls=calls)


def distance(found: tuple[Any, ...], wanted: tuple[Any, ...]) -> float:
    """Largest distance of a result from what is wanted, as a share of it in the 2-norm.

    Raises:
        ValueError: They are of other shapes.
    """
    if [x.shape for x in found] != [x.shape for x in wanted]:
        raise ValueError(
            f"results of shapes {[x.shape for x in found]} instead of {[x.shape for x in wanted]}"
        )
    return max(float(_distance(one, other)) for one, other in zip(found, wanted, strict=True))


@jax.jit
def _distance(found: Float[Array, "*X"], wanted: Float[Array, "*X"]) -> Float[Array, ""]:
    one, other = found.astype(jnp.float32), wanted.astype(jnp.float32)
    return jnp.linalg.norm((one - other).ravel()) / jnp.linalg.norm(other.ravel())
