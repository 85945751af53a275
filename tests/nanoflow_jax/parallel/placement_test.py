import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoflow_jax.parallel import placement as placement_lib

_WIDTHS = placement_lib.ModelWidths(num_heads=8, num_kv_heads=2, intermediate_size=24)


def _placed(num_devices, widths=_WIDTHS, **options):
    return placement_lib.place(widths, jax.devices()[:num_devices], **options)


def _numbers(*shape):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


@pytest.mark.parametrize(
    ("axes", "split"),
    [
        ("VD", 0),
        ("KJHD", 0),
        ("DKGH", 1),
        ("2FD", 1),
        ("DF", 1),
        ("D", None),
        ("E2FD", 2),
        ("ED", None),
    ],
)
def test_heads_widths_and_the_vocabulary_are_split_and_nothing_else(axes, split):
    placed = _placed(2)
    shape = tuple(4 * (i + 1) for i in range(len(axes)))
    array = jax.device_put(np.zeros(shape), placed.sharding(axes))
    part = tuple(n // 2 if i == split else n for i, n in enumerate(shape))
    assert {shard.data.shape for shard in array.addressable_shards} == {part}


def test_experts_are_split_whole_where_that_is_asked_for_and_their_router_is_not():
    widths = placement_lib.ModelWidths(
        num_heads=8, num_kv_heads=2, intermediate_size=0, expert_size=9, num_experts=6
    )
    placed = _placed(2, widths, split_experts=True)
    assert placed.spec("E2FD") == jax.sharding.PartitionSpec("tensor", None, None, None)
    assert placed.spec("ED") == jax.sharding.PartitionSpec(None, None)
    assert placed.spec("2FD") == jax.sharding.PartitionSpec(None, "tensor", None)
    with pytest.raises(ValueError, match="intermediate_size of an expert=9 cannot be shared out"):
        _placed(2, widths)


def test_weights_of_products_that_are_gathered_around_are_split_by_columns():
    placed = _placed(2).with_columns({"o"}, hidden_size=32)
    whole, split = None, "tensor"
    assert placed.spec("DKGH", "o") == jax.sharding.PartitionSpec(split, whole, whole, whole)
    assert placed.spec("DF", "down") == jax.sharding.PartitionSpec(whole, split)
    assert placed.spec("KJHD") == jax.sharding.PartitionSpec(split, whole, whole, whole)
    assert _placed(2).spec("DKGH", "o") == jax.sharding.PartitionSpec(whole, split, whole, whole)


def test_a_width_that_cannot_be_shared_out_is_refused_where_it_would_have_to_be():
    message = (
        "--tensor_parallel=2: hidden_size=33 cannot be shared out evenly, as a plan wants for down "
        "and o; take its way 'reduce'"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        _placed(2).with_columns({"o", "down"}, hidden_size=33)
    assert _placed(2).with_columns((), hidden_size=33) == _placed(2)


def test_an_array_is_never_split_twice():
    with pytest.raises(AssertionError, match="axes KF would be split twice"):
        _placed(2).spec("KF")


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_a_kv_head_is_repeated_where_devices_outnumber_them(kind):
    K, G, H, D = 2, 4, 3, 5
    placed = _placed(4)
    assert placed.kv_copies == 2
    qkv = _numbers(K, G + 2, H, D)
    laid = placed.lay_out(kind(qkv), "KJHD")
    assert isinstance(laid, type(kind(qkv)))
    assert laid.shape == (4, 2 + 2, H, D)
    for device in range(4):
        head, half = divmod(device, 2)
        np.testing.assert_array_equal(laid[device, :2], qkv[head, 2 * half : 2 * half + 2])
        np.testing.assert_array_equal(laid[device, 2:], qkv[head, G:])
    bias = placed.lay_out(kind(qkv[..., 0]), "KJH")
    np.testing.assert_array_equal(bias, laid[..., 0])
    o = _numbers(D, K, G, H)
    np.testing.assert_array_equal(placed.lay_out(kind(o), "DKGH"), o.reshape(D, 4, 2, H))


@given(num_devices=st.sampled_from([1, 2, 4, 8]), size=st.integers(1, 40))
def test_the_vocabulary_is_padded_with_zeros_to_equal_shares(num_devices, size):
    whole = _numbers(size, 3) + 1
    laid = _placed(
        num_devices, placement_lib.ModelWidths(num_heads=8, num_kv_heads=8, intermediate_size=8)
    ).lay_out(whole, "VD")
    assert laid.shape[0] % num_devices == 0
    assert laid.shape[0] - size < num_devices
    np.testing.assert_array_equal(laid[:size], whole)
    assert not laid[size:].any()


@pytest.mark.parametrize("axes", ["KJHD", "DKGH", "2FD", "DF", "D", "VD"])
def test_one_device_holds_weights_as_they_are(axes):
    whole = _numbers(*(2 + i for i in range(len(axes))))
    assert (
        _placed(1).lay_out(whole, axes) is whole or (_placed(1).lay_out(whole, axes) == whole).all()
    )


@pytest.mark.parametrize(
    ("widths", "count", "message"),
    [
        (
            _WIDTHS,
            3,
            "--tensor_parallel=3: 2 kv heads of 4 queries each cannot be shared out evenly; fewer "
            "devices that would do: 1, 2",
        ),
        (
            placement_lib.ModelWidths(num_heads=2, num_kv_heads=2, intermediate_size=8),
            4,
            "--tensor_parallel=4: 2 kv heads of 1 queries each cannot be shared out evenly; fewer "
            "devices that would do: 1, 2",
        ),
        (
            placement_lib.ModelWidths(num_heads=8, num_kv_heads=4, intermediate_size=22),
            4,
            "--tensor_parallel=4: intermediate_size=22 cannot be shared out evenly; fewer devices "
            "that would do: 1, 2",
        ),
    ],
)
def test_a_model_that_cannot_be_shared_out_is_refused_with_what_would_do(widths, count, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        _placed(count, widths)
