"""The mesh of devices that hold one model, and how each weight lies on it."""

from collections.abc import Sequence

import jax
import numpy as np

# Axis letters of ARCHITECTURE.md that are split over the devices of a tensor-parallel group.
_SPLIT = frozenset("KF")


def build_mesh(devices: Sequence[jax.Device]) -> jax.sharding.Mesh:
    """A mesh with one axis, `tensor`, over these devices."""
    return jax.sharding.Mesh(
        np.asarray(devices),
        ("tensor",),
        axis_types=(jax.sharding.AxisType.Auto,),
    )


def sharding_of(mesh: jax.sharding.Mesh, axes: str) -> jax.sharding.NamedSharding:
    """How an array with these axis letters lies on the mesh; at most one letter is split."""
    parts = ["tensor" if letter in _SPLIT else None for letter in axes]
    assert parts.count("tensor") <= 1, f"axes {axes} would be split twice"
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*parts))
