"""What the devices of a group say to each other inside a program that each of them runs.

On one device nothing is said, and every method gives back what it was given.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from nanoflow_jax.parallel import mesh as mesh_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """The devices that share a model, from within one of them.

    Attributes:
        num_devices: How many there are.
        adds_in_order: Whether a sum is taken in the order of devices, rounded once. Otherwise the
            order may depend on where in the array a number lies, as it does in a ring.
    """

    num_devices: int = 1
    adds_in_order: bool = False

    def index(self) -> Int[Array, ""]:
        """Which of them this is."""
        if self.num_devices == 1:
            return jnp.zeros((), jnp.int32)
        return lax.axis_index(mesh_lib.AXIS)

    def sum(self, x: Float[Array, "*X"]) -> Float[Array, "*X"]:
        """The sum of what all have, on each of them (all-reduce)."""
        if self.num_devices == 1:
            return x
        return self._sum_in_order(x) if self.adds_in_order else lax.psum(x, mesh_lib.AXIS)

    def _sum_in_order(self, x: Float[Array, "R *X"]) -> Float[Array, "R *X"]:
        """Each device adds up some rows; it takes as many bytes on the links as a ring does."""
        num_rows = x.shape[0]
        missing = -num_rows % self.num_devices
        whole = jnp.pad(x, ((0, missing),) + ((0, 0),) * (x.ndim - 1))
        shares = lax.all_to_all(whole, mesh_lib.AXIS, split_axis=0, concat_axis=0, tiled=True)
        shares = shares.reshape(self.num_devices, -1, *x.shape[1:]).astype(jnp.float32)
        total = functools.reduce(jnp.add, [shares[i] for i in range(self.num_devices)])
        return self.all_rows(total.astype(x.dtype))[:num_rows]

    def all_columns(self, x: Shaped[Array, "R c *X"]) -> Shaped[Array, "R C *X"]:
        """The columns of all devices, in their order, on each of them (all-gather)."""
        if self.num_devices == 1:
            return x
        return lax.all_gather(x, mesh_lib.AXIS, axis=1, tiled=True)

    def columns_to_rows(self, x: Shaped[Array, "R v"]) -> Shaped[Array, "r V"]:
        """Rows of which each device has some columns, as some whole rows on each (all-to-all).

        No device ever has all of them. R must be a multiple of the number of devices.
        """
        if self.num_devices == 1:
            return x
        return lax.all_to_all(x, mesh_lib.AXIS, split_axis=0, concat_axis=1, tiled=True)

    def own_rows(self, x: Shaped[Array, "R *X"]) -> Shaped[Array, "r *X"]:
        """The rows that `columns_to_rows` gives to this device."""
        if self.num_devices == 1:
            return x
        count = x.shape[0] // self.num_devices
        return lax.dynamic_slice_in_dim(x, self.index() * count, count)

    def all_rows(self, x: Shaped[Array, "r *X"]) -> Shaped[Array, "R *X"]:
        """The rows of all devices, in their order, on each of them (all-gather)."""
        if self.num_devices == 1:
            return x
        return lax.all_gather(x, mesh_lib.AXIS, tiled=True)


ALONE = Group()


def on_each(
    function: Callable[..., Any], mesh: mesh_lib.AnyMesh, *, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """A program in which each device of a mesh runs a function on its shares of the arguments."""
    if mesh.size == 1:
        return function
    # What a group has summed or gathered is the same everywhere, which the check cannot see.
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
