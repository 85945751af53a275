"""Draws how fast a client must be for a share of the server's time to be saved."""

import html
import math
from collections.abc import Mapping, Sequence

from nanoflow_jax.results import svg

_LEFT, _TOP, _PLOT, _GAP = 60, 60, 190, 56
_FOOT = 40

# Least speed in laptops by round trip in ms and times of the server's own time; None: no speed.
Region = Mapping[float, Mapping[float, float | None]]


def draw(title: str, panels: Mapping[str, Region], *, fastest: float, slowest: float) -> str:
    """A panel for each server, kind of deadline and accounting; a line for each round trip.

    Above a line the share is saved. A line ends where no speed that was tried saves it.

    Args:
        title: What is drawn.
        panels: By what stands above them, in rows of as many as a line of text has.
        fastest: Of the speeds that were tried.
        slowest: The same.
    """
    columns = 4
    rows = math.ceil(len(panels) / columns)
    width = _LEFT + columns * (_PLOT + _GAP)
    height = _TOP + rows * (_PLOT + _GAP + 10) + _FOOT
    parts = [_text(_LEFT, 18, title, kind="title")]
    for number, (name, region) in enumerate(panels.items()):
        x = _LEFT + number % columns * (_PLOT + _GAP)
        y = _TOP + number // columns * (_PLOT + _GAP + 10)
        parts += _panel(x, y, name, region, fastest=fastest, slowest=slowest)
    rtts = dict.fromkeys(rtt for region in panels.values() for rtt in region)
    for number, rtt in enumerate(rtts):
        x = _LEFT + 150 * number
        colour = svg.COLOURS[number]
        parts.append(f'<rect x="{x}" y="{height - 24}" width="10" height="10" fill="{colour}"/>')
        parts.append(_text(x + 14, height - 15, f"round trip {rtt:g} ms"))
    return svg.page(width, height, parts)


def _text(x: float, y: float, text: str, *, anchor: str = "start", kind: str = "") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{html.escape(text)}</text>'


def _panel(
    left: float, top: float, name: str, region: Region, *, fastest: float, slowest: float
) -> list[str]:
    slacks = list(dict.fromkeys(slack for line in region.values() for slack in line))
    reach = math.log2(fastest / slowest)

    def x(slack: float) -> float:
        return left + slacks.index(slack) / max(1, len(slacks) - 1) * _PLOT

    def y(speed: float) -> float:
        return top + _PLOT - math.log2(speed / slowest) / reach * _PLOT

    parts = [_text(left, top - 8, name, kind="title")]
    for speed in _powers(slowest, fastest):
        parts.append(f'<path class="grid" d="M{left} {y(speed):.1f}H{left + _PLOT}"/>')
        parts.append(_text(left - 5, y(speed) + 3, f"{speed:g}", anchor="end"))
    for slack in slacks:
        parts.append(_text(x(slack), top + _PLOT + 13, f"{slack:g}x", anchor="middle"))
    parts.append(f'<path class="axis" d="M{left} {top}V{top + _PLOT}H{left + _PLOT}"/>')
    for number, line in enumerate(region.values()):
        colour = svg.COLOURS[number]
        places = [(x(slack), y(speed)) for slack, speed in line.items() if speed is not None]
        path = "L".join(f"{one:.1f} {other:.1f}" for one, other in places)
        if path:
            parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts += [
            f'<circle cx="{one:.1f}" cy="{other:.1f}" r="2.5" fill="{colour}"/>'
            for one, other in places
        ]
    return parts


def _powers(slowest: float, fastest: float) -> Sequence[float]:
    low, high = math.ceil(math.log2(slowest)), math.floor(math.log2(fastest))
    return [2.0**power for power in range(low, high + 1)]
