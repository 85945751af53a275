"""Draws how fast each mode was, as bars beside each other, as figure 9 of arXiv 2408.12757 does."""

import html
import statistics
from collections.abc import Mapping, Sequence

from nanoflow_jax.results import ablation, svg
from nanoflow_jax.results.ablation import Cases, Role, Timed

_BAR, _GAP = 46, 28
_LEFT, _TOP, _RIGHT, _BOTTOM = 58, 30, 12, 40
_HEIGHT = 300  # between top and bottom of the axes
_KEY_HEIGHT = 14
_COLOURS = {
    Role.SEQUENTIAL: svg.COLOURS[6],
    Role.SPLIT: svg.COLOURS[4],
    Role.CONTROL: "#bbbbbb",
    Role.AGAIN: svg.COLOURS[5],
}
# Of several ways to overlap, one each.
_OVERLAPPED = (svg.COLOURS[0], svg.COLOURS[2], svg.COLOURS[3])


def draw(cases: Cases) -> str:
    """One group of bars for each workload, one bar for each mode; whiskers reach over all rounds.

    Above a bar stands how many times as fast as the best sequential mode it was.

    Args:
        cases: Modes by workload.
    """
    shown = {
        case: {name: one for name, one in modes.items() if one.role is not Role.ALONE}
        for case, modes in cases.items()
    }
    names = dict.fromkeys(name for modes in shown.values() for name in modes)
    roles = {name: one.role for modes in shown.values() for name, one in modes.items()}
    colours = _colours(roles)
    top = 1.1 * max(
        (_span(one)[1] for modes in shown.values() for one in modes.values()), default=1
    )
    widths = [_GAP + _BAR * len(modes) for modes in shown.values()]
    width = _LEFT + max(sum(widths), 300) + _RIGHT
    height = _TOP + _HEIGHT + _BOTTOM + _KEY_HEIGHT * len(names)
    parts = _axes(width, top)
    x = _LEFT
    for (case, modes), wide in zip(shown.items(), widths, strict=True):
        parts += _group(case, modes, colours, x=x, width=wide, top=top)
        x += wide
    return svg.page(width, height, [*parts, *_key(names, colours)])


def _colours(roles: Mapping[str, Role]) -> dict[str, str]:
    overlapped = [name for name, role in roles.items() if role is Role.OVERLAPPED]
    return {
        name: _OVERLAPPED[overlapped.index(name) % len(_OVERLAPPED)]
        if role is Role.OVERLAPPED
        else _COLOURS[role]
        for name, role in roles.items()
    }


def _span(one: Timed) -> tuple[float, float]:
    speeds = [timing.per_s for timing in one.rounds.values()]
    return min(speeds), max(speeds)


def _y(speed: float, top: float) -> float:
    return round(_TOP + _HEIGHT * (1 - speed / top), 1)


def _axes(width: int, top: float) -> list[str]:
    step = svg.tick(top)
    parts = [f'<text class="title" x="{_LEFT}" y="16">tokens/s, input and output</text>']
    for i in range(int(top / step) + 1):
        y = _y(i * step, top)
        parts.append(f'<path class="grid" d="M{_LEFT} {y}H{width - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 4}" y="{y + 3}" text-anchor="end">{i * step:,.6g}</text>')
    base = _y(0, top)
    return [*parts, f'<path class="axis" d="M{_LEFT} {_TOP}V{base}H{width - _RIGHT}"/>']


def _group(
    case: str,
    modes: Mapping[str, Timed],
    colours: Mapping[str, str],
    *,
    x: int,
    width: int,
    top: float,
) -> list[str]:
    best = ablation.best_sequential(modes)
    base, parts = _y(0, top), []
    for i, (name, one) in enumerate(modes.items()):
        left = x + _GAP // 2 + i * _BAR
        low, high = _span(one)
        y, middle = _y(one.per_s, top), left + _BAR // 2
        parts.append(
            f'<rect x="{left + 3}" y="{y}" width="{_BAR - 6}" height="{round(base - y, 1)}" '
            f'fill="{colours[name]}"/>'
        )
        parts.append(f'<path class="whisker" d="M{middle} {_y(low, top)}V{_y(high, top)}"/>')
        if best is not None and (found := ablation.ratios(one, modes[best])):
            ratio = statistics.median(found)
            above = _y(high, top) - 4
            parts.append(f'<text x="{middle}" y="{above}" text-anchor="middle">{ratio:.2f}</text>')
    middle = x + width // 2
    label = f'<text class="title" x="{middle}" y="{base + 16}" text-anchor="middle">'
    return [*parts, f"{label}{html.escape(case)}</text>"]


def _key(names: Sequence[str] | Mapping[str, None], colours: Mapping[str, str]) -> list[str]:
    parts, y = [], _TOP + _HEIGHT + _BOTTOM
    for name in names:
        parts.append(
            f'<rect x="{_LEFT}" y="{y - 9}" width="10" height="10" fill="{colours[name]}"/>'
            f'<text x="{_LEFT + 16}" y="{y}">{html.escape(name)}</text>'
        )
        y += _KEY_HEIGHT
    return parts
