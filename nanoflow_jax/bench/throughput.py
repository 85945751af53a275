"""Offline throughput of a request mix: all requests at once, greedy, fixed output lengths."""

import dataclasses
import hashlib
import json
import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from nanoflow_jax import request as request_lib
from nanoflow_jax.engine import interface
from nanoflow_jax.workload import file as workload_file


@dataclasses.dataclass(frozen=True, kw_only=True)
class Throughput:
    """One run of a mix.

    Attributes:
        requests: How many.
        input_tokens: Of all prompts.
        output_tokens: Generated.
        seconds: From the first submission to the last token.
        steps: Steps launched.
        first_token_s: Per request, from its submission to its first token.
        per_token_s: Per request with at least two tokens, mean time between tokens.
        tokens_sha256: Of the generated ids, request by request; None where only text was seen.
    """

    requests: int
    input_tokens: int
    output_tokens: int
    seconds: float
    steps: int
    first_token_s: tuple[float, ...]
    per_token_s: tuple[float, ...]
    tokens_sha256: str | None = None

    @property
    def output_per_s(self) -> float:
        """Generated tokens per second."""
        return self.output_tokens / self.seconds

    @property
    def total_per_s(self) -> float:
        """Prompt and generated tokens per second."""
        return (self.input_tokens + self.output_tokens) / self.seconds


def run(
    engine: interface.TokenEngine, mix: Sequence[workload_file.WorkRequest], *, name: str
) -> Throughput:
    """Runs a mix once on a warm engine.

    Args:
        engine: Idle.
        mix: What to run; all of it is submitted at the start.
        name: Prefix of the request ids.

    Raises:
        ValueError: A request does not fit the model.
    """
    start = time.perf_counter()
    first_steps = engine.counters.steps
    for i, work in enumerate(mix):
        engine.add(
            request_lib.Request(
                request_id=f"{name}-{i}",
                prompt_ids=work.prompt_ids,
                params=request_lib.SamplingParams(
                    max_tokens=work.output_len, temperature=0.0, ignore_eos=True
                ),
            )
        )
    arrivals: dict[str, list[float]] = {}
    tokens: dict[str, list[int]] = {}
    while engine.has_work:
        updates = engine.step()
        now = time.perf_counter() - start
        for update in updates:
            arrivals.setdefault(update.request_id, []).append(now)
            tokens.setdefault(update.request_id, []).extend(update.token_ids)
    seconds = time.perf_counter() - start
    times = list(arrivals.values())
    return Throughput(
        requests=len(mix),
        input_tokens=sum(len(work.prompt_ids) for work in mix),
        output_tokens=sum(len(ids) for ids in tokens.values()),
        seconds=seconds,
        steps=engine.counters.steps - first_steps,
        first_token_s=tuple(t[0] for t in times),
        per_token_s=tuple((t[-1] - t[0]) / (len(t) - 1) for t in times if len(t) > 1),
        tokens_sha256=_digest([tokens.get(f"{name}-{i}", []) for i in range(len(mix))]),
    )


def _digest(tokens: Sequence[Sequence[int]]) -> str:
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


def report(result: Throughput) -> str:
    """The run as lines for people."""
    lines = [
        f"requests {result.requests}, input {result.input_tokens}, output "
        f"{result.output_tokens} tokens, {result.steps} steps in {result.seconds:.3f} s",
        f"output {result.output_per_s:.1f} tokens/s, input and output "
        f"{result.total_per_s:.1f} tokens/s",
        f"time to first token: {percentiles(result.first_token_s)}",
        f"time per output token: {percentiles(result.per_token_s)}",
    ]
    return "\n".join(lines)


def row(result: Throughput) -> dict[str, Any]:
    """The run as a row for programs."""
    return {"output_per_s": result.output_per_s, **vars(result)}


def percentiles(seconds: Sequence[float]) -> str:
    """Times for people."""
    if not seconds:
        return "none"
    p50, p90, p99 = np.percentile(np.asarray(seconds) * 1e3, [50, 90, 99])
    return f"p50 {p50:.1f} ms, p90 {p90:.1f} ms, p99 {p99:.1f} ms"


def peak_memory_bytes() -> int:
    """Most resident memory this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
