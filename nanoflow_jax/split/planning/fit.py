"""From measurements to the coefficients of a node's time: least squares, none below zero."""

import itertools
import math
from collections.abc import Sequence

import numpy as np

Measurement = tuple[float, float]  # tokens, seconds


def fit_prefill(measured: Sequence[Measurement]) -> tuple[float, float, float]:
    """a, b, c of the time a + b P + c P^2 of a prompt of P tokens.

    Raises:
        ValueError: Fewer than three lengths, or a measurement is none.
    """
    a, b, c = _fit(measured, 3)
    return a, b, c


def fit_decode(measured: Sequence[Measurement]) -> tuple[float, float]:
    """a, b of the time a + b n of a step that sees n tokens.

    Raises:
        ValueError: Fewer than two lengths, or a measurement is none.
    """
    a, b = _fit(measured, 2)
    return a, b


def _fit(measured: Sequence[Measurement], count: int) -> list[float]:
    """The least squares of all choices of coefficients that are not zero.

    The best with none below zero is the plain solution over those that are above zero, so
    that trying each choice of a few finds it.
    """
    for tokens, seconds in measured:
        if not (0 <= tokens < math.inf and 0 <= seconds < math.inf):
            raise ValueError(
                f"{tokens:g} tokens in {seconds:g} s is no measurement; measure it again"
            )
    lengths = {tokens for tokens, _ in measured}
    if len(lengths) < count:
        raise ValueError(
            f"{len(lengths)} lengths do not tell {count} coefficients; measure at {count} or more"
        )
    at = np.array([tokens for tokens, _ in measured])
    wanted = np.array([seconds for _, seconds in measured])
    return least_squares(np.stack([at**power for power in range(count)], axis=1), wanted)


def least_squares(rows: np.ndarray, wanted: np.ndarray) -> list[float]:
    """The coefficients of least squares, none below zero.

    The best with none below zero is the plain solution over those that are above zero, so that
    trying each choice of a few finds it.

    Args:
        rows: [m, k], what each of a few coefficients is multiplied by; none below zero.
        wanted: [m].
    """
    count = rows.shape[1]
    scale = np.maximum(rows.max(axis=0), np.finfo(float).tiny)
    rows = rows / scale
    found = [0.0] * count
    least = float(wanted @ wanted)
    for size in range(1, count + 1):
        for chosen in itertools.combinations(range(count), size):
            columns = rows[:, chosen]
            solution = np.linalg.lstsq(columns, wanted, rcond=None)[0]
            error = float(np.sum((columns @ solution - wanted) ** 2))
            if solution.min() >= 0 and error < least:
                least, found = error, [0.0] * count
                for place, value in zip(chosen, solution, strict=True):
                    found[place] = float(value / scale[place])
    return found
