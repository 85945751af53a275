"""What makes a result one that nothing may be claimed from, once for all kinds."""

import itertools
from collections.abc import Iterator
from typing import Any

from nanoflow_jax.results import figures
from nanoflow_jax.results.kind import Evidence, Kind, Tokens
from nanoflow_jax.results.manifest import SAMPLES, TOKENS

MOST_DRIFT = 0.05  # of a ceiling from before a run to after it


def derive(kind: Kind, evidence: Evidence) -> tuple[figures.Figure, ...]:
    """The figures of a result.

    Raises:
        ValueError: The samples do not give them; the message says why.
    """
    try:
        found = tuple(kind.figures(evidence))
    except ZeroDivisionError as error:
        raise ValueError(f"{SAMPLES}: a sample took no time") from error
    except OverflowError as error:
        raise ValueError(f"{SAMPLES}: a number is too large: {error}") from error
    names = [figure.name for figure in found]
    if len(set(names)) < len(names):
        raise ValueError(f"two figures of kind {kind.name} have one name")
    return found


def complaints(kind: Kind, evidence: Evidence, tokens: Tokens | None) -> Iterator[str]:
    """Reasons why nothing may be claimed from what was measured; none if it is good.

    Args:
        kind: Of the result.
        evidence: What was measured.
        tokens: Of tokens.json; None if there is none.
    """
    yield from _gaps(evidence)
    yield from _drift(kind, evidence)
    yield from _unfit(kind, evidence)
    yield from kind.complaints(evidence)
    if tokens is not None:
        yield from _differing_tokens(tokens)
    try:
        found = derive(kind, evidence)
    except ValueError as error:
        yield str(error)
        return
    for figure in found:
        if figure.fraction is not None and figure.fraction > 1:
            yield f"{figure.name}: {figure.fraction:.1%} of the ceiling {figure.ceiling}"


def _gaps(evidence: Evidence) -> Iterator[str]:
    wanted, found = evidence.run.num_samples, len(evidence.samples)
    if wanted is not None and found != wanted:
        yield f"{SAMPLES}: {found} samples, {wanted} were to be taken"
    steps: dict[Any, list[int]] = {}
    rounds: dict[Any, list[int]] = {}
    for line, sample in enumerate(evidence.samples, start=1):
        if (getattr(sample, "seconds", None) or 0.0) < 0:
            yield f"{SAMPLES}: line {line} took {sample.seconds} s"
    for sample in evidence.samples:
        key = tuple(getattr(sample, name, None) for name in ("case", "mode"))
        number, step = getattr(sample, "round", None), getattr(sample, "step", None)
        if step is not None:
            steps.setdefault((*key, number), []).append(step)
        if number is not None and number not in rounds.setdefault(key, []):
            rounds[key].append(number)
        elif number is not None and step is None:
            yield f"{SAMPLES}: round {number} of {_words(key)} is there twice"
    for word, groups in (("step", steps), ("round", rounds)):
        for key, numbers in groups.items():
            for wanted_number, number in enumerate(numbers):
                if number != wanted_number:
                    where = _words(key)
                    yield f"{SAMPLES}: after {wanted_number} {word}s of {where} comes {number}"
                    break


def _words(key: tuple[Any, ...]) -> str:
    said = zip(("case", "mode", "round"), key, strict=False)
    return ", ".join(f"{name} {value}" for name, value in said if value is not None) or "the run"


def _drift(kind: Kind, evidence: Evidence) -> Iterator[str]:
    ceilings = evidence.ceilings
    if ceilings is None:
        if kind.needs_ceilings(evidence.run):
            yield "no ceilings were measured before and after"
        return
    if ceilings.before.keys() != ceilings.after.keys():
        yield "other ceilings were measured before than after"
    for name in sorted(ceilings.before.keys() & ceilings.after.keys()):
        before, after = ceilings.before[name], ceilings.after[name]
        if min(before, after) <= 0:
            yield f"the ceiling {name} is not above 0"
        elif not figures.do_agree(before, after, within=MOST_DRIFT):
            change = after / before - 1
            yield f"the ceiling {name} drifted by {change:+.1%} during the run"


def _unfit(kind: Kind, evidence: Evidence) -> Iterator[str]:
    if evidence.unfit is None and kind.needs_fitness(evidence.run):
        yield "nobody looked whether the device is fit to be measured"
    for said in evidence.unfit or ():
        yield f"the device was not fit to be measured: {said}"


def _differing_tokens(tokens: Tokens) -> Iterator[str]:
    for workload, modes in tokens.hashes.items():
        for one, other in itertools.pairwise(modes):
            if modes[one] != modes[other]:
                yield f"{TOKENS}: {workload}: modes {one} and {other} gave different tokens"
