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
    # The longest first: those alive at the last step of one are it and all before it, so that sums
    # over them are running sums.
    order = np.argsort(-remaining)
    last_steps = remaining[order]
    contexts = np.asarray(context_lens, np.int64)[order]
    whole, part = np.divmod(contexts, page_size)
    turns, extra = np.divmod(last_steps, page_size)
    # Context and step together are whole + turns pages, and what is left of both fills 0 to 2 more.
    with_part = np.cumsum(part[:, None] == np.arange(page_size), axis=0)
    up_to_part = np.cumsum(with_part, axis=1)
    alive = np.arange(1, len(order) + 1)
    rows = np.arange(len(order))
    is_none_left = (extra == 0) * with_part[:, 0]
    more_than_one = alive - up_to_part[rows, page_size - np.maximum(extra, 1)]
    more = alive - is_none_left + (extra > 0) * more_than_one
    pages = np.cumsum(whole) + alive * turns + more
    # Of requests that end together, only the last has all of them before it.
    return int(pages.max())


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
