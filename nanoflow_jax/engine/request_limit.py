"""How many requests may run at once."""

import dataclasses
from collections.abc import Callable

from nanoflow_jax import config as config_lib
from nanoflow_jax.cost.steady_state import Mix

# Nobody knows what will come. Requests of this kind keep a dense batch as full as those for which
# it was chosen: arXiv 2408.12757, figure 7.
_USUAL = Mix(prompt_len=512, output_len=512)
# Rows of programs are multiples, where there are many.
_ROWS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestLimit:
    """Most requests in one step, and why so many; no reason where somebody or a table said it."""

    max_requests: int
    reason: str = ""


def choose(
    section: config_lib.BatchSection,
    *,
    usual: int | None,
    dense_batch: int,
    context_len: int,
    cached_tokens: Callable[[], int],
) -> RequestLimit:
    """Most requests in one step: as asked, as is usual, or as many as fill step and memory.

    Args:
        section: The knobs.
        usual: Of the device; None if it depends on the model.
        dense_batch: Tokens of a full step.
        context_len: Most tokens of one request.
        cached_tokens: Tokens that the cache will have room for.
    """
    if section.max_requests:
        return RequestLimit(max_requests=section.max_requests)
    if usual is not None:
        return RequestLimit(max_requests=min(usual, dense_batch))
    wanted, context = _USUAL.decode_rows(dense_batch), min(_USUAL.decode_context, context_len)
    held = int(cached_tokens() // context)
    if held < wanted:
        reason = f"memory holds {max(held, 0)} of {context:.0f} tokens"
    else:
        reason = f"those of {_USUAL} keep the batch full"
    found = max(min(held, wanted), 1)
    if found > _ROWS:
        found -= found % _ROWS
    return RequestLimit(max_requests=found, reason=reason)
