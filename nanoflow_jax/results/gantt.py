"""A plan in time: bars in one lane for each resource, as high as their share of the SMs."""

import html
from collections.abc import Sequence

from nanoflow_jax.cost.timeline import Span
from nanoflow_jax.nanobatch.operations import Resource
from nanoflow_jax.results import svg

_WIDTH, _LANE, _BAR, _LEFT, _TOP, _RIGHT, _BOTTOM = 1600, 84, 72, 90, 44, 20, 40
# A bar too low to see or to write on would be of no use.
_LEAST_HEIGHT = 14


def draw(
    spans: Sequence[Span], *, title: str, first_layer: int, num_layers: int, num_sms: int
) -> str:
    """An SVG picture of some layers; colours tell layers apart.

    Args:
        spans: Of all layers.
        title: Shown above.
        first_layer: The first to show.
        num_layers: How many to show.
        num_sms: Of the device: a bar of so many fills its lane.
    """
    shown = [s for s in spans if first_layer <= s.layer < first_layer + num_layers]
    begin, end = min(s.start_s for s in shown), max(s.end_s for s in shown)
    scale = (_WIDTH - _LEFT - _RIGHT) / (end - begin)
    lanes = [lane for lane in Resource if any(s.resource is lane for s in shown)]
    parts = [f'<text class="title" x="{_LEFT}" y="22">{html.escape(title)}</text>']
    for i, lane in enumerate(lanes):
        base = _TOP + i * _LANE + _BAR
        parts.append(f'<text x="8" y="{base - _BAR // 2}">{lane.value}</text>')
        parts.append(f'<path class="axis" d="M{_LEFT} {base}H{_WIDTH - _RIGHT}"/>')
        for span in (s for s in shown if s.resource is lane):
            left = _LEFT + (span.start_s - begin) * scale
            parts.append(_bar(span, left, base, scale, num_sms=num_sms))
    base = _TOP + len(lanes) * _LANE
    parts += _time_axis((end - begin) * 1e6, base, scale / 1e6)
    return svg.page(_WIDTH, base + _BOTTOM, parts)


def _bar(span: Span, left: float, base: int, scale: float, *, num_sms: int) -> str:
    seconds = span.end_s - span.start_s
    width = max(seconds * scale, 0.5)
    height = max(_BAR * span.num_ctas / num_sms, _LEAST_HEIGHT)
    colour = svg.COLOURS[span.layer % len(svg.COLOURS)]
    tip = f"layer {span.layer} {span.key}: {seconds * 1e6:.1f} us on {span.num_ctas} SMs"
    bar = (
        f'<g><title>{html.escape(tip)}</title><rect x="{left:.1f}" y="{base - height:.1f}" '
        f'width="{width:.1f}" height="{height:.1f}" fill="{colour}" stroke="#fff" '
        'stroke-width="0.5"/>'
    )
    label = span.key.replace("_attention", "")
    if width > 6 * len(label):
        bar += (
            f'<text x="{left + 4:.1f}" y="{base - height / 2 + 4:.1f}" style="fill:#fff">'
            f"{html.escape(label)}</text>"
        )
    return bar + "</g>"


def _time_axis(micro: float, base: int, scale: float) -> list[str]:
    """Marks in microseconds under the lanes."""
    step, parts = svg.tick(micro, most=12), []
    for number in range(int(micro / step) + 1):
        x = _LEFT + number * step * scale
        parts.append(
            f'<path class="grid" d="M{x:.1f} {_TOP}V{base}"/>'
            f'<text x="{x:.1f}" y="{base + 14}" text-anchor="middle">{number * step:g}</text>'
        )
    label = "us, predicted; the height of a bar is its share of the SMs"
    return [*parts, f'<text x="{_LEFT}" y="{base + 30}">{label}</text>']
