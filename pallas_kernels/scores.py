"""Scores of attention as kernels have them: powers of 2, because that is what GPUs exponentiate.

Accuracy: in float32; with a soft-cap c to some 2^-22 c, whatever the score. The GPU's own tanh,
which kernels that may take fast paths would get, is good to 11 bits only: 0.02 at a soft-cap of 50.

Source: tanh(x) = 1 - 2 / (1 + e^2x), which neither overflows nor divides 0 by 0.
"""

import math
from typing import Any

import jax.numpy as jnp

_LOG2_E = math.log2(math.e)


def powers(products: Any, *, scale: float, softcap: float | None) -> Any:
    """Scores of products of queries and keys, to the base 2; for use inside a kernel.

    Args:
        products: float32.
        scale: Factor on them.
        softcap: Scores s become softcap * tanh(s / softcap); None leaves them.
    """
    if softcap is None:
        return products * (scale * _LOG2_E)
    exponential = jnp.exp2(products * (2 * scale / softcap * _LOG2_E))
    limit = softcap * _LOG2_E
    # A division would spill registers of wide prefill.
    return limit - (2 * limit) * (1.0 / (1.0 + exponential))
