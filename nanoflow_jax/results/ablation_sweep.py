"""From which dense batch on cutting pays, found in a sweep over dense batches."""

from collections.abc import Mapping

_PREFIX = "batch "


def case_name(tokens: int) -> str:
    """Name of the sweep's case of a dense batch of so many tokens."""
    return f"{_PREFIX}{tokens}"


def try_tokens(case: str) -> int | None:
    """Tokens of the dense batch of a case; None if it is not of the sweep."""
    return int(case.removeprefix(_PREFIX)) if case.startswith(_PREFIX) else None


def threshold(speedups: Mapping[int, float]) -> int | None:
    """The smallest dense batch from which on cutting is never slower, as far as was measured.

    Args:
        speedups: By tokens of the dense batch, how many times as fast as whole it runs when cut.

    Returns:
        Tokens; None if the largest is slower already, or none was measured.
    """
    found = None
    for tokens in sorted(speedups, reverse=True):
        if speedups[tokens] < 1:
            break
        found = tokens
    return found
