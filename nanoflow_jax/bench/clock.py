"""How long programs take on the device: by CUPTI where it can be had, else by the wall clock."""

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from nanoflow_jax import compat

CUPTI = "cupti"
WALL = "wall"

_Item = TypeVar("_Item")
# Runs of a program whose time is one sample.
_LEAST_CALLS, _MOST_CALLS = 3, 100


class Clock:
    """Measures calls that are launched one after another.

    Attributes:
        method: CUPTI: sum of the times of all kernels, gaps left out. WALL: from the first launch
            to the last result, by the number of calls; launches that are slower than the device
            count.
        why: Why it is not CUPTI; empty if it is.
    """

    def __init__(self) -> None:
        self.method, self.why = WALL, ""
        if jax.devices()[0].platform != "gpu":
            self.why = "there is no GPU"
            return
        probe = jax.jit(lambda x: x + 1)
        x = jnp.arange(1024, dtype=jnp.int32)
        jax.block_until_ready(probe(x))
        try:
            found = compat.device_kernels(lambda: jax.block_until_ready(probe(x)))
        except RuntimeError as error:
            self.why = str(error).splitlines()[0]
            return
        if found:
            self.method = CUPTI
        else:
            self.why = "CUPTI saw no kernel of a program that has one"

    def seconds(
        self, call: Callable[[int], Any], *, calls: int, method: str | None = None
    ) -> float:
        """Mean time of one call.

        Args:
            call: Takes the number of the call, launches, and returns what can be waited for.
            calls: How many.
            method: WALL for what overlaps, whose kernels' times do not add up; this clock's own
                unless given.

        Raises:
            RuntimeError: CUPTI was not to be had this time, or saw nothing.
        """
        if (method or self.method) == WALL:
            begin = time.perf_counter()
            _launch(call, calls)
            return (time.perf_counter() - begin) / calls
        kernels = compat.device_kernels(lambda: _launch(call, calls))
        if not kernels:
            raise RuntimeError("CUPTI saw no kernel")
        return sum(seconds for _, seconds in kernels) / calls


def _launch(call: Callable[[int], Any], calls: int) -> None:
    result = None
    for number in range(calls):
        result = call(number)  # the one before may go: the device works in order
    jax.block_until_ready(result)


def calls_for(seconds: float, *, sample_s: float) -> int:
    """Calls of so many seconds that fill a sample.

    Args:
        seconds: Of one call.
        sample_s: Of a sample.
    """
    return min(max(round(sample_s / max(seconds, 1e-9)), _LEAST_CALLS), _MOST_CALLS)


def abba(items: Sequence[_Item], round_number: int) -> list[_Item]:
    """Items in the order of that round: to and fro, so that a drift of the device cancels out."""
    return list(items) if round_number % 2 == 0 else list(reversed(items))
