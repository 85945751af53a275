"""Kind `split`: a client and a server share layers, in turn with one process or one server alone.

A sample is one request of a pair, whose steps are timed, or one run of many requests at once.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import msgspec

from nanoflow_jax.results import figures, kind, manifest
from nanoflow_jax.results.figures import Figure

STEP_MODES = SINGLE, SPLIT = ("single", "split")
LOAD_MODES = ALL_SERVER, SHARED = ("all server", "shared")
# What a step may take longer, beside the link's round trip; the goal.
MOST_ADDED_S = 1e-3


class Step(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="step"):
    """One request, alone, in one process or split.

    Attributes:
        case: Model and cut.
        mode: One of STEP_MODES.
        round: Which pair.
        step_s: Median time from one token to the next.
        rtt_s: Median round trip of the link's pings, measured beside it.
        output_tokens: Generated.
        tokens_sha256: Of them.
    """

    case: str
    mode: str
    round: int
    step_s: float
    rtt_s: float
    output_tokens: int
    tokens_sha256: str


class Load(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="load"):
    """Many requests at once.

    Attributes:
        case: What is asked, and over which link.
        mode: One of LOAD_MODES.
        round: Which run.
        requests: How many.
        split_requests: Of them, whose layers are shared.
        asked_tokens: That were to be generated.
        output_tokens: Generated.
        seconds: From the first request to the last token.
        busy_s: That the server's engine spent in steps.
        cpu_s: Processor time of the server's process, all that it does included.
        client_cpu_s: Processor time of the process of all clients.
        steps: Of the server's engine.
        first_token_s: Per request, from its beginning to its first token.
        per_token_s: Per request, mean time between tokens.
        ttft_s: Deadline of the first token, the same for both modes.
        tpot_s: Deadline of the mean time between tokens.
        rtt_s: Median round trip of the link's pings.
        predicted_load: Share of the time of a server alone that a plan predicted; None if the
            layers were not shared by a plan.
        tokens_sha256: Of the generated tokens, request by request.
    """

    case: str
    mode: str
    round: int
    requests: int
    split_requests: int
    asked_tokens: int
    output_tokens: int
    seconds: float
    busy_s: float
    cpu_s: float
    client_cpu_s: float
    steps: int
    first_token_s: tuple[float, ...]
    per_token_s: tuple[float, ...]
    ttft_s: float
    tpot_s: float
    rtt_s: float
    predicted_load: float | None
    tokens_sha256: str

    @property
    def output_per_s(self) -> float:
        """Generated tokens per second."""
        return self.output_tokens / self.seconds

    @property
    def met_fraction(self) -> float:
        """Requests that met both deadlines, of all."""
        pairs = zip(self.first_token_s, self.per_token_s, strict=True)
        met = sum(first <= self.ttft_s and token <= self.tpot_s for first, token in pairs)
        return met / self.requests


Sample = Step | Load
_Kind = TypeVar("_Kind", Step, Load)
Pairs = dict[str, list[tuple[_Kind, _Kind]]]


def step_pairs(samples: Sequence[Sample]) -> Pairs[Step]:
    """Steps of one process and split ones of each round, by case.

    Raises:
        ValueError: A round has only one of them.
    """
    return _pairs([one for one in samples if isinstance(one, Step)], STEP_MODES)


def load_pairs(samples: Sequence[Sample]) -> Pairs[Load]:
    """Runs of a server alone and with layers shared of each round, by case.

    Raises:
        ValueError: A round has only one of them.
    """
    return _pairs([one for one in samples if isinstance(one, Load)], LOAD_MODES)


def _pairs(samples: Sequence[_Kind], wanted: tuple[str, str]) -> Pairs[_Kind]:
    rounds: dict[tuple[str, int], dict[str, _Kind]] = {}
    for sample in samples:
        rounds.setdefault((sample.case, sample.round), {})[sample.mode] = sample
    made: Pairs[_Kind] = {}
    for (case, number), modes in rounds.items():
        if set(modes) != set(wanted):
            raise ValueError(f"round {number} of {case} has modes {', '.join(modes)} alone")
        made.setdefault(case, []).append((modes[wanted[0]], modes[wanted[1]]))
    return made


def _figures(evidence: kind.Evidence) -> list[Figure]:
    made: list[Figure] = []
    for case, steps in step_pairs(evidence.samples).items():
        made += _step_figures(case, steps)
    for case, loads in load_pairs(evidence.samples).items():
        made += _load_figures(case, loads)
    return made


def _step_figures(case: str, both: Sequence[tuple[Step, Step]]) -> Iterator[Figure]:
    def one(name: str, value: Callable[[Step, Step], float]) -> Figure:
        return figures.summarise(f"{case}: {name}", "s", [value(*pair) for pair in both])

    yield one("a step in one process", lambda single, split: single.step_s)
    yield one("a step split", lambda single, split: split.step_s)
    yield one("added to a step", lambda single, split: split.step_s - single.step_s)
    yield one("the link's round trip", lambda single, split: split.rtt_s)


# Of a run, by what they are called and in which unit.
_OF_A_RUN: Sequence[tuple[str, str, Callable[[Load], float]]] = (
    ("output", "tokens/s", lambda run: run.output_per_s),
    ("server busy for a token", "s", lambda run: run.busy_s / run.output_tokens),
    ("server's processor time for a token", "s", lambda run: run.cpu_s / run.output_tokens),
    ("median first token", "s", lambda run: statistics.median(run.first_token_s)),
    ("median time of a token", "s", lambda run: statistics.median(run.per_token_s)),
    ("requests within both deadlines", "of 1", lambda run: run.met_fraction),
)


def _load_figures(case: str, both: Sequence[tuple[Load, Load]]) -> Iterator[Figure]:
    for place, mode in enumerate(LOAD_MODES):
        for name, unit, value in _OF_A_RUN:
            values = [value(pair[place]) for pair in both]
            yield figures.summarise(f"{case}, {mode}: {name}", unit, values)
    # Runs of one round were taken one after the other, on a machine in one state.
    for name, share in SHARES.items():
        values = [share(*pair) for pair in both]
        yield figures.summarise(f"{case}: {name}, of all server", "x", values)
    planned = [shared.predicted_load for _, shared in both if shared.predicted_load is not None]
    if planned:
        yield figures.summarise(f"{case}: server's time that was planned", "x", planned)


# Of what a server alone takes and gives; first it, then the one with layers shared.
SHARES: Mapping[str, Callable[[Load, Load], float]] = {
    "server's busy time": lambda alone, shared: shared.busy_s / alone.busy_s,
    "server's processor time": lambda alone, shared: shared.cpu_s / alone.cpu_s,
    "output": lambda alone, shared: shared.output_per_s / alone.output_per_s,
}


def _complaints(evidence: kind.Evidence) -> list[str]:
    hashes: dict[str, set[str]] = {}
    for sample in evidence.samples:
        hashes.setdefault(sample.case, set()).add(sample.tokens_sha256)
    differing = [
        f"runs of {case} gave different tokens" for case, found in hashes.items() if len(found) > 1
    ]
    short = [
        f"run {run.round} of {run.case}, {run.mode}, gave {run.output_tokens} tokens of "
        f"{run.asked_tokens}"
        for run in evidence.samples
        if isinstance(run, Load) and run.output_tokens != run.asked_tokens
    ]
    return differing + short


def _is_headline(_run: manifest.Run, figure: Figure) -> bool:
    return figure.unit == "x" or figure.name.endswith((": added to a step", "round trip"))


KIND = kind.Kind(
    name="split",
    sample=Sample,
    files=lambda run: frozenset({manifest.SAMPLES, manifest.CURVES}),
    needs_ceilings=kind.is_gpu,
    level=lambda run: kind.Level.ONE_RUN,
    figures=_figures,
    complaints=_complaints,
    is_headline=_is_headline,
)
