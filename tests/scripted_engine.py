"""An engine that says what it was told to say, for tests of what is made of its tokens."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

from nanoflow_jax import request
from nanoflow_jax.request import FinishReason, RequestUpdate

REFUSED = 999


class ScriptedEngine:
    """Says what it was told to say, one update of each request a step.

    Attributes:
        requests: All that were taken in, by their ids.
        aborted: Output lengths that were given for requests that were aborted.
    """

    def __init__(self, scripts: Mapping[str, Sequence[RequestUpdate]]) -> None:
        self._scripts = scripts
        self._queues: dict[str, collections.deque[RequestUpdate]] = {}
        self.requests: dict[str, request.Request] = {}
        self.aborted: dict[str, int | None] = {}

    def add(self, asked: request.Request) -> None:
        if REFUSED in asked.prompt_ids:
            raise ValueError(f"prompt: {REFUSED} is not a token id of this model")
        self.requests[asked.request_id] = asked
        self._queues[asked.request_id] = collections.deque(self._scripts[asked.request_id])

    def abort(self, request_id: str, *, output_len: int | None = None) -> None:
        if self._queues.pop(request_id, None) is not None:
            self.aborted[request_id] = output_len

    def step(self) -> list[RequestUpdate]:
        updates = []
        for name, queue in list(self._queues.items()):
            if queue:
                update = queue.popleft()
                updates.append(update)
                if update.finish_reason is not None:
                    del self._queues[name]
        return updates


def say(
    name: str,
    tokens: Sequence[int],
    *,
    reason: FinishReason = FinishReason.LENGTH,
    scored: bool = False,
    **last: Any,
) -> list[RequestUpdate]:
    """One update for each token; the last one carries the reason.

    Args:
        name: Of the request.
        tokens: What it says.
        reason: Why it ends; at STOP the last token is the one that ended it.
        scored: Each token has a made-up log-probability.
        last: Further fields of the last update.
    """
    if reason is FinishReason.STOP:
        last.setdefault("stop_token_id", tokens[-1])
    return [
        RequestUpdate(
            request_id=name,
            token_ids=(token,),
            logprobs=(score(token),) if scored else (),
            **({"finish_reason": reason, **last} if i == len(tokens) - 1 else {}),
        )
        for i, token in enumerate(tokens)
    ]


def score(token: int) -> request.TokenLogprobs:
    """A log-probability that a test can tell from others; the likeliest token is 0."""
    top = ((0, -0.25), (token, -1.0 - token)) if token else ((0, -0.25),)
    return request.TokenLogprobs(token_id=token, logprob=top[-1][1], rank=len(top), top=top)
