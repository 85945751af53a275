"""The mesh of devices that hold one model: the only place that builds one."""

from collections.abc import Sequence

import jax
import numpy as np

# The one axis of a mesh: devices of a tensor-parallel group.
AXIS = "tensor"
# Of devices, or of absent ones for which programs are only compiled.
AnyMesh = jax.sharding.Mesh | jax.sharding.AbstractMesh


def build_mesh(devices: Sequence[jax.Device]) -> jax.sharding.Mesh:
    """A mesh with one axis over these devices."""
    return jax.sharding.Mesh(np.asarray(devices), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))


def absent_mesh(num_devices: int) -> jax.sharding.AbstractMesh:
    """The mesh of devices that are not there: programs for it can be compiled, not run."""
    return jax.sharding.AbstractMesh(
        (num_devices,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,)
    )
