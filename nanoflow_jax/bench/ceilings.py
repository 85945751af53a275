"""What a device reaches at most: products, a copy and a sum of large arrays of random numbers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from nanoflow_jax.bench import clock as clock_lib
from nanoflow_jax.results import kernels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured.

    Attributes:
        products: T, D and F of each product; the fastest counts. One that takes long runs into the
            power limit, which a shorter one does not.
        num_bytes: Of the array that is copied, and summed.
        sample_s: How long a sample is to take.
        rounds: Samples; the fastest counts, for nothing makes a device faster than it is.
    """

    products: tuple[tuple[int, int, int], ...] = ((8192, 8192, 8192), (4096, 4096, 14336))
    num_bytes: int = 1 << 30
    sample_s: float = 0.03
    rounds: int = 5


def measure(clock: clock_lib.Clock, sizes: Sizes = Sizes()) -> dict[str, float]:
    """Ceilings by the names that results have for them, in operations and bytes per second.

    A product has 2 T D F operations; a copy reads and writes each byte, a sum reads it.
    """
    flops_per_s = max(_product(clock, *shape, sizes=sizes) for shape in sizes.products)
    source = jax.random.normal(jax.random.key(1), (sizes.num_bytes // 4,), jnp.float32)
    copy_s = _best(clock, jax.jit(jnp.negative), source, sizes=sizes)
    read_s = _best(clock, jax.jit(jnp.sum), source, sizes=sizes)
    return {
        kernels.FLOPS_CEILING: flops_per_s,
        kernels.COPY_CEILING: 2 * source.nbytes / copy_s,
        kernels.READ_CEILING: source.nbytes / read_s,
    }


def _product(clock: clock_lib.Clock, T: int, D: int, F: int, *, sizes: Sizes) -> float:
    keys = jax.random.split(jax.random.key(0), 2)
    x, w = (
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in zip(keys, ((T, D), (F, D)), strict=True)
    )
    program = jax.jit(lambda x, w: jnp.einsum("TD,FD->TF", x, w))
    return 2 * T * D * F / _best(clock, program, x, w, sizes=sizes)


def _best(clock: clock_lib.Clock, program: Any, *operands: Any, sizes: Sizes) -> float:
    def call(_: int) -> Any:
        return program(*operands)

    jax.block_until_ready(call(0))
    calls = clock_lib.calls_for(clock.seconds(call, calls=2), sample_s=sizes.sample_s)
    return min(clock.seconds(call, calls=calls) for _ in range(sizes.rounds))
