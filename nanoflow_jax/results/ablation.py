"""Kind `ablation`: the same steps one operation after another, split, and overlapped.

h, the hidden share, is the time that overlap saves of the time that it could save:

    h = (best sequential - overlapped) / (decode attention alone), in seconds a token

Source: arXiv 2408.12757 section 6.4 and figure 9, whose modes these are; the paper's optimum is
its equation 5, products of all parameters at the rate that the device was measured to have.
"""

import dataclasses
import enum
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from nanoflow_jax.results import ablation_operations, ablation_sweep, figures, kind, manifest
from nanoflow_jax.results.kernels import FLOPS_CEILING

# A control that hides more shows that something else than overlap was measured.
MOST_HIDDEN_BY_CONTROL = 0.05
# Of a mode that is measured twice, between its two medians.
MOST_NOISE = 0.02
FLOAT32 = "float32"
# Name of the figure that --plan_min_tokens is set from.
THRESHOLD = "smallest dense batch worth cutting"
# Figures that only who looks into a result wants to see.
_DETAILS = (", executed", ", times as long as of ")


class Role(enum.StrEnum):
    """What a mode is there for."""

    SEQUENTIAL = "sequential"
    SPLIT = "split"
    OVERLAPPED = "overlapped"
    ALONE = "alone"
    CONTROL = "control"
    AGAIN = "again"


class Step(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="step"):
    """One step that was timed.

    Attributes:
        case: Workload, such as 512/512.
        mode: How it ran, unique in the case.
        role: What that mode is there for.
        round: Which of the mode's rounds; each runs the same steps from the same state.
        step: Which of the round's steps.
        seconds: From when the step before was there until this was; the device never waited.
        tokens: In the dense batch, padding left out.
        decode_rows: Requests with one token to do.
        context_tokens: Cached tokens that they see, added up.
        sampled_rows: Tokens drawn.
        tokens_sha256: First 16 hexadecimal digits of the hash of those tokens.
    """

    case: str
    mode: str
    role: Role
    round: int
    step: int
    seconds: float
    tokens: int
    decode_rows: int
    context_tokens: int
    sampled_rows: int
    tokens_sha256: str


class Comparison(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="comparison"
):
    """Tokens and logits of a mode beside the sequential mode's, each step after the same tokens.

    Attributes:
        case: Workload.
        mode: What is compared.
        tokens: Drawn.
        ties: Of those, that the reference's two best logits are too near to decide.
        wrong: That differ and are no ties.
        error: Largest distance of a token's logit, as a share of the mean best logit.
        most_error: That rounding may make of it.
        tokens_sha256: Hash of the tokens that are no ties.
    """

    case: str
    mode: str
    tokens: int
    ties: int
    wrong: int
    error: float
    most_error: float
    tokens_sha256: str


class Missing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="missing"):
    """A mode that cannot be had here.

    Attributes:
        case: Workload.
        mode: Which.
        reason: Why.
    """

    case: str
    mode: str
    reason: str


class Traced(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="traced"):
    """Operations of the layers in a trace of steps, apart from those that were timed.

    Attributes:
        case: Workload.
        mode: How it ran.
        steps: In the trace.
        operation_s: Seconds of a step in which each operation ran, by its name.
    """

    case: str
    mode: str
    steps: int
    operation_s: dict[str, float]


