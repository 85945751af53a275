"""Derived figures: what samples come to."""

import math
import statistics
from collections.abc import Sequence

import msgspec

_ROUNDING = 1e-9  # sums of floats may be ordered otherwise by another version of Python


class Figure(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One figure of a result.

    Attributes:
        name: What was measured, unique in its result.
        unit: Of median, low and high.
        count: Samples behind it.
        median: Of the samples.
        low: Smallest sample.
        high: Largest sample.
        ceiling: Name of the ceiling that it may not pass; None if there is none.
        fraction: The median's share of that ceiling.
    """

    name: str
    unit: str
    count: int
    median: float
    low: float
    high: float
    ceiling: str | None = None
    fraction: float | None = None

    @property
    def spread(self) -> float:
        """Distance from the smallest to the largest sample, as a share of the median."""
        return (self.high - self.low) / self.median if self.median else math.inf


class Ceilings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the device reached at most, measured in the run itself on random data.

    Attributes:
        before: By name, before the first sample; the unit ends the name, such as
            `copy_bytes_per_s` and `bf16_product_flops_per_s`.
        after: The same after the last sample.
    """

    before: dict[str, float]
    after: dict[str, float]

    def of(self, name: str) -> float:
        """The larger of both measurements, so that no share of it is flattered.

        Raises:
            ValueError: It was not measured before and after.
        """
        if name not in self.before or name not in self.after:
            raise ValueError(f"the ceiling {name} was not measured before and after")
        return max(self.before[name], self.after[name])


def summarise(
    name: str,
    unit: str,
    values: Sequence[float],
    *,
    ceiling: str | None = None,
    ceilings: Ceilings | None = None,
) -> Figure:
    """Median, smallest and largest of samples.

    Args:
        name: Of the figure.
        unit: Of the values.
        values: One for each sample.
        ceiling: The ceiling, in the same unit, of which the median is a share.
        ceilings: Where that ceiling was measured.

    Raises:
        ValueError: There are no values, or the ceiling was not measured.
    """
    if not values:
        raise ValueError(f"there are no samples of {name}")
    median = float(statistics.median(values))
    fraction = None
    if ceiling is not None:
        if ceilings is None:
            raise ValueError(f"{name} is a share of {ceiling}, and no ceilings were measured")
        fraction = median / ceilings.of(ceiling)
    return Figure(
        name=name,
        unit=unit,
        count=len(values),
        median=median,
        low=float(min(values)),
        high=float(max(values)),
        ceiling=ceiling,
        fraction=fraction,
    )


def ratio(name: str, over: Figure, under: Figure) -> Figure:
    """How many times one figure another is: medians divided, and the extremes of what could be."""
    return Figure(
        name=name,
        unit="x",
        count=min(over.count, under.count),
        median=over.median / under.median,
        low=over.low / under.high,
        high=over.high / under.low,
    )


def is_same(one: Figure, other: Figure) -> bool:
    """Whether two figures say the same, but for the last bits."""
    return all(
        math.isclose(a, b, rel_tol=_ROUNDING) if isinstance(a, float) and b is not None else a == b
        for a, b in zip(msgspec.structs.astuple(one), msgspec.structs.astuple(other), strict=True)
    )


def do_agree(one: float, other: float, *, within: float) -> bool:
    """Whether two positive medians differ by no more than this share of the smaller."""
    return abs(one - other) <= within * min(one, other)
