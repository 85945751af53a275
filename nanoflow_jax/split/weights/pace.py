"""Lets bytes pass at a bounded rate while something more urgent goes on."""

import asyncio
import time
from collections.abc import Callable

_LOOK_S = 0.05  # How soon it is seen that nothing urgent goes on any more.


class Pace:
    """Bytes of many streams, which pass in turn."""

    def __init__(
        self,
        bytes_per_s: int,
        is_urgent: Callable[[], bool],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing has passed.

        Args:
            bytes_per_s: The bound, while it holds.
            is_urgent: Whether it does.
            clock: Seconds.
        """
        self._rate = bytes_per_s
        self._is_urgent = is_urgent
        self._clock = clock
        self._free_s = 0.0

    async def take(self, num_bytes: int) -> None:
        """Waits until so many may pass."""
        while self._is_urgent() and (wait_s := self._free_s - self._clock()) > 0:
            await asyncio.sleep(min(wait_s, _LOOK_S))
        self._free_s = max(self._free_s, self._clock()) if self._is_urgent() else self._clock()
        self._free_s += num_bytes / self._rate
