"""Curves of measured times, which never fall where there is more to do; and what others beat."""

import bisect
import dataclasses
from collections.abc import Iterable, Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Curve:
    """A measured quantity over how much there is to do: straight between what was measured.

    Attributes:
        places: Where it was measured, ascending.
        values: There, never falling.
        spreads: Of the samples there, standard deviations.
    """

    places: tuple[int, ...]
    values: tuple[float, ...]
    spreads: tuple[float, ...]

    @property
    def end(self) -> int:
        """The last place that was measured."""
        return self.places[-1]

    def __call__(self, place: float) -> float:
        """The value somewhere; under the first place what it is there, for it cannot be more.

        Raises:
            ValueError: It is beyond the last place.
        """
        return self._between(self.values, place)

    def spread(self, place: float) -> float:
        """Standard deviation of samples somewhere.

        Raises:
            ValueError: It is beyond the last place.
        """
        return self._between(self.spreads, place)

    def _between(self, values: Sequence[float], place: float) -> float:
        if place > self.end:
            raise ValueError(f"{place:,.0f} is beyond {self.end:,}, the most that was measured")
        right = bisect.bisect_left(self.places, place)
        if right == 0 or self.places[right] == place:
            return values[right]
        first, second = self.places[right - 1], self.places[right]
        share = (place - first) / (second - first)
        return values[right - 1] + share * (values[right] - values[right - 1])


def fit(values: Mapping[int, float], spreads: Mapping[int, float]) -> Curve:
    """The never falling curve nearest to some values, in the sum of squares.

    Args:
        values: By place, at least one.
        spreads: Of the samples there.
    """
    places = tuple(sorted(values))
    return Curve(
        places=places,
        values=tuple(rising([values[place] for place in places])),
        spreads=tuple(spreads[place] for place in places),
    )


def rising(values: Sequence[float]) -> list[float]:
    """The never falling values nearest to some, in the sum of squares.

    Neighbours that fall are replaced by their mean until none are left.

    Source: Ayer et al., An empirical distribution function for sampling with incomplete
    information, Annals of Mathematical Statistics 26(4), 1955 (pool adjacent violators).
    """
    pools: list[tuple[float, int]] = []  # sum, and how many
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] * pools[-1][1] > pools[-1][0] * pools[-2][1]:
            total, count = pools.pop()
            pools[-1] = (pools[-1][0] + total, pools[-1][1] + count)
    return [total / count for total, count in pools for _ in range(count)]


def unbeaten(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points (cost, gain) that no other beats: none gains as much for less, or more for as much.

    Returns:
        Both rise strictly.
    """
    found: list[tuple[float, float]] = []
    for cost, gain in sorted(points, key=lambda point: (point[0], -point[1])):
        if not found or gain > found[-1][1]:
            found.append((cost, gain))
    return found
