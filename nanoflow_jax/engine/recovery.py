"""Finds the request that makes steps fail, by running the suspects apart from each other."""

import collections
import itertools
from collections.abc import Collection, Mapping

_CALM_STEPS = 256


class Recovery:
    """Who may run after a step failed.

    The requests of a failed step run again, apart from all others. If that fails too they are
    halved, and so on down to one that fails alone: it is to blame. A group is cleared when each of
    its requests has ended or got a token. If all were cleared that had failed together, there is
    room for fewer at once, until enough good steps allow a try with more.

    Invariant: groups share no request; the first one runs.
    """

    def __init__(self, *, max_requests: int) -> None:
        """Everybody may run.

        Args:
            max_requests: Most requests that run at once.
        """
        # Groups in turn: the requests of each, with the tokens that they had when it was made.
        self._groups: collections.deque[Mapping[str, int]] = collections.deque()
        self._max_requests = max_requests
        self._is_split = False
        self._largest_cleared = 0
        self._num_calm = 0
        self.most_running = max_requests

    @property
    def is_active(self) -> bool:
        """Whether good steps change anything."""
        return bool(self._groups) or self.most_running < self._max_requests

    @property
    def group(self) -> Collection[str] | None:
        """Who may run now; None for everybody."""
        return self._groups[0].keys() if self._groups else None

    def blame(self, ran: Mapping[str, int]) -> str | None:
        """Takes note of a failed step.

        Args:
            ran: The requests that it may have held, in order, each with its number of tokens.

        Returns:
            The request that is to blame, if that is certain now.
        """
        self._num_calm = 0
        if not ran:
            return None
        if not self._groups:
            self._groups.append(ran)
            self._is_split, self._largest_cleared = False, 0
            return None
        suspects = self._groups.popleft()
        idle = {key: count for key, count in suspects.items() if key not in ran}
        if idle:
            self._groups.appendleft(idle)
        self._is_split = len(ran) > 1
        if not self._is_split:
            return next(iter(ran))
        middle = len(ran) // 2
        for start, stop in ((middle, None), (0, middle)):
            self._groups.appendleft(dict(itertools.islice(ran.items(), start, stop)))
        return None

    def take_step(self, counts: Mapping[str, int]) -> bool:
        """Takes note of a good step.

        Args:
            counts: Tokens of each request that has not ended.

        Returns:
            Whether others may run from now on.
        """
        if not self._groups:
            return self._try_more()
        before = len(self._groups)
        while self._groups and _is_cleared(self._groups[0], counts):
            self._largest_cleared = max(self._largest_cleared, len(self._groups.popleft()))
        if not self._groups and self._is_split:
            self.most_running = self._largest_cleared
        return len(self._groups) < before

    def _try_more(self) -> bool:
        self._num_calm += 1
        if self._num_calm < _CALM_STEPS:
            return False
        self._num_calm = 0
        self.most_running = min(2 * self.most_running, self._max_requests)
        return True


def _is_cleared(group: Mapping[str, int], counts: Mapping[str, int]) -> bool:
    return all(key not in counts or counts[key] > before for key, before in group.items())
