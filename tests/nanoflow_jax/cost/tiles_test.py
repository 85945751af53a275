"""Products in waves of tiles, against counts by hand."""

import pytest

from nanoflow_jax.cost import tiles
from nanoflow_jax.models import huggingface, presets

# 4 SMs that compute a tile of 2 x 2 over a depth of 8 in a second.
_GRID = tiles.Grid(num_sms=4, side=2, sm_flops=2 * 2 * 2 * 8)
_PRODUCT = tiles.Product(name="o", depth=8, columns=5, num_layers=3)


@pytest.mark.parametrize(
    ("rows", "waves", "num_tiles"), [(1, 1, 3), (2, 1, 3), (3, 2, 6), (8, 3, 12), (9, 4, 15)]
)
def test_a_product_takes_whole_waves_and_leaves_the_rest_of_the_last_idle(rows, waves, num_tiles):
    found = _GRID.time(_PRODUCT, rows, memory_bytes_per_s=1e9)
    assert found.seconds == 3 * waves
    assert found.idle_s == pytest.approx(3 * (waves - num_tiles / 4), abs=1e-6)


def test_nothing_takes_no_time():
    assert _GRID.time(_PRODUCT, 0, memory_bytes_per_s=1.0).seconds == 0


def test_a_product_takes_no_less_than_its_memory_and_is_not_idle_meanwhile():
    # 8 x 5 weights, one row of 8 in and 5 out, of two bytes.
    found = _GRID.time(_PRODUCT, 1, memory_bytes_per_s=10.0)
    assert found.seconds == pytest.approx(3 * 106 / 10)
    assert found.idle_s == 0


def test_devices_share_the_columns_of_all_but_the_last_product():
    config = huggingface.read_config(presets.load("llama-2-70b"))
    shapes = {one.name: (one.depth, one.columns) for one in tiles.products(config, 8)}
    assert shapes == {
        "kqv": (8192, 1280),
        "o": (8192, 1024),
        "up_gate": (8192, 7168),
        "down": (3584, 8192),
    }


def test_each_expert_that_is_touched_has_tiles_of_its_own():
    config = huggingface.read_config(presets.load("mixtral-8x7b"))
    (up_gate,) = (one for one in tiles.products(config, 1) if one.name == "up_gate")
    assert (up_gate.columns, up_gate.num_layers) == (2 * 14336, 32)
    grid = tiles.Grid(num_sms=1, side=128, sm_flops=2 * 128 * 128 * 4096)
    # 512 tokens go to two experts of eight each: 128 rows of every one.
    found = grid.time(up_gate, 512, memory_bytes_per_s=1e30)
    assert found.seconds == pytest.approx(32 * 8 * 224, rel=1e-3)
