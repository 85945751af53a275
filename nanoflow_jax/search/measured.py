"""Times of operations as a profile has them, and what running side by side was measured to cost."""

import collections
import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Iterable, Mapping

from nanoflow_jax.cost import layer_work
from nanoflow_jax.nanobatch.operations import Resource
from nanoflow_jax.results.profile import LAUNCH, Point, Profile, by_operation
from nanoflow_jax.search import interference, monotone
from nanoflow_jax.search.interference import Speeds

# Of what is timed in two parts.
_PARTS = {"norm_kqv": ("norm", "kqv")}
LEVELS = tuple(level / 10 for level in range(1, 10))


class Times:
    """Of operations over any number of tokens, alone on the device and at their best.

    Each at the best of its caps and tiles; between measured tokens and contexts straight, and
    never falling. Beyond what was measured nothing is said.
    """

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._points = by_operation(profile)
        launches = [profile.time_s(one) for one in self._points.get(LAUNCH, ())]
        # What a kernel's own clock saw has no launch in it.
        self.launch_s = min(launches, default=0.0)
        self._curves: dict[str, dict[int, monotone.Curve]] = {}

    @property
    def operations(self) -> frozenset[str]:
        """What it has times of."""
        whole = {name for name, parts in _PARTS.items() if self._points.keys() >= set(parts)}
        return frozenset(self._points.keys() | whole) - {LAUNCH}

    def seconds(self, operation: str, tokens: float, context: float = 0.0) -> float:
        """Of an operation over some tokens.

        Args:
            operation: Its name.
            tokens: As `Point` counts them; none take no time.
            context: As there.

        Raises:
            ValueError: It was not measured, or not so far.
        """
        if tokens == 0:
            return 0.0
        if parts := self._parts(operation):
            return sum(self.seconds(part, tokens, context) for part in parts)
        curves = self._of(operation)
        try:
            return max(self._at(curves, tokens, context) - self.launch_s, 0.0)
        except ValueError as error:
            raise ValueError(
                f"{operation} of {tokens:,.0f} tokens with {context:,.0f} cached: {error}; measure "
                "more with search profile --tokens and --contexts"
            ) from None

    def spread_s(self, operation: str, tokens: float, context: float = 0.0) -> float:
        """Standard deviation of samples of an operation over some tokens, at the nearest context.

        Raises:
            ValueError: As `seconds`.
        """
        if tokens == 0:
            return 0.0
        if parts := self._parts(operation):
            return math.hypot(*(self.spread_s(part, tokens, context) for part in parts))
        curves = {c: curve for c, curve in self._of(operation).items() if tokens <= curve.end}
        self.seconds(operation, tokens, context)
        return curves[min(curves, key=lambda measured: abs(measured - context))].spread(tokens)

    def _parts(self, operation: str) -> tuple[str, ...]:
        """Of an operation that was timed in parts only."""
        parts = _PARTS.get(operation, ())
        is_there = operation in self._points or not self._points.keys() >= set(parts)
        return () if is_there else parts

    def _of(self, operation: str) -> Mapping[int, monotone.Curve]:
        if operation not in self._points:
            raise ValueError(
                f"the profile of {self._profile.model} has no times of {operation}: it has "
                f"{', '.join(sorted(self.operations))}; measure it again with search profile"
            )
        if operation not in self._curves:
            self._curves[operation] = _curves(self._profile, self._points[operation])
        return self._curves[operation]

    @staticmethod
    def _at(curves: Mapping[int, monotone.Curve], tokens: float, context: float) -> float:
        """Between contexts too, at which the same rows need not all have been measured."""
        values, contexts = [], []
        for measured, curve in curves.items():
            if tokens <= curve.end:
                contexts.append(measured)
                values.append(curve(tokens))
        if not contexts:
            furthest = max(curve.end for curve in curves.values())
            raise ValueError(f"{tokens:,.0f} is beyond {furthest:,}, the most that was measured")
        across = monotone.Curve(
            tuple(contexts), tuple(monotone.rising(values)), (0.0,) * len(values)
        )
        return across(context)


