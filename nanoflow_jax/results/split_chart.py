"""Draws what sharing layers adds to a step, and what it takes from a server."""

import html
import statistics
from collections.abc import Iterator, Sequence

from nanoflow_jax.results import split, svg
from nanoflow_jax.results.split import Load, Pairs, Sample, Step

_WIDTH, _LEFT, _RIGHT = 820, 250, 150
_INNER = _WIDTH - _LEFT - _RIGHT
_TOP, _ROW, _BAR = 34, 26, 16
_GAP = 40
_PARTS = {
    "a step in one process": svg.COLOURS[6],
    "the link's round trip": svg.COLOURS[4],
    "added beside it": svg.COLOURS[0],
}
_SHARES = (svg.COLOURS[0], svg.COLOURS[5], svg.COLOURS[2])  # in the order of split.SHARES


def draw(samples: Sequence[Sample]) -> str:
    """One bar for each cut, and three for each crowd of requests.

    Args:
        samples: Of one result, both modes of each round.

    Raises:
        ValueError: A round has only one of its modes.
    """
    parts, height = _steps(split.step_pairs(samples), _TOP)
    more, height = _loads(split.load_pairs(samples), height)
    return svg.page(_WIDTH, int(height), [*parts, *more])


def _text(x: float, y: float, text: str, *, anchor: str = "start", kind: str = "") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{html.escape(text)}</text>'


def _rect(x: float, y: float, width: float, height: float, colour: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{height}" '
        f'fill="{colour}"/>'
    )


def _key(colours: dict[str, str], y: float) -> Iterator[str]:
    for number, (name, colour) in enumerate(colours.items()):
        x = _LEFT + 165 * number
        yield _rect(x, y - 9, 10, 10, colour)
        yield _text(x + 14, y, name)


def _across(top: float, y: float, rows: int, unit: str) -> Iterator[str]:
    """Lines down through the rows, with their numbers below."""
    step, bottom = svg.tick(top), y + rows * _ROW
    for number in range(int(top / step) + 1):
        x = _LEFT + number * step / top * _INNER
        yield f'<path class="grid" d="M{x:.1f} {y}V{bottom}"/>'
        yield _text(
            x, bottom + 12, f"{number * step:g}{unit if number == 0 else ''}", anchor="middle"
        )


def _steps(cases: Pairs[Step], y: float) -> tuple[list[str], float]:
    """Bars of medians; a mark stands where the goal is."""
    if not cases:
        return [], y
    rows: list[tuple[str, list[float], float, float]] = []
    for case, taken in cases.items():
        single = statistics.median(one.step_s for one, _ in taken) * 1e3
        rtt = statistics.median(one.rtt_s for _, one in taken) * 1e3
        added = statistics.median(two.step_s - one.step_s for one, two in taken) * 1e3
        goal = single + rtt + split.MOST_ADDED_S * 1e3
        rows.append((case, [single, min(rtt, max(added, 0.0)), max(added - rtt, 0.0)], added, goal))
    top = 1.1 * max(max(sum(parts), goal) for _, parts, _, goal in rows)
    title = "time of a decode step, ms; the mark is one process, the round trip and 1 ms"
    drawn = [_text(_LEFT, y - 16, title, kind="title"), *_across(top, y, len(rows), " ms")]
    for case, parts, added, goal in rows:
        drawn.append(_text(_LEFT - 8, y + _BAR, case, anchor="end"))
        x = float(_LEFT)
        for colour, value in zip(_PARTS.values(), parts, strict=True):
            drawn.append(_rect(x, y + 4, value / top * _INNER, _BAR, colour))
            x += value / top * _INNER
        at = _LEFT + goal / top * _INNER
        drawn.append(f'<path class="whisker" d="M{at:.1f} {y + 1}V{y + _BAR + 7}"/>')
        drawn.append(_text(_WIDTH - _RIGHT + 8, y + _BAR, f"{added:+.2f} ms"))
        y += _ROW
    return [*drawn, *_key(_PARTS, y + 28)], y + 28 + _GAP + 16


def _loads(cases: Pairs[Load], y: float) -> tuple[list[str], float]:
    """Bars of shares of what a server alone takes or gives."""
    if not cases:
        return [], y
    rows: list[tuple[str, list[float], str]] = []
    for case, taken in cases.items():
        shares = [
            statistics.median(share(*pair) for pair in taken) for share in split.SHARES.values()
        ]
        met = [100 * statistics.median(pair[i].met_fraction for pair in taken) for i in (0, 1)]
        rows.append((case, shares, f"in time {met[0]:.0f} %, {met[1]:.0f} %"))
    top = 1.1 * max(1.0, *(max(shares) for _, shares, _ in rows))
    count = len(rows) * (len(_SHARES) + 1)
    title = "layers shared, of what a server alone takes and gives"
    drawn = [_text(_LEFT, y - 16, title, kind="title"), *_across(top, y, count, "")]
    for case, shares, words in rows:
        drawn.append(_text(8, y + _BAR, case, kind="title"))
        drawn.append(_text(_WIDTH - _RIGHT + 8, y + _BAR, words))
        y += _ROW
        for (name, colour), share in zip(
            zip(split.SHARES, _SHARES, strict=True), shares, strict=True
        ):
            drawn.append(_text(_LEFT - 8, y + _BAR, name, anchor="end"))
            drawn.append(_rect(_LEFT, y + 4, share / top * _INNER, _BAR, colour))
            drawn.append(_text(_LEFT + share / top * _INNER + 5, y + _BAR, f"{share:.2f}"))
            y += _ROW
    return drawn, y + 24
