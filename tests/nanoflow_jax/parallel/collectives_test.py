import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from nanoflow_jax.parallel import collectives, mesh

_SPLIT, _WHOLE = PartitionSpec(None, mesh.AXIS), PartitionSpec()
_ROWS = PartitionSpec(mesh.AXIS)


def _run(function, num_devices, x, in_specs, out_specs, **options):
    built = mesh.build_mesh(jax.devices()[:num_devices])
    group = collectives.Group(num_devices=num_devices, **options)
    each = collectives.on_each(
        lambda x: function(group, x), built, in_specs=in_specs, out_specs=out_specs
    )
    return np.asarray(jax.jit(each)(x))


@pytest.fixture
def x():
    return np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)


@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_columns_that_become_rows_and_are_gathered_are_the_whole_again(num_devices, x):
    def there_and_back(group, columns):
        rows = group.columns_to_rows(columns)
        assert rows.shape == (8 // num_devices, 16)
        return group.all_rows(rows)

    np.testing.assert_array_equal(_run(there_and_back, num_devices, x, (_SPLIT,), _WHOLE), x)


@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_columns_that_are_gathered_are_the_whole_again_whatever_is_in_them(num_devices, x):
    for whole in (x, x.reshape(4, 8, 4)):
        found = _run(
            lambda group, share: group.all_columns(share), num_devices, whole, (_SPLIT,), _WHOLE
        )
        np.testing.assert_array_equal(found, whole)


@pytest.mark.parametrize("num_devices", [1, 2, 8])
def test_own_rows_are_those_that_columns_became(num_devices, x):
    def both(group, x):
        return group.own_rows(x)

    np.testing.assert_array_equal(_run(both, num_devices, x, (_WHOLE,), _ROWS), x)


@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_a_sum_is_that_of_all_devices(num_devices, x):
    found = _run(lambda group, x: group.sum(x.sum(axis=1)), num_devices, x, (_SPLIT,), _WHOLE)
    np.testing.assert_allclose(found, x.sum(axis=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_devices", [1, 2, 4])
@pytest.mark.parametrize("num_rows", [1, 6, 8])
def test_a_sum_in_order_adds_the_first_device_first_whatever_the_row(num_devices, num_rows, x):
    shares = np.tile(x[:1, :, None], (num_rows, 1, 1))  # [rows, 16, 1], the same in each row
    found = _run(
        lambda group, x: group.sum(x.sum(axis=1)),
        num_devices,
        shares,
        (_SPLIT,),
        _WHOLE,
        adds_in_order=True,
    )
    assert found.shape == (num_rows, 1)
    parts = [_sum_of(part) for part in np.split(shares, num_devices, axis=1)]
    wanted = parts[0]
    for part in parts[1:]:
        wanted = wanted + part
    np.testing.assert_array_equal(found, wanted)


def _sum_of(part):
    return np.asarray(jax.jit(lambda x: x.sum(axis=1))(part))


def test_a_sum_in_order_is_rounded_once():
    # In bfloat16 256 + 1 is 256 again; in float32 four of them are 260.
    x = jnp.asarray([[256, 1, 1, 2]], jnp.bfloat16)
    found = _run(lambda group, x: group.sum(x[:, 0]), 4, x, (_SPLIT,), _WHOLE, adds_in_order=True)
    assert found.astype(np.float32).tolist() == [260.0]


def test_each_device_knows_its_place(x):
    found = _run(lambda group, x: group.index()[None], 4, x, (_WHOLE,), _ROWS)
    np.testing.assert_array_equal(found, np.arange(4))
