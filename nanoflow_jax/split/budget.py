"""Bytes that many sessions share."""

import asyncio
import collections


class ByteBudget:
    """Takes wait, in order, until there is room.

    Invariant: what is taken is at most the limit, or is one take that alone is larger.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._taken = 0
        self._waiters: collections.deque[tuple[int, asyncio.Future[None]]] = collections.deque()

    @property
    def taken_bytes(self) -> int:
        """What is in use."""
        return self._taken

    async def take(self, num_bytes: int) -> None:
        """Takes so many as soon as they are free; one that is too large waits until it is alone."""
        if not self._waiters and self._fits(num_bytes):
            self._taken += num_bytes
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append((num_bytes, waiter))
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self.give(num_bytes)
            raise

    def give(self, num_bytes: int) -> None:
        """Gives back what was taken."""
        self._taken -= num_bytes
        while self._waiters:
            wanted, waiter = self._waiters[0]
            if not waiter.done() and not self._fits(wanted):
                return
            self._waiters.popleft()
            if not waiter.done():
                self._taken += wanted
                waiter.set_result(None)

    def _fits(self, num_bytes: int) -> bool:
        return self._taken == 0 or self._taken + num_bytes <= self._limit
