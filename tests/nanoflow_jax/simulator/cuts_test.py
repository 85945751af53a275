"""Nano-batches as NanoFlow has them."""

import pytest

from nanoflow_jax.simulator import cuts


@pytest.mark.parametrize(
    ("tokens", "halves", "quarters"),
    [
        (2048, (768, 1280), (384, 384, 640, 640)),
        (1024, (384, 640), (256, 128, 384, 256)),
        (768, (384, 384), (256, 128, 256, 128)),
        (256, (128, 128), (128, 128)),
        (128, (128,), (128,)),
        (1, (1,), (1,)),
        (200, (128, 72), (128, 72)),
    ],
)
def test_a_batch_is_cut_after_three_eighths_at_a_multiple_of_128(tokens, halves, quarters):
    assert cuts.halves(tokens) == halves
    assert cuts.quarters(tokens) == quarters