SAMPLE: Any = Step | Comparison | Missing | Traced


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """What the steps of a round come to."""

    seconds: float
    tokens: int
    sampled_rows: int
    steps: int

    @property
    def per_s(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    @property
    def token_s(self) -> float:
        """Seconds a token."""
        return self.seconds / self.tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timed:
    """A mode of one case.

    Attributes:
        role: What it is there for.
        rounds: By their numbers.
    """

    role: Role
    rounds: Mapping[int, Timing]

    @property
    def per_s(self) -> float:
        """Median of the rounds, in tokens per second."""
        return statistics.median(one.per_s for one in self.rounds.values())


Cases = Mapping[str, Mapping[str, Timed]]


def timed(samples: Iterable[Any]) -> Cases:
    """Rounds of steps, by case and in it by mode, in the order of time."""
    steps: dict[str, dict[str, dict[int, list[Step]]]] = {}
    for one in samples:
        if isinstance(one, Step):
            rounds = steps.setdefault(one.case, {}).setdefault(one.mode, {})
            rounds.setdefault(one.round, []).append(one)
    return {
        case: {
            mode: Timed(
                role=next(iter(rounds.values()))[0].role,
                rounds={number: _timing(one) for number, one in rounds.items()},
            )
            for mode, rounds in modes.items()
        }
        for case, modes in steps.items()
    }


def _timing(steps: Sequence[Step]) -> Timing:
    return Timing(
        seconds=sum(one.seconds for one in steps),
        tokens=sum(one.tokens for one in steps),
        sampled_rows=sum(one.sampled_rows for one in steps),
        steps=len(steps),
    )


def of_role(modes: Mapping[str, Timed], *roles: Role) -> dict[str, Timed]:
    """The modes that are there for one of these."""
    return {name: one for name, one in modes.items() if one.role in roles}


def tokens(samples: Iterable[Any]) -> kind.Tokens:
    """What modes that must not differ have drawn, and how far their logits are off."""
    hashes: dict[str, dict[str, str]] = {}
    errors: dict[str, float] = {}
    for one in samples:
        if isinstance(one, Comparison):
            hashes.setdefault(one.case, {})[one.mode] = one.tokens_sha256
            errors[one.mode] = max(one.error, errors.get(one.mode, 0.0))
    return kind.Tokens(hashes=hashes, logit_errors=errors)


def best_sequential(modes: Mapping[str, Timed]) -> str | None:
    """The fastest mode that splits nothing; None if there is none."""
    found = of_role(modes, Role.SEQUENTIAL)
    return max(found, key=lambda name: found[name].per_s, default=None)


def twin(mode: str) -> str:
    """The mode that `again` is the same as."""
    return mode.removesuffix(" again")


def hidden(over: Timed, under: Timed, alone: Timed) -> list[float]:
    """Time saved as a share of decode attention alone, of each round that all three have."""
    shared = under.rounds.keys() & over.rounds.keys() & alone.rounds.keys()
    return [
        (under.rounds[i].token_s - over.rounds[i].token_s) / alone.rounds[i].token_s
        for i in sorted(shared)
    ]


def ratios(over: Timed, under: Timed) -> list[float]:
    """How many times as fast one mode is as another, of each round that both have."""
    shared = sorted(over.rounds.keys() & under.rounds.keys())
    return [over.rounds[i].per_s / under.rounds[i].per_s for i in shared]


def optimum(run: manifest.Run, ceilings: figures.Ceilings) -> float:
    """The paper's optimum in tokens per second: equation 5 at the measured rate of products."""
    return ceilings.of(FLOPS_CEILING) / (2 * run.setting["active_parameters"])


def speedups_of_cutting(cases: Cases) -> dict[int, float]:
    """By dense batch of the sweep, the speed of the fastest mode that cuts over the sequential."""
    found = {}
    for case, modes in cases.items():
        tokens, best = ablation_sweep.try_tokens(case), best_sequential(modes)
        cut = of_role(modes, Role.OVERLAPPED) or of_role(modes, Role.SPLIT)
        speedups = [ratios(one, modes[best]) for one in cut.values()] if best else []
        if tokens is not None and any(speedups):
            found[tokens] = max(statistics.median(one) for one in speedups if one)
    return found


def _figures(evidence: kind.Evidence) -> list[figures.Figure]:
    cases = timed(evidence.samples)
    found = [
        figure
        for case, modes in cases.items()
        for part in (_speeds, _ratios, _hidden, _operations_of)
        for figure in part(case, modes, evidence)
    ]
    threshold = ablation_sweep.threshold(speedups_of_cutting(cases))
    if threshold is not None:
        found.append(figures.summarise(THRESHOLD, "tokens", [float(threshold)]))
    return found


def _speeds(
    case: str, modes: Mapping[str, Timed], evidence: kind.Evidence
) -> Iterator[figures.Figure]:
    run, ceilings = evidence.run, evidence.ceilings
    for name, one in of_role(modes, *(set(Role) - {Role.ALONE})).items():
        rounds = [*one.rounds.values()]
        speeds = [timing.per_s for timing in rounds]
        yield figures.summarise(f"{case}: {name}", "tokens/s", speeds)
        if ceilings is None:
            continue
        yield figures.summarise(
            f"{case}: {name}, executed",
            "operations/s",
            [_operations(timing, run.setting) / timing.seconds for timing in rounds],
            ceiling=FLOPS_CEILING,
            ceilings=ceilings,
        )
        shares = [speed / optimum(run, ceilings) for speed in speeds]
        yield figures.summarise(f"{case}: {name} over the paper's optimum", "x", shares)


def _operations(timing: Timing, setting: Mapping[str, Any]) -> float:
    """Of products alone: the embedding is a gather, and the head sees sampled rows only."""
    layers = setting["layer_parameters"] * timing.tokens
    return 2.0 * (layers + setting["head_parameters"] * timing.sampled_rows)


def _ratios(
    case: str, modes: Mapping[str, Timed], evidence: kind.Evidence
) -> Iterator[figures.Figure]:
    best = best_sequential(modes)
    for name, one in of_role(modes, *(set(Role) - {Role.ALONE})).items():
        others: list[str | None] = [twin(name) if one.role is Role.AGAIN else best]
        if one.role is Role.OVERLAPPED:
            others += of_role(modes, Role.SPLIT)
        for other in others:
            if other is None or other not in modes or other == name:
                continue
            if found := ratios(one, modes[other]):
                yield figures.summarise(f"{case}: {name} over {other}", "x", found)


def _hidden(
    case: str, modes: Mapping[str, Timed], evidence: kind.Evidence
) -> Iterator[figures.Figure]:
    alone = next(iter(of_role(modes, Role.ALONE).values()), None)
    best = best_sequential(modes)
    if alone is None or best is None:
        return
    for name, one in of_role(modes, Role.OVERLAPPED, Role.CONTROL).items():
        for other in (best, *of_role(modes, Role.SPLIT)):
            if found := hidden(one, modes[other], alone):
                yield figures.summarise(f"{case}: {name}, hidden share of {other}", "x", found)


def _operations_of(
    case: str, modes: Mapping[str, Timed], evidence: kind.Evidence
) -> Iterator[figures.Figure]:
    best = best_sequential(modes)
    if best is None:
        return
    traced = [s for s in evidence.samples if isinstance(s, Traced) and s.case == case]
    yield from ablation_operations.slowdowns(
        case,
        {one.mode: one.operation_s for one in traced},
        best=best,
        split=of_role(modes, Role.SPLIT),
        overlapped=of_role(modes, Role.OVERLAPPED),
    )


def _complaints(evidence: kind.Evidence) -> list[str]:
    cases = timed(evidence.samples)
    found = [
        *_wrong_tokens(evidence),
        *_differing_rounds(evidence),
        *_short_rounds(cases, evidence.run),
    ]
    if kind.is_gpu(evidence.run):
        found += _failed_controls(cases)
    return found or ([] if cases else ["nothing was timed"])


def _wrong_tokens(evidence: kind.Evidence) -> Iterator[str]:
    for one in evidence.samples:
        if not isinstance(one, Comparison):
            continue
        if one.wrong:
            yield f"{one.case}: {one.mode} drew {one.wrong} wrong tokens of {one.tokens}"
        if not one.error <= one.most_error:
            yield (
                f"{one.case}: logits of {one.mode} are off by {one.error:.2g} of the best, and "
                f"rounding makes {one.most_error:.2g} at most"
            )


def _differing_rounds(evidence: kind.Evidence) -> Iterator[str]:
    """Same steps from the same state: a mode repeats itself, in float32 all modes each other."""
    first: dict[tuple[str, str, int], Step] = {}
    told: set[tuple[str, str]] = set()
    are_equal = evidence.run.setting["dtype"] == FLOAT32
    for one in evidence.samples:
        if not isinstance(one, Step) or one.role is Role.ALONE:
            continue
        group = "" if are_equal else twin(one.mode)
        other = first.setdefault((one.case, group, one.step), one)
        if other.tokens_sha256 != one.tokens_sha256 and (one.case, one.mode) not in told:
            told.add((one.case, one.mode))
            yield (
                f"{one.case}: step {one.step} of round {one.round} of {one.mode} gave other tokens "
                f"than of round {other.round} of {other.mode}"
            )


def _short_rounds(cases: Cases, run: manifest.Run) -> Iterator[str]:
    for case, modes in cases.items():
        for mode, one in modes.items():
            for number, timing in one.rounds.items():
                if timing.steps != run.setting["steps"]:
                    yield (
                        f"{case}: round {number} of {mode} has {timing.steps} steps of "
                        f"{run.setting['steps']}"
                    )


def _failed_controls(cases: Cases) -> Iterator[str]:
    for case, modes in cases.items():
        alone = next(iter(of_role(modes, Role.ALONE).values()), None)
        best = best_sequential(modes)
        for name, one in of_role(modes, Role.CONTROL).items():
            if alone is None or best is None:
                continue
            shares = hidden(one, modes[best], alone)
            if shares and statistics.median(shares) >= MOST_HIDDEN_BY_CONTROL:
                yield (
                    f"{case}: {name} cannot overlap and hides {statistics.median(shares):.2f} all "
                    "the same"
                )
        for name, one in of_role(modes, Role.AGAIN).items():
            found = ratios(one, modes[twin(name)]) if twin(name) in modes else []
            if found and abs(statistics.median(found) - 1) > MOST_NOISE:
                yield (
                    f"{case}: {twin(name)} was {statistics.median(found):.3f} times as fast when "
                    "measured again"
                )


KIND = kind.Kind(
    name="ablation",
    sample=SAMPLE,
    files=lambda run: frozenset({manifest.SAMPLES, manifest.TOKENS, manifest.CURVES}),
    needs_ceilings=kind.is_gpu,
    needs_fitness=kind.is_gpu,
    # On a CPU nothing can overlap: what it shows is that the modes give the same tokens.
    level=kind.device_level,
    figures=_figures,
    complaints=_complaints,
    is_headline=lambda run, figure: not any(part in figure.name for part in _DETAILS),
)
