"""Whether modes draw the same tokens: all of them in float32; in bfloat16, but for near ties."""

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from nanoflow_jax.bench.ablation_device import Judged
from nanoflow_jax.results import ablation

_MANTISSA_BITS = {"bfloat16": 8, ablation.FLOAT32: 24}
# Summing thousands of products in float32 in another order: as many bits again as one sum has.
_SUM_BITS = 7


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rounding:
    """How far apart two right runs may be.

    Attributes:
        most_error: Of a logit, as a share of the mean best logit.
        tie: Logits nearer together than this share are in no order; 0 if all are.
    """

    most_error: float
    tie: float


def rounding(dtype: str, *, num_layers: int) -> Rounding:
    """What rounding does to logits.

    The residual stream is rounded twice a layer, each time by up to half of its last bit either
    way, which adds up as a random walk does. In float32 the sums of products weigh more, and two
    best logits are hardly ever as near: there every token counts.

    Args:
        dtype: Of the model.
        num_layers: Of the model.

    Raises:
        KeyError: Models do not run in that dtype.
    """
    walk = math.sqrt(2 * num_layers) * 2.0 ** -_MANTISSA_BITS[dtype]
    if dtype == ablation.FLOAT32:
        return Rounding(most_error=walk * 2**_SUM_BITS, tie=0.0)
    return Rounding(most_error=walk, tie=2 * walk)


def _certain(reference: Sequence[Judged], limit: Rounding) -> list[Bool[np.ndarray, "R"]]:
    """Which tokens of each step any right run draws."""
    least = limit.tie * _scale(reference)
    return [step.margins >= least for step in reference]


def compare(
    found: Sequence[Judged], reference: Sequence[Judged], limit: Rounding
) -> dict[str, Any]:
    """A mode beside the reference, as fields of `ablation.Comparison`.

    A token whose logits are no numbers is wrong.
    """
    is_certain = _certain(reference, limit)
    pairs = [*zip(found, reference, strict=True)]
    is_number = [np.isfinite(a.best) & np.isfinite(b.best) for a, b in pairs]
    differs = [
        (a.tokens != b.tokens) & sure | ~numbers
        for (a, b), sure, numbers in zip(pairs, is_certain, is_number, strict=True)
    ]
    # A maximum is off by no more than what it is the maximum of.
    errors = [
        float(np.abs(a.best[numbers] - b.best[numbers]).max(initial=0.0))
        for (a, b), numbers in zip(pairs, is_number, strict=True)
    ]
    return {
        "tokens": sum(len(step.tokens) for step in reference),
        "ties": sum(int((~one).sum()) for one in is_certain),
        "wrong": sum(int(one.sum()) for one in differs),
        "error": max(errors, default=0.0) / _scale(reference),
        "most_error": limit.most_error,
        "tokens_sha256": _digest(found, is_certain),
    }


def _scale(reference: Sequence[Judged]) -> float:
    best = np.concatenate([step.best[np.isfinite(step.best)] for step in reference])
    return float(np.abs(best).mean()) if best.size else 1.0


def _digest(found: Sequence[Judged], is_certain: Sequence[Bool[np.ndarray, "R"]]) -> str:
    hashed = hashlib.sha256()
    for step, mask in zip(found, is_certain, strict=True):
        hashed.update(step.tokens[mask].astype("<i4").tobytes())
    return hashed.hexdigest()


def hash_of(tokens: Any) -> str:
    """First 16 hexadecimal digits of the hash of a step's tokens."""
    return hashlib.sha256(np.asarray(tokens).astype("<i4").tobytes()).hexdigest()[:16]
