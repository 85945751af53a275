import pictures
import pytest

from nanoflow_jax.cost.timeline import Span
from nanoflow_jax.nanobatch.operations import Resource
from nanoflow_jax.results import gantt

_SPANS = tuple(
    Span(
        layer=layer,
        key=f"{name}.0",
        resource=resource,
        num_ctas=ctas,
        start_s=layer * 1e-4,
        end_s=(layer + 1) * 1e-4,
    )
    for layer in range(4)
    for name, resource, ctas in (
        ("up_gate", Resource.COMPUTE, 99),
        ("decode_attention", Resource.MEMORY, 33),
    )
)


def _draw(**changes):
    asked = {"title": "a < b", "first_layer": 1, "num_layers": 2, "num_sms": 132} | changes
    return pictures.parse(gantt.draw(_SPANS, **asked))


def test_each_nano_operation_of_the_layers_shown_has_a_bar_that_says_what_it_is():
    tips = pictures.texts(_draw(), "title")
    assert sorted(tips) == sorted(
        f"layer {layer} {key}: 100.0 us on {ctas} SMs"
        for layer in (1, 2)
        for key, ctas in (("up_gate.0", 99), ("decode_attention.0", 33))
    )


def test_a_bar_is_as_high_as_its_share_of_the_sms_and_as_wide_as_its_time():
    heights = [float(bar.get("height")) for bar in pictures.bars(_draw())]
    assert heights == pytest.approx([54, 54, 18, 18])  # of 72 pixels: 99 and 33 of 132 SMs
    widths = {bar.get("width") for bar in pictures.bars(_draw())}
    assert widths == {"745.0"}


def test_titles_are_escaped_and_lanes_have_names():
    words = pictures.texts(_draw(), "text")
    assert {"a < b", "compute", "memory", "up_gate.0", "decode.0"} <= set(words)
    assert "network" not in words
