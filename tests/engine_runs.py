"""Small engines for tests, and runs of requests through them."""

import collections
import dataclasses
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import pytest

from nanoflow_jax import config, request
from nanoflow_jax.engine import build, engine, model_source


@dataclasses.dataclass(kw_only=True)
class Output:
    """All that an engine reported of one request."""

    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[request.TokenLogprobs] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[request.TokenLogprobs] = dataclasses.field(default_factory=list)
    finish_reason: request.FinishReason | None = None
    error: str | None = None

    @property
    def margins(self) -> list[float]:
        """Distance of the top two logits at each token, where logprobs were asked for."""
        return [entry.top[0][1] - entry.top[1][1] for entry in self.logprobs]


def require_gpu() -> None:
    """Skips a test where jax runs on a CPU."""
    if jax.devices()[0].platform == "cpu":
        pytest.skip("no GPU here; set JAX_PLATFORMS=cuda on a machine that has one")


def build_small(folder: pathlib.Path, **knobs: Any) -> engine.Engine:
    """An engine in float32; the knobs are named as on the command line."""
    merged = {"penalty_requests": 2, "dtype": "float32", **knobs}
    section = config.EngineConfig.from_knobs(model=str(folder), **merged)
    return build.build_engine(section, model_source.open_model(section.model))


def ask(request_id: str, prompt: Sequence[int], **params: Any) -> request.Request:
    """A request; greedy, with seed 0 and at the usual priority unless told otherwise."""
    priority, bad_tokens = params.pop("priority", 0), params.pop("bad_tokens", ())
    return request.Request(
        request_id=request_id,
        prompt_ids=prompt,
        params=request.SamplingParams(**{"temperature": 0.0, "seed": 0, **params}),
        priority=priority,
        bad_tokens=bad_tokens,
    )


def run(
    served: engine.Engine,
    requests: Sequence[request.Request],
    *,
    arrivals: Sequence[int] | None = None,
) -> list[Output]:
    """Runs requests together to their end; the outputs are in their order.

    Invariants are checked after every step, and that no step compiled anything.

    Args:
        served: Idle.
        requests: What to run.
        arrivals: Steps before each of them is added, ascending; none unless given.
    """
    outputs = {asked.request_id: Output() for asked in requests}
    left = collections.deque(zip(arrivals or [0] * len(requests), requests, strict=True))
    for num_steps in itertools.count():
        while left and left[0][0] <= num_steps:
            served.add(left.popleft()[1])
        if not served.has_work and not left:
            break
        for update in served.step():
            take(outputs[update.request_id], update)
        served.check()
    assert served.num_late_compiles == 0
    return list(outputs.values())


def take(output: Output, update: request.RequestUpdate) -> None:
    """Adds an update to what is known of its request, which must not have ended before."""
    assert output.finish_reason is None, "an update came after the last one"
    output.token_ids += update.token_ids
    output.logprobs += update.logprobs
    output.prompt_logprobs += update.prompt_logprobs
    output.finish_reason, output.error = update.finish_reason, update.error
