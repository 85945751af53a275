"""How a dense batch is cut into nano-batches.

Source: NanoFlow (arXiv 2408.12757v2), figure 6 (2048 tokens: 768 and 1280, and each of these once
more for the first product where three resources are busy at once), and its configurations of 1024
tokens (384 and 640).
"""

_STEP = 128  # nano-batches are multiples of so many tokens
_FIRST_EIGHTHS = 3


def halves(tokens: int) -> tuple[int, ...]:
    """Tokens of the nano-batches that all operations have; one where there are too few to cut."""
    return _two(tokens, tokens * _FIRST_EIGHTHS / 8)


def quarters(tokens: int) -> tuple[int, ...]:
    """Those of the first product and of decode attention, which hides two resources."""
    return tuple(part for half in halves(tokens) for part in _two(half, half / 2))


def _two(tokens: int, wanted: float) -> tuple[int, ...]:
    first = int(-(-wanted // _STEP)) * _STEP
    return (first, tokens - first) if first < tokens else (tokens,)
