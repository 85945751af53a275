"""Where two right runs may give different tokens: logits closer together than rounding."""

from collections.abc import Sequence

MIN_MARGIN = 1e-4


def num_certain(margins: Sequence[float]) -> int:
    """How many tokens of a greedy output any right run gives.

    Args:
        margins: Distance of the top two logits at each token.
    """
    return next((i for i, margin in enumerate(margins) if margin < MIN_MARGIN), len(margins))
