"""Bringing one tensor from a file into its sharding, each device reading only its own part."""

import collections
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from checkpoints.errors import CheckpointError

Index = tuple[slice, ...]


def place(
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    sharding: jax.sharding.Sharding,
    read: Callable[[Index], Shaped[np.ndarray, "..."]],
) -> Shaped[Array, "..."]:
    """Read a tensor part by part and put each part on the devices that hold it.

    Takes host memory for one part, as read and in `dtype`, and returns when the devices have the
    tensor. The result never shares memory with what `read` returns: a mapped file may change or
    shrink later.

    Args:
        shape: Of the whole tensor.
        dtype: To run in. Floating types are cast to one another on the host; others must agree.
        sharding: Where the parts go.
        read: Gives a part of the tensor for one slice per axis, all with both ends; called once
            for each distinct part that a device of this process holds.

    Raises:
        CheckpointError: a part has the wrong shape, or would change its meaning in `dtype`.
    """
    dtype = np.dtype(dtype)
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise CheckpointError(
            f"{dtype} cannot be held unless jax_enable_x64 is set; ask for a dtype of 32 bits"
        )
    holders = collections.defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        holders[_bounds(index, shape)].append(device)
    placed = []
    for bounds, devices in holders.items():
        part = read(tuple(slice(start, stop) for start, stop in bounds))
        _check_part(part, bounds, dtype=dtype)
        # Always a copy: XLA:CPU would otherwise go on using the file's mapped memory.
        owned = np.array(part, dtype=dtype, order="C")
        placed += jax.block_until_ready([jax.device_put(owned, device) for device in devices])
    return jax.make_array_from_single_device_arrays(shape, sharding, placed, dtype=dtype)


def _bounds(index: Index | None, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Both ends of the slices that JAX gives, which lack them where an axis is whole."""
    whole = index or (slice(None),) * len(shape)
    return tuple(part.indices(size)[:2] for part, size in zip(whole, shape, strict=True))


def _check_part(
    part: Shaped[np.ndarray, "..."], bounds: tuple[tuple[int, int], ...], *, dtype: np.dtype[Any]
) -> None:
    wanted = tuple(stop - start for start, stop in bounds)
    if part.shape != wanted:
        raise CheckpointError(
            f"wanted a part of shape {list(wanted)} at {list(bounds)}, got {list(part.shape)}; "
            f"the weights do not fit the config: check that both come from one model"
        )
    both_float = jnp.issubdtype(part.dtype, jnp.floating) and jnp.issubdtype(dtype, jnp.floating)
    if part.dtype != dtype and not both_float:
        raise CheckpointError(
            f"wanted {dtype}, got {part.dtype}, and only floating types are cast to one another; "
            f"use a copy of the model stored in {dtype}"
        )
