import jax
import numpy as np
import pytest

from nanoflow_jax.parallel import mesh as mesh_lib


def test_a_mesh_has_one_axis_over_its_devices():
    devices = jax.devices()[:4]
    built = mesh_lib.build_mesh(devices)
    assert built.axis_names == ("tensor",)
    assert list(built.devices) == devices


@pytest.mark.parametrize(
    ("axes", "split"), [("VD", None), ("KJHD", 0), ("DKGH", 1), ("2FD", 1), ("DF", 1), ("D", None)]
)
def test_kv_heads_and_feed_forward_widths_are_split_and_nothing_else(axes, split):
    sharding = mesh_lib.sharding_of(mesh_lib.build_mesh(jax.devices()[:4]), axes)
    shape = tuple(4 * (i + 1) for i in range(len(axes)))
    array = jax.device_put(np.zeros(shape), sharding)
    part = tuple(n // 4 if i == split else n for i, n in enumerate(shape))
    assert {shard.data.shape for shard in array.addressable_shards} == {part}


def test_an_array_is_never_split_twice():
    with pytest.raises(AssertionError, match="axes KF would be split twice"):
        mesh_lib.sharding_of(mesh_lib.build_mesh(jax.devices()[:2]), "KF")
