"""A timeline of a plan as one HTML file that needs nothing else."""

import html
from collections.abc import Sequence

from nanoflow_jax.nanobatch.operations import Resource
from nanoflow_jax.overlap.timeline import Span

_COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#9c755f")
_WIDTH, _LANE, _BAR, _LEFT, _TOP = 1600, 56, 40, 90, 60


def draw(spans: Sequence[Span], *, title: str, first_layer: int, num_layers: int) -> str:
    """Bars of some layers, one lane for each resource; colours tell layers apart.

    Args:
        spans: Of all layers.
        title: Shown above.
        first_layer: The first to show.
        num_layers: How many to show.
    """
    shown = [s for s in spans if first_layer <= s.layer < first_layer + num_layers]
    begin, end = min(s.start_s for s in shown), max(s.end_s for s in shown)
    scale = (_WIDTH - _LEFT - 20) / (end - begin)
    lanes = [lane for lane in Resource if any(s.resource is lane for s in shown)]
    parts = [_text(_LEFT, 22, title, size=16)]
    for i, lane in enumerate(lanes):
        top = _TOP + i * _LANE
        parts.append(_text(8, top + _BAR / 2 + 5, lane.value, size=13))
        for span in (s for s in shown if s.resource is lane):
            parts.append(_bar(span, _LEFT + (span.start_s - begin) * scale, top, scale))
    height = _TOP + len(lanes) * _LANE + 30
    micro = (end - begin) * 1e6
    parts.append(_text(_LEFT, height - 10, f"0 us ... {micro:.0f} us, predicted", size=12))
    return (
        '<!doctype html><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title>"
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'font-family="sans-serif">{"".join(parts)}</svg>\n'
    )


def _bar(span: Span, left: float, top: float, scale: float) -> str:
    width = (span.end_s - span.start_s) * scale
    colour = _COLOURS[span.layer % len(_COLOURS)]
    micro = (span.end_s - span.start_s) * 1e6
    tip = f"layer {span.layer} {span.key}: {micro:.1f} us on {span.num_ctas} SMs"
    bar = (
        f'<g><title>{html.escape(tip)}</title><rect x="{left:.1f}" y="{top}" '
        f'width="{max(width, 0.5):.1f}" height="{_BAR}" fill="{colour}" stroke="white" '
        'stroke-width="0.5"/>'
    )
    label = span.key.replace("_attention", "")
    if width > 7 * len(label):
        bar += _text(left + 4, top + _BAR / 2 + 4, label, size=11, colour="white")
    return bar + "</g>"


def _text(x: float, y: float, text: str, *, size: int, colour: str = "#222") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}">'
        f"{html.escape(text)}</text>"
    )
