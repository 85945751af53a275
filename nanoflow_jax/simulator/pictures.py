"""Draws simulations: latency against rate, throughput against optimal, resources over time."""

import html
from collections.abc import Mapping, Sequence

from nanoflow_jax.nanobatch.operations import Resource
from nanoflow_jax.results import svg
from nanoflow_jax.simulator.measures import Interval
from nanoflow_jax.simulator.result_file import OneRate, Simulation

_WIDTH, _HEIGHT = 560, 260  # between the axes
_LEFT, _TOP, _RIGHT, _BOTTOM = 64, 46, 24, 44
_ROOM = 90  # between two charts
_KEY = 130


class _Chart:
    """Axes from 0, and lines in them."""

    def __init__(
        self,
        title: str,
        *,
        x: tuple[str, float],
        y: tuple[str, float],
        top: int = 0,
        marks_x: bool = True,
    ) -> None:
        """Axes.

        Args:
            title: Shown above.
            x: What is to the right, and the most of it.
            y: What is upwards, and the most of it.
            top: Pixels above.
            marks_x: Whether numbers stand below.
        """
        (label_x, self._most_x), (label_y, self._most_y) = x, y
        self._top = _TOP + top
        self._keys = 0
        base = self._top + _HEIGHT
        self.parts = [
            f'<text class="title" x="{_LEFT}" y="{self._top - 28}">{html.escape(title)}</text>',
            f'<text x="{_LEFT}" y="{self._top - 12}">{html.escape(label_y)}</text>',
            f'<text x="{_LEFT + _WIDTH / 2}" y="{base + 32}" text-anchor="middle">'
            f"{html.escape(label_x)}</text>",
        ]
        for number, value in _marks(self._most_y):
            self.parts.append(
                f'<path class="grid" d="M{_LEFT} {self.y(value)}H{_LEFT + _WIDTH}"/>'
                f'<text x="{_LEFT - 6}" y="{self.y(value) + 3}" text-anchor="end">{number}</text>'
            )
        for number, value in _marks(self._most_x) if marks_x else ():
            self.parts.append(
                f'<text x="{self.x(value)}" y="{base + 15}" text-anchor="middle">{number}</text>'
            )
        self.parts.append(f'<path class="axis" d="M{_LEFT} {self._top}V{base}H{_LEFT + _WIDTH}"/>')

    def x(self, value: float) -> float:
        return round(_LEFT + _WIDTH * value / self._most_x, 1)

    def y(self, value: float) -> float:
        return round(self._top + _HEIGHT * (1 - min(value / self._most_y, 1)), 1)

    def line(self, name: str, points: Sequence[tuple[float, float]], *, dots: bool) -> None:
        """A line with a word in the key; what is above the top runs along it."""
        colour = svg.COLOURS[self._keys]
        path = "L".join(f"{self.x(x)} {self.y(y)}" for x, y in points)
        self.parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        for x, y in points if dots else ():
            self.parts.append(f'<circle cx="{self.x(x)}" cy="{self.y(y)}" r="3" fill="{colour}"/>')
        at, level = _LEFT + _WIDTH + 14, self._top + 12 + 16 * self._keys
        self.parts.append(
            f'<rect x="{at}" y="{level - 9}" width="10" height="10" fill="{colour}"/>'
            f'<text x="{at + 16}" y="{level}">{html.escape(name)}</text>'
        )
        self._keys += 1

    def level(self, value: float, text: str) -> None:
        """A broken line across, with a word on it."""
        y = self.y(value)
        self.parts.append(
            f'<path class="axis flat" d="M{_LEFT} {y}H{_LEFT + _WIDTH}"/>'
            f'<text x="{_LEFT + 6}" y="{y - 4}">{html.escape(text)}</text>'
        )


def _marks(most: float) -> list[tuple[str, float]]:
    step = svg.tick(most)
    return [(f"{i * step:,.6g}", i * step) for i in range(int(most / step + 1e-9) + 1)]


