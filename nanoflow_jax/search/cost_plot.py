"""Draws where workloads sit: whether memory, the network or computing takes longest."""

import html
from collections.abc import Mapping

from nanoflow_jax.cost import serving
from nanoflow_jax.results import svg

_LEFT, _TOP, _SIZE, _RIGHT, _BOTTOM = 150, 70, 520, 60, 50
_ROW, _BAR = 46, 15
_FAINT = 0.45
_COLOURS = {"memory": svg.COLOURS[0], "network": svg.COLOURS[4]}
_TICKS = 6


def draw(costs: Mapping[str, serving.ServingCost], *, asked: str, title: str) -> str:
    """An SVG picture: for each workload, time of memory and network over that of computing.

    Args:
        costs: By the name of the workload, from top to bottom.
        asked: The one to point out.
        title: Shown above.
    """
    ratios = {
        name: {"memory": cost.memory_ratio, "network": cost.network_ratio}
        for name, cost in costs.items()
    }
    end = 1.1 * max(1.0, *(ratio for both in ratios.values() for ratio in both.values()))
    scale = _SIZE / end
    bottom = _TOP + _ROW * len(costs)
    width, height = _LEFT + _SIZE + _RIGHT, bottom + _BOTTOM
    parts = [
        f'<text class="title" x="{_LEFT}" y="22">{html.escape(title)}</text>',
        *_key(),
        *_axis(end, bottom, scale),
    ]
    for row, (name, both) in enumerate(ratios.items()):
        parts += _bars(name, both, _TOP + _ROW * row, scale, is_asked=name == asked)
    return svg.page(width, height, parts)


def _key() -> list[str]:
    parts = []
    for number, (name, colour) in enumerate(_COLOURS.items()):
        x = _LEFT + 90 * number
        parts += [
            f'<rect x="{x}" y="38" width="12" height="12" fill="{colour}"/>',
            _text(x + 18, 48, name),
        ]
    return parts


def _axis(end: float, bottom: float, scale: float) -> list[str]:
    step = svg.tick(end, most=_TICKS)
    parts = []
    for number in range(int(end / step) + 1):
        x = _LEFT + number * step * scale
        parts += [
            f'<path class="grid" d="M{x:.1f} {_TOP}V{bottom}"/>',
            _text(x, bottom + 16, f"{number * step:g}", anchor="middle"),
        ]
    one = _LEFT + scale
    return [
        *parts,
        f'<path class="whisker" stroke-dasharray="5 3" d="M{one:.1f} {_TOP - 6}V{bottom}"/>',
        _text(one, _TOP - 10, "computing", anchor="middle"),
        _text(_LEFT + _SIZE / 2, bottom + 36, "time, over that of computing", anchor="middle"),
    ]


def _bars(
    name: str, both: Mapping[str, float], top: float, scale: float, *, is_asked: bool
) -> list[str]:
    parts = [_text(_LEFT - 10, top + _ROW / 2 + 4, name, anchor="end", is_bold=is_asked)]
    for number, (resource, ratio) in enumerate(both.items()):
        y = top + 7 + number * (_BAR + 2)
        parts += [
            f'<rect x="{_LEFT}" y="{y}" width="{ratio * scale:.1f}" height="{_BAR}" '
            f'fill="{_COLOURS[resource]}" opacity="{1.0 if is_asked else _FAINT}"/>',
            _text(_LEFT + ratio * scale + 5, y + 12, f"{ratio:.2f}"),
        ]
    return parts


def _text(x: float, y: float, text: str, *, anchor: str = "start", is_bold: bool = False) -> str:
    weight = ' class="title"' if is_bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight}>{html.escape(text)}</text>'
    )
