import pytest

from nanoflow_jax.nanobatch import operations
from nanoflow_jax.search import candidates


def _covered(ranges):
    return sum(tokens.length for tokens in ranges)


@pytest.mark.parametrize("num_devices", [1, 8])
def test_every_way_covers_each_token_of_each_operation_once(num_devices):
    shape = operations.LayerShape(num_devices=num_devices)
    found = list(candidates.splits(shape, num_tokens=1024, granule=128, mixes_ways=True))
    assert len({name for name, _ in found}) == len(found)
    for _, split in found:
        for op in operations.layer_graph(shape).operations:
            if op.choice is None:
                assert _covered(split.ranges[op.name]) == 1024, op.name
        outputs = (split.ranges.get(name, ()) for name in ("o", "o_columns"))
        assert sum(map(_covered, outputs)) == 1024
        for ranges in split.ranges.values():
            assert all(tokens.start % 128 == 0 for tokens in ranges)


def test_ways_that_hold_a_weight_twice_are_left_out_unless_asked_for():
    shape = operations.LayerShape(num_devices=8)
    for mixes, wanted in ((False, False), (True, True)):
        found = candidates.splits(shape, num_tokens=1024, granule=128, mixes_ways=mixes)
        mixed = [split for _, split in found if {"o", "o_columns"} <= split.ranges.keys()]
        assert bool(mixed) is wanted


def test_a_batch_of_one_granule_has_no_way_of_splitting():
    assert not list(candidates.splits(operations.LayerShape(), num_tokens=128, granule=128))
