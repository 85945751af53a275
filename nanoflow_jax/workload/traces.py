"""Requests with the lengths of public traces, made up anew: no text, and no file to download.

Lengths are the middles of equal strata of quantile tables, in random order, so that even rare long
ones come as often as they should. What a request generates goes with its prompt as in the trace: by
a Gaussian copula or, where a trace mixes two uses, by a table for each range of prompts.
"""

import csv
import dataclasses
import math
from typing import TextIO

import numpy as np
from jaxtyping import Bool, Float64, Int64

from nanoflow_jax.workload.trace_tables import TRACES, Quantiles, Trace


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Requests that are kept, as NanoFlow's scripts do by default; in tokens."""

    input_len: float = 3072
    output_len: float = 1024
    total_len: float = 4096


NO_LIMITS = Limits(input_len=np.inf, output_len=np.inf, total_len=np.inf)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Requests:
    """Made-up requests.

    Attributes:
        input_lens: Prompt tokens, shape [n].
        output_lens: Tokens to generate, shape [n].
        arrivals_s: Seconds from the start, not decreasing, shape [n].
    """

    input_lens: Int64[np.ndarray, "n"]
    output_lens: Int64[np.ndarray, "n"]
    arrivals_s: Float64[np.ndarray, "n"]


def generate(
    name: str,
    num_requests: int,
    *,
    seed: int,
    rate: float | None = None,
    limits: Limits = Limits(),
) -> Requests:
    """Requests with the lengths of a trace.

    Args:
        name: Of the trace, or INPUT/OUTPUT for constant lengths.
        num_requests: How many, after those beyond the limits were left out.
        seed: Same seed, same requests.
        rate: Requests per second, with exponential gaps; None: all are there at once.
        limits: Requests to leave out.

    Raises:
        ValueError: No such trace, or a number that cannot be.
    """
    if num_requests < 1:
        raise ValueError(f"{num_requests} requests cannot be made; ask for at least 1")
    if rate is not None and not rate > 0:
        raise ValueError(f"a rate of {rate:g} requests/s brings none; give a positive one")
    random = np.random.default_rng(seed)
    inputs, outputs = _lengths(name, num_requests, random, limits)
    arrivals = np.zeros(num_requests)
    if rate is not None:
        arrivals = np.cumsum(random.exponential(1 / rate, num_requests))
    return Requests(input_lens=inputs, output_lens=outputs, arrivals_s=arrivals)


def _lengths(
    name: str, count: int, random: np.random.Generator, limits: Limits
) -> tuple[Int64[np.ndarray, "n"], Int64[np.ndarray, "n"]]:
    if name not in TRACES:
        constant = _constant(name)
        return np.full(count, constant[0]), np.full(count, constant[1])
    # Strata lose their evenness if some are drawn again or left out, so all are drawn at once, and
    # hardly more than enough.
    drawn = count
    while True:
        inputs, outputs = _draw(TRACES[name], drawn, random)
        kept = within(inputs, outputs, limits)
        if kept.sum() >= count:
            places = np.sort(random.choice(np.flatnonzero(kept), count, replace=False))
            return inputs[places], outputs[places]
        if drawn > 100 * count:
            raise ValueError(f"hardly any request of {name} is within {limits}; widen them")
        drawn = max(drawn + 1, math.ceil(drawn * count / max(kept.sum(), 1)))


def within(
    inputs: Int64[np.ndarray, "n"], outputs: Int64[np.ndarray, "n"], limits: Limits
) -> Bool[np.ndarray, "n"]:
    """Which requests, by their prompt and output tokens, are within the limits."""
    return (
        (inputs <= limits.input_len)
        & (outputs <= limits.output_len)
        & (inputs + outputs <= limits.total_len)
    )


def _constant(name: str) -> tuple[int, int]:
    parts = name.split("/")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(
            f"trace {name!r} is neither one of {', '.join(TRACES)} nor INPUT/OUTPUT tokens, such "
            "as 512/512"
        )
    return int(parts[0]), int(parts[1])


def _draw(
    trace: Trace, count: int, random: np.random.Generator
) -> tuple[Int64[np.ndarray, "n"], Int64[np.ndarray, "n"]]:
    ranks = random.permutation(count)
    inputs = _at(trace.inputs, _middles(ranks))
    # The normal score of an input is a normal number of its rank.
    of_inputs = np.sort(random.standard_normal(count))[ranks]
    noise = random.standard_normal(count)
    score = trace.correlation * of_inputs + np.sqrt(1 - trace.correlation**2) * noise
    places = np.searchsorted([one.longest for one in trace.ranges], inputs)
    outputs = np.empty(count, np.int64)
    for place, one in enumerate(trace.ranges):
        inside = np.flatnonzero(places == place)
        outputs[inside] = _at(one.outputs, _middles(np.argsort(np.argsort(score[inside]))))
    return inputs, outputs


def _middles(ranks: Int64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    """The probability in the middle of the stratum of each rank."""
    return (ranks + 0.5) / len(ranks)


def _at(quantiles: Quantiles, probabilities: Float64[np.ndarray, "n"]) -> Int64[np.ndarray, "n"]:
    """Tokens at these probabilities."""
    found = np.interp(probabilities, quantiles.probabilities, quantiles.values)
    return np.rint(found).astype(np.int64)


_COLUMNS = ("index", "input", "output", "arrival")


def write_csv(requests: Requests, file: TextIO) -> None:
    """Writes requests as NanoFlow's request files are: index, input, output, arrival."""
    rows = zip(requests.input_lens, requests.output_lens, requests.arrivals_s, strict=True)
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows((i, int(a), int(b), f"{t:.6f}") for i, (a, b, t) in enumerate(rows))