def _page(parts: Sequence[str], *, charts: int = 1) -> str:
    width = _LEFT + _WIDTH + _RIGHT + _KEY
    height = _TOP + _HEIGHT * charts + _ROOM * (charts - 1) + _BOTTOM
    return svg.page(width, height, parts)


def latency(
    found: Simulation, *, objective_s: float, printed: Mapping[float, float] | None = None
) -> str:
    """Normalised latency against rate, with the objective across; as figure 8 of arXiv 2408.12757.

    Args:
        found: A simulation.
        objective_s: Wanted of the mean.
        printed: By somebody else: seconds by rate.

    Raises:
        ValueError: It was not run at any rate.
    """
    runs = _by_rate(found)
    chart = _Chart(
        found.title,
        x=("requests/s", 1.05 * max(*runs, *(printed or {}), 0.0)),
        y=("normalised latency, ms a token of output", 4e3 * objective_s),
    )
    for name in ("mean", "p50", "p99"):
        points = [
            (rate, 1e3 * getattr(one.summary.normalised_s, name)) for rate, one in runs.items()
        ]
        chart.line(name, points, dots=True)
    if printed:
        chart.line(
            "mean, as printed", [(r, 1e3 * s) for r, s in sorted(printed.items())], dots=True
        )
    chart.level(1e3 * objective_s, f"objective, {1e3 * objective_s:g} ms")
    return _page(chart.parts)


def _by_rate(found: Simulation) -> dict[float, OneRate]:
    runs = {one.rate: one for one in found.runs if one.rate is not None}
    if not runs:
        raise ValueError("all requests were there at once; simulate with --rates to draw latency")
    return dict(sorted(runs.items()))


def throughput(found: Sequence[Simulation]) -> str:
    """A bar for each simulation, its fastest run, below a mark of what is optimal for it."""
    tops = [one.optimal_tokens_per_s / one.num_devices for one in found]
    label = "tokens/s a device, input and output; the line is optimal"
    chart = _Chart("Throughput", x=("", len(found)), y=(label, 1.1 * max(tops)), marks_x=False)
    for place, (one, top) in enumerate(zip(found, tops, strict=True)):
        speed = max(run.summary.steady_tokens_per_s for run in one.runs) / one.num_devices
        left, right, middle = (chart.x(place + part) for part in (0.2, 0.8, 0.5))
        base, y = chart.y(0), chart.y(speed)
        chart.parts += [
            f'<rect x="{left}" y="{y}" width="{right - left:.1f}" height="{base - y:.1f}" '
            f'fill="{svg.COLOURS[0]}"/>',
            f'<path class="whisker" stroke-dasharray="5 3" d="M{left} {chart.y(top)}H{right}"/>',
            f'<text x="{middle}" y="{y - 5}" text-anchor="middle">{speed:,.0f}, '
            f"{100 * speed / top:.1f} %</text>",
            f'<text x="{middle}" y="{base + 15}" text-anchor="middle">{html.escape(one.name)}'
            "</text>",
        ]
    return _page(chart.parts)


def _middle(part: Interval) -> float:
    return (part.start_s + part.end_s) / 2


def resources(run: OneRate, *, title: str) -> str:
    """What is busy when, and below it what is held."""
    end = run.timeline[-1].end_s
    busy = _Chart(title, x=("seconds", end), y=("busy, of what the datasheet promises, %", 100.0))
    for one in Resource:
        points = [(_middle(part), 100 * part.busy[one.value]) for part in run.timeline]
        busy.line(one.value, points, dots=False)
    pages = [(_middle(part), 100 * part.pages_fraction) for part in run.timeline]
    busy.line("pages held", pages, dots=False)
    most = max(max(part.num_running, part.num_waiting) for part in run.timeline)
    held = _Chart("", x=("seconds", end), y=("requests of a replica", most), top=_HEIGHT + _ROOM)
    for name in ("running", "waiting"):
        points = [(_middle(part), getattr(part, f"num_{name}")) for part in run.timeline]
        held.line(name, points, dots=False)
    return _page([*busy.parts, *held.parts], charts=2)
