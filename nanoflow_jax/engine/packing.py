"""Many small host arrays as one int32 vector: one transfer into a step, one array out.

Floats travel as their bits. The same `Packing` packs on the host and unpacks on the device.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, Shaped


@dataclasses.dataclass(frozen=True, kw_only=True)
class Field:
    """One array inside the vector.

    Attributes:
        shape: Its sizes.
        dtype: Any type of four bytes.
        fill: What positions hold that nobody sets.
    """

    shape: tuple[int, ...]
    dtype: type[np.generic] = np.int32
    fill: float = 0

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class Packing:
    """Where each named array lies in the vector."""

    def __init__(self, fields: Mapping[str, Field]) -> None:
        self._fields = dict(fields)
        self._template = np.concatenate(
            [np.full(f.size, f.fill, f.dtype).view(np.int32) for f in self._fields.values()]
        )

    @property
    def size(self) -> int:
        """Length of the vector."""
        return len(self._template)

    def new(self) -> tuple[Int32[np.ndarray, "X"], dict[str, np.ndarray]]:
        """A fresh vector holding the fills, and writable views of its arrays.

        Every step gets its own: XLA:CPU reads the host's memory while the step runs, so a vector
        that was handed over must never be written again.
        """
        vector = self._template.copy()
        views, start = {}, 0
        for name, field in self._fields.items():
            part = vector[start : start + field.size]
            views[name] = part.view(field.dtype).reshape(field.shape)
            start += field.size
        return vector, views

    def unpack(self, vector: Int32[Array, "X"]) -> dict[str, Shaped[Array, "..."]]:
        """The arrays inside a vector, in a program."""
        arrays, start = {}, 0
        for name, field in self._fields.items():
            part = jax.lax.slice_in_dim(vector, start, start + field.size)
            if field.dtype != np.int32:
                part = jax.lax.bitcast_convert_type(part, field.dtype)
            arrays[name] = part.reshape(field.shape)
            start += field.size
        return arrays


def as_bits(x: Shaped[Array, "..."]) -> Int32[Array, "..."]:
    """An array of four-byte elements as int32 bits."""
    return x if x.dtype == jnp.int32 else jax.lax.bitcast_convert_type(x, jnp.int32)
