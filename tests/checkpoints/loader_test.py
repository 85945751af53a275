import os
from collections.abc import Callable
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from checkpoints import loader
from checkpoints.errors import CheckpointError
from checkpoints.folder import ModelFolder

Make = Callable[..., Path]
_ONE = SingleDeviceSharding(jax.devices()[0])


def _mesh() -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("x", "y"))


_SPECS = [
    PartitionSpec(),
    PartitionSpec("x"),
    PartitionSpec(None, "y"),
    PartitionSpec("y", "x"),
    PartitionSpec(("x", "y"), None),
]


@given(
    spec=st.sampled_from(_SPECS),
    dtype=st.sampled_from([np.float32, ml_dtypes.bfloat16]),
    stored=st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]),
    rows=st.integers(1, 3),
)
def test_every_sharding_holds_the_tensor_and_reads_each_part_once(
    spec: PartitionSpec, dtype: np.dtype, stored: np.dtype, rows: int
) -> None:
    tensor = np.arange(rows * 64, dtype=np.float32).reshape(rows * 8, 8).astype(stored)
    sharding = NamedSharding(_mesh(), spec)
    read: list[tuple[slice, ...]] = []

    def part(index: tuple[slice, ...]) -> np.ndarray:
        read.append(index)
        return tensor[index]

    placed = loader.place(tensor.shape, np.dtype(dtype), sharding, part)
    assert placed.sharding == sharding
    assert placed.dtype == dtype
    np.testing.assert_array_equal(np.asarray(placed), tensor.astype(dtype))
    for shard in placed.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), tensor[shard.index].astype(dtype))
    wanted = {
        tuple(s.indices(n)[:2] for s, n in zip(index, tensor.shape, strict=True))
        for index in sharding.addressable_devices_indices_map(tensor.shape).values()
    }
    assert sorted(tuple((s.start, s.stop) for s in index) for index in read) == sorted(wanted)


def test_two_devices_read_the_halves_they_hold_and_no_more() -> None:
    tensor = np.arange(8, dtype=np.float32).reshape(2, 4)
    read = []

    def part(index: tuple[slice, ...]) -> np.ndarray:
        read.append(index)
        return tensor[index]

    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    loader.place((2, 4), np.dtype(np.float32), NamedSharding(mesh, PartitionSpec(None, "x")), part)
    assert read == [(slice(0, 2), slice(0, 2)), (slice(0, 2), slice(2, 4))]


@pytest.mark.parametrize("shape", [(), (0, 3), (5,)])
def test_scalars_empty_and_one_axis_tensors_are_placed(shape: tuple[int, ...]) -> None:
    tensor = np.full(shape, 2.0, np.float32)
    placed = loader.place(shape, tensor.dtype, _ONE, lambda index: tensor[index])
    np.testing.assert_array_equal(np.asarray(placed), tensor)


def test_a_placed_tensor_outlives_its_file(make_model: Make) -> None:
    # One megabyte, first in the file and so at a multiple of 64, is what XLA:CPU would alias.
    tensor = np.ones(1 << 18, np.float32)
    path = make_model({"a": tensor})
    folder = ModelFolder.open(path)
    assert folder.read("a").ctypes.data % 64 == 0
    placed = loader.place(
        tensor.shape, tensor.dtype, _ONE, lambda index: folder.read_slice("a", index)
    )
    with open(path / "model.safetensors", "r+b") as file:
        file.seek(folder.tensors["a"].start)
        file.write(bytes(tensor.nbytes))
    assert folder.read("a").sum() == 0  # The mapping sees the change,
    assert np.asarray(placed).sum() == tensor.size  # the placed tensor does not,
    os.truncate(path / "model.safetensors", 0)
    assert np.asarray(placed).sum() == tensor.size  # and needs the file no more.


def test_a_sharded_model_folder_is_placed_with_only_its_parts_read(make_model: Make) -> None:
    tensor = np.arange(8 * 16).reshape(8, 16).astype(ml_dtypes.bfloat16)
    folder = ModelFolder.open(make_model({"a": tensor, "b": tensor}, shards=2))
    sharding = NamedSharding(_mesh(), PartitionSpec("x", "y"))
    sizes = []

    def part(index: tuple[slice, ...]) -> np.ndarray:
        sizes.append(folder.read_slice("a", index).shape)
        return folder.read_slice("a", index)

    placed = loader.place((8, 16), np.dtype(np.float32), sharding, part)
    assert sizes == [(4, 4)] * 8
    np.testing.assert_array_equal(np.asarray(placed), tensor.astype(np.float32))


def test_a_part_of_the_wrong_shape_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"part of shape \[3\] at \[\(0, 3\)\], got \[4\]"):
        loader.place((3,), np.dtype(np.float32), _ONE, lambda index: np.zeros(4, np.float32))


@pytest.mark.parametrize(
    ("stored", "dtype"), [(np.int8, np.float32), (np.float32, np.int32), (np.int64, np.int32)]
)
def test_a_cast_that_changes_the_meaning_is_refused(stored: type, dtype: type) -> None:
    with pytest.raises(CheckpointError, match=r"wanted .*, got .*, and only floating types"):
        loader.place((3,), np.dtype(dtype), _ONE, lambda index: np.zeros(3, stored))


def test_whole_numbers_are_placed_as_they_are() -> None:
    tensor = np.array([-1, 5], np.int32)
    placed = loader.place((2,), tensor.dtype, _ONE, lambda index: tensor[index])
    np.testing.assert_array_equal(np.asarray(placed), tensor)


def test_a_dtype_that_jax_would_narrow_is_refused() -> None:
    with pytest.raises(CheckpointError, match="float64 cannot be held unless jax_enable_x64"):
        loader.place((3,), np.dtype(np.float64), _ONE, lambda index: np.zeros(3))