def _curves(profile: Profile, points: Iterable[Point]) -> dict[int, monotone.Curve]:
    """Curves over tokens by context, each point at its best cap and tile."""
    best: dict[int, dict[int, Point]] = collections.defaultdict(dict)
    for point in points:
        others = best[point.context]
        known = others.get(point.tokens)
        if known is None or profile.time_s(point) < profile.time_s(known):
            others[point.tokens] = point
    return {
        context: monotone.fit(
            {tokens: profile.time_s(point) for tokens, point in some.items()},
            {tokens: statistics.pstdev(point.seconds) for tokens, point in some.items()},
        )
        for context, some in sorted(best.items())
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """Times of a layer's operations; see `search.profiles.Profile`.

    Attributes:
        file: What was measured.
        name: Of the file.
        load: Of a whole step; tokens of a part have their share of its decode rows.
    """

    file: Profile
    name: str
    load: layer_work.Load

    @property
    def source(self) -> str:
        return f"{self.file.source} ({self.name}); fewer tokens than the fewest measured as these"

    @functools.cached_property
    def times(self) -> Times:
        return Times(self.file)

    def seconds(self, operation: str, tokens: int) -> float:
        """See `search.profiles.Profile`.

        Raises:
            ValueError: It was not measured, or not so far.
        """
        return self.times.seconds(*self._place(operation, tokens))

    def spread_s(self, operation: str, tokens: int) -> float:
        """Standard deviation of samples of that.

        Raises:
            ValueError: As `seconds`.
        """
        return self.times.spread_s(*self._place(operation, tokens))

    def _place(self, operation: str, tokens: int) -> tuple[str, int, float]:
        """What to look up: name, rows, cached tokens."""
        name, load = operation.removesuffix("_columns"), self.load
        rows = round(load.decode_rows * tokens / load.tokens)
        match name:
            case "decode_attention":
                return name, rows, load.context_len
            case "prefill_attention":
                return name, tokens - rows, load.prefix_len
        return name, tokens, 0.0


def shares(profile: Profile, points: Iterable[Point]) -> list[tuple[float, float]]:
    """Shares of a device and the best time on them, those that no other beats.

    Args:
        profile: Of a device that has shares.
        points: Of one operation at one size.

    Returns:
        Shares of its SMs, and seconds; the first rise and the second fall.
    """
    sms = profile.num_sms
    assert sms is not None, "the device has no shares"
    found = [((one.num_ctas or sms) / sms, -profile.time_s(one)) for one in points]
    return [(share, -seconds) for share, seconds in monotone.unbeaten(found)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kept:
    """What is left of two operations' speeds side by side: R and P of NanoFlow's Table 3.

    Attributes:
        product: Of the pair, and its tokens.
        other: Likewise.
        points: What the product keeps of its speed, and what the other does, of those splits of
            SMs that no other beats. In the time of both, each does all its work: that is the least
            that each keeps.
    """

    product: str
    other: str
    points: tuple[tuple[float, float], ...]

    def other_keeps(self, given_up: float) -> float | None:
        """Speed of the other where the product gives up so much; None beyond what was measured."""
        left = [(0.0, 0.0), *((1.0 - kept, speed) for kept, speed in reversed(self.points))]
        if given_up > left[-1][0]:
            return None
        for (first, low), (second, high) in itertools.pairwise(left):
            if first < second and given_up <= second:
                return low + (high - low) * (given_up - first) / (second - first)
        return None


def kept(profile: Profile) -> dict[str, list[Kept]]:
    """From pairs, what is kept of speeds, by the operation beside the product."""
    times = Times(profile)
    found: dict[tuple[object, ...], list[tuple[float, float]]] = collections.defaultdict(list)
    for pair in profile.pairs:
        alone = times.seconds(pair.product, pair.tokens)
        beside = times.seconds(pair.other, pair.other_tokens, pair.context)
        whole = max(pair.median_s - times.launch_s, alone, beside)
        key = (pair.other, pair.product, pair.tokens)
        found[key].append((1.0 - alone / whole, beside / whole))
    table: dict[str, list[Kept]] = collections.defaultdict(list)
    for (other, product, tokens), points in found.items():
        front = [(1.0 - given, speed) for given, speed in monotone.unbeaten(points)]
        table[str(other)].append(
            Kept(
                product=f"{product} of {tokens:,} tokens",
                other=str(other),
                points=tuple(sorted(front)),
            )
        )
    return dict(table)


def kept_lines(profile: Profile) -> list[str]:
    """The table of what is kept, with its spread over shapes."""
    lines = []
    for other, rows in kept(profile).items():
        lines.append(
            f"{other} beside products of {len(rows)} shapes: what products give up, what it keeps "
            "(mean, least, most)"
        )
        for level in LEVELS:
            known = [speed for row in rows if (speed := row.other_keeps(level)) is not None]
            if known:
                lines.append(
                    f"  {level:.1f} {statistics.fmean(known):.2f} {min(known):.2f} {max(known):.2f}"
                    f" of {len(known)}"
                )
    return lines


# Nothing runs beside anything else on such a device but at its cost.
ONE_AFTER_ANOTHER = Speeds(
    points=dict.fromkeys(Resource, ((0.0, 0.0), (1.0, 1.0))),
    source="a device without shares: what one operation gets another loses",
)


def speeds(profile: Profile, otherwise: Speeds) -> Speeds:
    """What was measured of shares of the device.

    Args:
        profile: With pairs, or of a device that has no shares.
        otherwise: What is taken of resources for which there are no pairs.
    """
    if profile.num_sms is None:
        return ONE_AFTER_ANOTHER
    rows = kept(profile).get("decode_attention")
    if not rows:
        return dataclasses.replace(
            otherwise, source=f"{otherwise.source}; the profile has no pairs"
        )
    means = []
    for level in LEVELS:
        known = [speed for row in rows if (speed := row.other_keeps(level)) is not None]
        if known:
            means.append((level, min(statistics.fmean(known), 1.0)))
    points = [(0.0, 0.0), *monotone.unbeaten(p for p in means if p[1] < 1.0), (1.0, 1.0)]
    return interference.Speeds(
        points={**otherwise.points, Resource.MEMORY: tuple(points)},
        source=f"of decode attention {len(rows)} shapes of pairs {profile.source}; of the rest, "
        + otherwise.source,
    )
