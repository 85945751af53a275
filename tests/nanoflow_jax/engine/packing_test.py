import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nanoflow_jax.engine import packing
from nanoflow_jax.engine.packing import Field

_DTYPES = (np.int32, np.uint32, np.float32)


@st.composite
def _arrays(draw):
    shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
    kinds = st.sampled_from(_DTYPES)
    return [
        draw(hnp.arrays(draw(kinds), draw(shapes), elements=None))
        for _ in range(draw(st.integers(1, 3)))
    ]


@hypothesis.given(arrays=_arrays())
@hypothesis.settings(max_examples=8)
def test_what_is_packed_on_the_host_is_unpacked_on_the_device_bit_by_bit(arrays):
    fields = {str(i): Field(shape=a.shape, dtype=a.dtype.type) for i, a in enumerate(arrays)}
    pack = packing.Packing(fields)
    vector, views = pack.new()
    assert (vector.dtype, vector.shape) == (np.int32, (pack.size,))
    for i, array in enumerate(arrays):
        views[str(i)][...] = array
    unpacked = pack.unpack(jnp.asarray(vector))
    for i, array in enumerate(arrays):
        found = np.asarray(unpacked[str(i)])
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        assert found.tobytes() == array.tobytes()


def test_positions_that_nobody_sets_hold_their_fill():
    pack = packing.Packing(
        {
            "slots": Field(shape=(3,), fill=7),
            "top_p": Field(shape=(2,), dtype=np.float32, fill=1.0),
            "flag": Field(shape=()),
        }
    )
    vector, views = pack.new()
    views["slots"][1] = 2
    arrays = jax.jit(pack.unpack)(vector)
    np.testing.assert_array_equal(arrays["slots"], [7, 2, 7])
    np.testing.assert_array_equal(arrays["top_p"], np.ones(2, np.float32))
    assert arrays["flag"] == 0


def test_the_vector_worked_by_hand():
    pack = packing.Packing(
        {"a": Field(shape=(2,)), "b": Field(shape=(1, 2), dtype=np.float32, fill=-2.0)}
    )
    vector, views = pack.new()
    views["a"][:] = 5, 6
    views["b"][0, 0] = 1.0
    assert vector.tolist() == [5, 6, 0x3F800000, 0xC0000000 - 2**32]


def test_every_vector_is_fresh():
    pack = packing.Packing({"a": Field(shape=(2,))})
    first, views = pack.new()
    views["a"][:] = 9
    second, _ = pack.new()
    assert not np.shares_memory(first, second)
    assert second.tolist() == [0, 0]


@pytest.mark.parametrize(
    "value",
    [jnp.asarray([1.5, -0.0]), jnp.asarray([3, 4], jnp.int32), jnp.asarray([7], jnp.uint32)],
)
def test_bits_are_those_of_the_value(value):
    bits = packing.as_bits(value)
    assert bits.dtype == jnp.int32
    assert np.asarray(bits).tobytes() == np.asarray(value).tobytes()
