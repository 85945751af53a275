"""Draws where a request's nodes run, where its time goes, and what deadlines cost."""

import html
from collections.abc import Sequence

from nanoflow_jax.results import svg
from nanoflow_jax.split.planning import report
from nanoflow_jax.split.planning.asked import Side
from nanoflow_jax.split.planning.planner import FrontierPoint, Parts, Plan, Stretch, Verdict

_WIDTH, _LEFT, _RIGHT = 760, 90, 20
_INNER = _WIDTH - _LEFT - _RIGHT
_BAR, _ROW = 20, 30
_CURVE = 180
_SIDES = {Side.CLIENT: svg.COLOURS[2], Side.SERVER: svg.COLOURS[0]}
# In the order in which they are drawn, whatever theirs in a step.
_PARTS = {
    "client": svg.COLOURS[2],
    "up": svg.COLOURS[4],
    "server": svg.COLOURS[0],
    "down": svg.COLOURS[1],
    "moving": svg.COLOURS[3],
}


def draw(asked: report.Question, verdict: Verdict, points: Sequence[FrontierPoint]) -> str:
    """An SVG picture.

    Args:
        asked: The question, whose title stands above.
        verdict: Its answer.
        points: Of the frontier.
    """
    parts = [
        f'<text class="title" x="{_LEFT}" y="16">{html.escape(report.title(asked))}</text>',
        _text(_LEFT, 32, f"{verdict.kind}: {verdict.reason}"),
    ]
    top = 48
    if verdict.plan is not None:
        parts += _plan(asked, verdict.plan, top)
        top += 4 * _ROW + 28
    if points:
        parts += _frontier(asked, points, top)
    return svg.page(_WIDTH, top + _CURVE + 50, parts)


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _rect(x: float, y: float, width: float, colour: str, tip: str) -> str:
    return (
        f'<g><title>{html.escape(tip)}</title><rect x="{x:.1f}" y="{y:.1f}" '
        f'width="{max(width, 0.5):.1f}" height="{_BAR}" fill="{colour}" stroke="#fff"/></g>'
    )


def _plan(asked: report.Question, plan: Plan, top: float) -> list[str]:
    parts = []
    for name, stretches in (("prefill", plan.prefill), ("decode", plan.decode)):
        parts += _placed(asked, name, stretches, top)
        top += _ROW
    for name, times in (("first token", plan.first_token), ("each further", plan.step)):
        parts += _times(name, times, top)
        top += _ROW
    for number, (name, colour) in enumerate(_PARTS.items()):
        x = _LEFT + 90 * number
        parts.append(f'<rect x="{x}" y="{top}" width="10" height="10" fill="{colour}"/>')
        parts.append(_text(x + 14, top + 9, name))
    return parts


def _placed(
    asked: report.Question, name: str, stretches: Sequence[Stretch], top: float
) -> list[str]:
    scale = _INNER / len(asked.model.nodes)
    parts = [_text(_LEFT - 8, top + 14, name, "end")]
    for one in stretches:
        tip = f"{one.side.name.lower()}: {report.stretch_name(asked.model, one)}"
        width = (one.stop - one.start) * scale
        parts.append(_rect(_LEFT + one.start * scale, top, width, _SIDES[one.side], tip))
    return parts


def _times(name: str, times: Parts, top: float) -> list[str]:
    seconds = (times.client_s, times.up_s, times.server_s, times.down_s, times.moving_s)
    whole = sum(seconds)
    parts = [_text(_LEFT - 8, top + 14, name, "end")]
    x, room = float(_LEFT), _INNER - 90
    for (what, colour), one in zip(_PARTS.items(), seconds, strict=True):
        if one:
            width = one / whole * room
            parts.append(_rect(x, top, width, colour, f"{what}: {one * 1e3:.2f} ms"))
            x += width
    return [*parts, _text(x + 6, top + 14, f"{whole * 1e3:,.1f} ms")]


def _frontier(asked: report.Question, points: Sequence[FrontierPoint], top: float) -> list[str]:
    """Down means less of the server, right means longer deadlines: one step for each plan."""
    end = max(1.0, points[-1].stretch) * 1.05
    most = max(one.plan.charge_s for one in points) * 1e3 * 1.05 or 1.0
    base = top + _CURVE

    def x(stretch: float) -> float:
        return round(_LEFT + stretch / end * _INNER, 1)

    def y(charge_ms: float) -> float:
        return round(base - charge_ms / most * (_CURVE - 20), 1)

    parts = []
    for step, limit, is_across in ((svg.tick(most), most, False), (svg.tick(end), end, True)):
        for number in range(int(limit / step) + 1):
            value = number * step
            if is_across:
                parts.append(_text(x(value), base + 14, f"{value:g}", "middle"))
            else:
                parts.append(f'<path class="grid" d="M{_LEFT} {y(value)}H{_LEFT + _INNER}"/>')
                parts.append(_text(_LEFT - 8, y(value) + 3, f"{value:g}", "end"))
    corners = f"M{x(points[0].stretch)} {y(points[0].plan.charge_s * 1e3)}"
    for one in points[1:]:
        corners += f"H{x(one.stretch)}V{y(one.plan.charge_s * 1e3)}"
    parts.append(f'<path d="{corners}H{_LEFT + _INNER}" fill="none" stroke="{svg.COLOURS[0]}"/>')
    for one in points:
        tip = f"x {one.stretch:.2f}: {one.plan.charge_s * 1e3:.2f} ms, {one.kind}"
        parts.append(
            f'<g><title>{html.escape(tip)}</title><circle cx="{x(one.stretch)}" '
            f'cy="{y(one.plan.charge_s * 1e3)}" r="2.5" fill="{svg.COLOURS[0]}"/></g>'
        )
    has_deadline = report.has_deadline(asked.request)
    if has_deadline:
        parts.append(f'<path class="even" d="M{x(1)} {top}V{base}"/>')
    across = "times the deadlines" if has_deadline else "seconds of the whole answer"
    return [
        *parts,
        f'<path class="axis" d="M{_LEFT} {top}V{base}H{_LEFT + _INNER}"/>',
        _text(_LEFT + _INNER / 2, base + 30, across, "middle"),
        _text(_LEFT, top - 4, f"charged, ms ({asked.policy.accounting})"),
    ]
