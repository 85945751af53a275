"""Predicts how many pages the running requests will need at the worst step to come."""

from collections.abc import Sequence

import numpy as np


def peak_pages(
    context_lens: Sequence[int], remaining_lens: Sequence[int], *, page_size: int
) -> int:
    """Most pages a set of running requests will hold at any one step.

    Each request grows by one token a step and gives all its pages back when done, so the peak
    falls on a step at which some request produces its last token.

    Args:
        context_lens: Tokens cached now, one entry per request.
        remaining_lens: Tokens still to produce, same order; predicted where unknown.
        page_size: Tokens in one page.

    Returns:
        Pages at the worst step; 0 when nothing runs.
    """
    if not context_lens:
        return 0
    remaining = np.asarray(remaining_lens, np.int64)
    contexts = np.asarray(context_lens, np.int64)
    last_steps = np.unique(remaining)
    alive = remaining[None, :] >= last_steps[:, None]
    grown = contexts[None, :] + last_steps[:, None]
    pages = -(-grown // page_size) * alive
    return int(pages.sum(axis=1).max())


class OutputLengths:
    """Learns how long outputs are, to predict how long running requests still run.

    Invariant: `_total` is the sum of the lengths of `_count` finished requests.
    """

    # Below this many finished requests nothing is known, and the limit itself is the guess.
    _ENOUGH = 16

    def __init__(self) -> None:
        self._count = 0
        self._total = 0

    def add(self, output_len: int) -> None:
        """Counts a request that produced so many tokens and could have ended at any of them."""
        self._count += 1
        self._total += output_len

    def remaining(self, *, generated: int, most: int) -> int:
        """Tokens that a request will likely still produce, at most `most`.

        A request that outlived the mean is expected to run on for as long as it has run: an
        estimate that grows with its age, so that long outputs are never taken for finished.
        """
        if self._count < self._ENOUGH:
            return most
        mean = -(-self._total // self._count)
        left = mean - generated if generated < mean else generated
        return max(1, min(most, left))
