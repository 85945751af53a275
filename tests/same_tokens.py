"""When two runs gave the same tokens: the rule that every parity test of this project uses.

Token for token, with one exception. Where the reference's top two logits lie closer together
than rounding, either token is right and what follows is another text: the comparison of that
request ends there and is counted. More than one request in a hundred so ended fails.
"""

import math
from collections.abc import Sequence

from nanoflow_jax.bench.near_ties import MIN_MARGIN, num_certain

MAX_ENDED_FRACTION = 0.01


def check_same_tokens(
    generated: Sequence[Sequence[int]],
    reference: Sequence[Sequence[int]],
    margins: Sequence[Sequence[float]],
) -> int:
    """Raise unless the generated tokens are the reference's.

    Args:
        generated: Tokens of each request.
        reference: Tokens that the reference gave, same order.
        margins: Distance of the reference's top two logits at each of its tokens.

    Returns:
        How many requests were compared only up to a margin below MIN_MARGIN.

    Raises:
        AssertionError: A token or a length differs before such a margin, or more than
            MAX_ENDED_FRACTION of the requests have one.
        ValueError: The three do not have the same requests, or margins and reference tokens
            do not have the same lengths, or a margin is not a number.
    """
    if not len(generated) == len(reference) == len(margins):
        raise ValueError(
            f"{len(generated)} generated requests, {len(reference)} of the reference and margins "
            f"of {len(margins)}; give the same requests in the same order"
        )
    ended = 0
    for request in range(len(reference)):
        num_compared = _num_before_small_margin(request, reference[request], margins[request])
        ended += num_compared < len(reference[request])
        _check_request(request, generated[request], reference[request], num_compared)
    if ended > MAX_ENDED_FRACTION * len(reference):
        raise AssertionError(
            f"{ended} of {len(reference)} requests have a reference margin below {MIN_MARGIN}, "
            f"more than {MAX_ENDED_FRACTION:.0%}: take a model whose logits are spread"
        )
    return ended


def _num_before_small_margin(
    request: int, reference: Sequence[int], margins: Sequence[float]
) -> int:
    if len(reference) != len(margins):
        raise ValueError(
            f"request {request} has {len(reference)} reference tokens but {len(margins)} margins"
        )
    if any(math.isnan(margin) for margin in margins):
        raise ValueError(f"request {request} has a reference margin that is not a number")
    return num_certain(margins)


def _check_request(
    request: int, generated: Sequence[int], reference: Sequence[int], num_compared: int
) -> None:
    for place in range(min(num_compared, len(generated))):
        if int(generated[place]) != int(reference[place]):
            raise AssertionError(
                f"request {request}, token {place}: {int(generated[place])} instead of "
                f"{int(reference[place])}"
            )
    whole = num_compared == len(reference)
    if len(generated) < num_compared or (whole and len(generated) != num_compared):
        raise AssertionError(
            f"request {request} has {len(generated)} tokens instead of {len(reference)}"
        )
