"""What is told of a simulated run: speed, latency, and what is busy when."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

from nanoflow_jax.nanobatch.operations import Resource
from nanoflow_jax.simulator.loop import Run, StepRecord

# Of all tokens, those after which a run is taken to be steady: before, all requests are young.
_WARM_FRACTION = 0.3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
    """Of one number over all requests."""

    mean: float
    p50: float
    p90: float
    p99: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """A run in numbers.

    Attributes:
        num_requests: All of which finished.
        tokens: Of prompts and outputs.
        duration_s: From the first arrival to the last token.
        tokens_per_s: Over all of it.
        steady_tokens_per_s: From when the run is warm until nothing comes or waits any more.
        ttft_s: From arrival to the first token.
        tpot_s: From the first token to the last, for each but the first; requests of one token
            are left out.
        normalised_s: From arrival to the last token, for each token of output.
        num_steps: Of all replicas.
        num_preemptions: Requests that lost their pages and were computed again.
        surplus_tokens: Sampled for requests that had already ended.
    """

    num_requests: int
    tokens: int
    duration_s: float
    tokens_per_s: float
    steady_tokens_per_s: float
    ttft_s: Spread
    tpot_s: Spread | None
    normalised_s: Spread
    num_steps: int
    num_preemptions: int
    surplus_tokens: int


def summarise(run: Run, *, warm_up_s: float = 0.0) -> Summary:
    """A run in numbers.

    Args:
        run: What happened.
        warm_up_s: Latencies are those of requests that come so long after the first, or later: a
            queue takes time to become as long as it stays.

    Raises:
        ValueError: No request comes so late.
    """
    asked = run.requests
    tokens = int(asked.input_lens.sum() + run.generated.sum())
    duration = float(run.end_s.max() - asked.arrivals_s[0])
    timed = asked.arrivals_s >= asked.arrivals_s[0] + warm_up_s
    if not timed.any():
        raise ValueError(f"no request comes after {warm_up_s:g} s of warm-up; simulate for longer")
    several = timed & (run.generated > 1)
    rest_s = (run.end_s - run.first_s)[several] / (run.generated[several] - 1)
    return Summary(
        num_requests=len(run.end_s),
        tokens=tokens,
        duration_s=duration,
        tokens_per_s=tokens / duration,
        steady_tokens_per_s=steady_tokens_per_s(run),
        ttft_s=_spread((run.first_s - asked.arrivals_s)[timed]),
        tpot_s=_spread(rest_s) if len(rest_s) else None,
        normalised_s=_spread(((run.end_s - asked.arrivals_s) / run.generated)[timed]),
        num_steps=len(run.steps),
        num_preemptions=run.num_preemptions,
        surplus_tokens=run.surplus_tokens,
    )


def _spread(values: Float64[np.ndarray, "n"]) -> Spread:
    p50, p90, p99 = np.quantile(values, (0.5, 0.9, 0.99))
    return Spread(mean=float(values.mean()), p50=float(p50), p90=float(p90), p99=float(p99))


def steady_tokens_per_s(run: Run) -> float:
    """Speed between a warm start and the last moment at which requests wait or come."""
    ends = np.array([step.end_s for step in run.steps])
    order = np.argsort(ends, kind="stable")
    ends = ends[order]
    done = np.cumsum([run.steps[i].new_tokens for i in order])
    waited = [step.end_s for step in run.steps if step.num_waiting]
    until = max([float(run.requests.arrivals_s[-1]), *waited[-1:]])
    first = int(np.searchsorted(done, _WARM_FRACTION * done[-1]))
    last = int(np.searchsorted(ends, until, side="right")) - 1
    if last <= first:  # it was over before it was warm
        return float(done[-1] / (ends[-1] - run.requests.arrivals_s[0]))
    return float((done[last] - done[first]) / (ends[last] - ends[first]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
    """A stretch of a run, means over its time and over all replicas.

    Attributes:
        start_s: From the first arrival.
        end_s: Likewise.
        busy: Of each resource by name, at what its datasheet promises.
        tokens_per_s: Computed for the first time, and given to requests.
        pages_fraction: Of all pages, those held.
        num_running: Requests of a replica that hold pages.
        num_waiting: Requests of a replica that wait for them.
    """

    start_s: float
    end_s: float
    busy: dict[str, float]
    tokens_per_s: float
    pages_fraction: float
    num_running: float
    num_waiting: float


def timeline(
    run: Run, *, num_pages: int, num_replicas: int, most: int = 200
) -> tuple[Interval, ...]:
    """What is busy when.

    Args:
        run: What happened.
        num_pages: Of a replica.
        num_replicas: That shared the requests.
        most: Intervals, all equally long.
    """
    start = float(run.requests.arrivals_s[0])
    edges = np.linspace(start, float(run.end_s.max()), min(most, len(run.steps)) + 1)
    kept = {name: _means(run.steps, edges, name) / num_replicas for name in _LEVELS}
    rates = np.zeros((len(Resource) + 1, len(edges) - 1))
    for row in range(len(Resource)):
        rates[row] = _spread_out(run.steps, edges, [step.busy_s[row] for step in run.steps])
    rates[-1] = _spread_out(run.steps, edges, [float(step.new_tokens) for step in run.steps])
    rates /= np.diff(edges)
    return tuple(
        Interval(
            start_s=float(edges[i] - start),
            end_s=float(edges[i + 1] - start),
            busy={
                one.value: float(rates[row, i]) / num_replicas for row, one in enumerate(Resource)
            },
            tokens_per_s=float(rates[-1, i]),
            pages_fraction=float(kept["pages_used"][i]) / num_pages,
            num_running=float(kept["num_running"][i]),
            num_waiting=float(kept["num_waiting"][i]),
        )
        for i in range(len(edges) - 1)
    )


_LEVELS = ("pages_used", "num_running", "num_waiting")


def _spread_out(
    steps: Sequence[StepRecord], edges: Float64[np.ndarray, "e"], amounts: Sequence[float]
) -> Float64[np.ndarray, "i"]:
    """Amounts of steps, each spread evenly over its time, in each interval between edges."""
    starts = np.array([step.start_s for step in steps])
    ends = np.array([step.end_s for step in steps])
    weights = np.array(amounts)
    up_to = np.empty(len(edges))
    for i, edge in enumerate(edges):
        share = np.clip((edge - starts) / np.maximum(ends - starts, 1e-12), 0.0, 1.0)
        up_to[i] = share @ weights
    return np.diff(up_to)


def _means(
    steps: Sequence[StepRecord], edges: Float64[np.ndarray, "e"], name: str
) -> Float64[np.ndarray, "i"]:
    """Of what a step holds, over time; nothing is held between steps."""
    held = [getattr(step, name) * (step.end_s - step.start_s) for step in steps]
    return _spread_out(steps, edges, held) / np.diff(edges)


def highest_rate(latencies: dict[float, float], *, objective_s: float) -> float | None:
    """The rate at which a latency reaches an objective; linear between those that were run.

    Args:
        latencies: Seconds, by rate.
        objective_s: The most that is wanted.

    Returns:
        None if the lowest rate misses it, or the highest does not.
    """
    rates = sorted(latencies)
    for low, high in itertools.pairwise(rates):
        before, after = latencies[low], latencies[high]
        if before <= objective_s < after:
            return low + (high - low) * (objective_s - before) / (after - before)
    return None
