"""What is fitted to one column of NanoFlow's figure 9, and what that says of all else it prints."""

import dataclasses

import pytest

from nanoflow_jax.cost import datasheets, serving, tiles
from nanoflow_jax.cost.nanoflow_figures import CALIBRATED_BY, FIGURE_9, TABLE_2
from nanoflow_jax.models import huggingface, presets
from nanoflow_jax.simulator import calibration
from nanoflow_jax.simulator.step_time import DATASHEET

_70B = huggingface.read_config(presets.load("llama-2-70b"))
_CLUSTER = serving.Cluster(accelerator=datasheets.accelerator("paper:a100-80g"), num_devices=8)
_EVEN = calibration.steady_work(CALIBRATED_BY, 2048)


def test_one_speed_of_tiles_explains_the_four_products_of_table_2_within_3_percent():
    grid = calibration.nanoflow_a100().grid
    for product in tiles.products(_70B, 8):
        seconds = grid.time(product, 2048, _CLUSTER.accelerator.memory_bytes_per_s).seconds
        assert seconds * 1e3 == pytest.approx(TABLE_2[product.name].measured, rel=0.03)
    # An SM computes no faster than its part of the datasheet.
    assert 0.9 < grid.sm_flops * grid.num_sms / _CLUSTER.accelerator.bf16_flops < 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequential": 9999}, r"operations alone take .* s and the whole step .* s; what they"),
        ({"split": 2000}, "neither cutting nor more work makes a step shorter"),
        ({"overlapped": 5000}, "what is reached of a datasheet is between 0 and 1"),
        ({"offloaded": 2000}, "neither cutting nor more work makes a step shorter"),
    ],
)
def test_throughputs_that_no_numbers_explain_are_refused(changes, message):
    measured = dataclasses.replace(FIGURE_9[CALIBRATED_BY], **changes)
    start = dataclasses.replace(
        calibration.nanoflow_a100(), other_passes=0.0, cut_s=0.0, offload_factor=1.0
    )
    with pytest.raises(ValueError, match=message):
        calibration.fit(start, _70B, _CLUSTER, _EVEN, measured)


def test_operations_without_a_grid_leave_nothing_idle_to_fit():
    with pytest.raises(ValueError, match="overlap uses nothing of a grid that leaves nothing idle"):
        calibration.fit(DATASHEET, _70B, _CLUSTER, _EVEN, FIGURE_9[CALIBRATED_BY])
