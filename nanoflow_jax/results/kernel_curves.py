"""Draws what share of its speed each kernel has on what share of a GPU, as one SVG picture."""

import html
import statistics
from collections.abc import Mapping, Sequence

from nanoflow_jax.results import kernels, svg
from nanoflow_jax.results.kernels import Sample

_COLUMNS = 4
_WIDTH, _HEIGHT = 340, 280
# Around the axes of a panel.
_LEFT, _TOP, _RIGHT, _BOTTOM = 44, 72, 10, 36
# Names of ways, above the axes.
_KEY_COLUMNS, _KEY_TOP, _KEY_HEIGHT = 2, 28, 11


def draw(cases: Mapping[str, Mapping[str, Sequence[Sample]]]) -> str:
    """One panel for each problem.

    Across: SMs of ours, or of the product in a pair. Up: speed, as a share of ours on all SMs, or,
    in a pair, of one kernel after the other. Bars are quartiles; broken lines have no share.

    Args:
        cases: Timed samples by case and mode.
    """
    rows = max(-(-len(cases) // _COLUMNS), 1)
    columns = max(min(len(cases), _COLUMNS), 1)
    width, height = columns * _WIDTH, rows * _HEIGHT
    parts: list[str] = []
    for number, (case, modes) in enumerate(cases.items()):
        place = f"translate({number % _COLUMNS * _WIDTH} {number // _COLUMNS * _HEIGHT})"
        parts += [f'<g transform="{place}">', *_panel(case, modes), "</g>"]
    return svg.page(width, height, parts)


def _median(samples: Sequence[Sample]) -> float:
    return statistics.median(one.seconds for one in samples if one.seconds is not None)


def _whole(modes: Mapping[str, Sequence[Sample]]) -> Sequence[Sample] | None:
    """What others are shares of: ours on all SMs, or in turn."""
    for way in (kernels.IN_TURN, kernels.OURS):
        found = [one for one in modes.values() if one[0].way == way]
        if found:
            return max(found, key=lambda one: one[0].num_ctas or 0)
    return None


def _panel(case: str, modes: Mapping[str, Sequence[Sample]]) -> list[str]:
    whole = _whole(modes)
    parts = [f'<text class="title" x="{_LEFT}" y="14">{html.escape(case)}</text>']
    if whole is None:
        return [*parts, f'<text x="{_LEFT}" y="40">ours was not timed</text>']
    whole_s, most = _median(whole), max(one[0].num_ctas or 1 for one in modes.values())
    lines: dict[str, list[tuple[float, tuple[float, float, float]]]] = {}
    for samples in modes.values():
        speeds = [whole_s / one.seconds for one in samples if one.seconds is not None]
        at = samples[0].split if samples[0].split is not None else samples[0].num_ctas
        lines.setdefault(samples[0].way, []).append((at or most, kernels.quartiles(speeds)))
    top = 1.05 * max(speeds[2] for points in lines.values() for _, speeds in points)
    frame = _Frame(most, top)
    parts += frame.axes(is_pair=any(one[0].split is not None for one in modes.values()))
    for number, (way, points) in enumerate(lines.items()):
        parts += _line(way, sorted(points), frame, number)
    return parts


class _Frame:
    """Places in a panel."""

    def __init__(self, most: int, top: float) -> None:
        self._most, self._top = most, top

    def x(self, sms: float) -> float:
        return round(_LEFT + sms / self._most * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(self, speed: float) -> float:
        return round(_HEIGHT - _BOTTOM - speed / self._top * (_HEIGHT - _TOP - _BOTTOM), 1)

    def axes(self, *, is_pair: bool) -> list[str]:
        base, right = self.y(0), self.x(self._most)
        parts = []
        step = svg.tick(self._top)
        for i in range(int(self._top / step) + 1):
            y = self.y(i * step)
            parts.append(f'<path class="grid" d="M{_LEFT} {y}H{right}"/>')
            parts.append(f'<text x="{_LEFT - 4}" y="{y + 3}" text-anchor="end">{i * step:g}</text>')
        for sms in sorted({*range(0, self._most, max(self._most // 4, 1)), self._most}):
            parts.append(
                f'<text x="{self.x(sms)}" y="{base + 12}" text-anchor="middle">{sms}</text>'
            )
        if not is_pair:
            parts.append(
                f'<path class="even" d="M{self.x(0)} {base}L{right} {self.y(min(1, self._top))}"/>'
            )
        what = "SMs of the product" if is_pair else "SMs"
        middle = (_LEFT + right) / 2
        return [
            *parts,
            f'<path class="axis" d="M{_LEFT} {_TOP}V{base}H{right}"/>',
            f'<text x="{middle}" y="{base + 26}" text-anchor="middle">{what}</text>',
        ]


def _line(
    way: str,
    points: Sequence[tuple[float, tuple[float, float, float]]],
    frame: _Frame,
    number: int,
) -> list[str]:
    colour = svg.COLOURS[number % len(svg.COLOURS)]
    row, column = divmod(number, _KEY_COLUMNS)
    x = _LEFT + column * (_WIDTH - _LEFT) // _KEY_COLUMNS
    label = f'<text x="{x}" y="{_KEY_TOP + row * _KEY_HEIGHT}" style="fill:{colour}">'
    parts = [f"{label}{html.escape(way)}</text>"]
    form = f'stroke="{colour}" fill="none"'
    if len(points) == 1:
        y = frame.y(points[0][1][1])
        left, right = frame.x(0), frame.x(points[0][0])
        return [*parts, f'<path class="flat" {form} d="M{left} {y}H{right}"/>']
    corners = " ".join(f"{frame.x(at)},{frame.y(speeds[1])}" for at, speeds in points)
    bars = "".join(
        f"M{frame.x(at)} {frame.y(speeds[0])}V{frame.y(speeds[2])}" for at, speeds in points
    )
    return [*parts, f'<polyline {form} points="{corners}"/>', f'<path {form} d="{bars}"/>']
