"""What a kind of result must hold, and what its samples come to."""

import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from nanoflow_jax.results.figures import Ceilings, Figure
from nanoflow_jax.results.manifest import Run


class Level(enum.IntEnum):
    """How much a figure is worth: the level is printed beside every claim."""

    MODEL = 0
    CPU_NUMERICS = 1
    COMPILED = 2
    ONE_RUN = 3
    REPEATED = 4
    THIRD_PARTY = 5

    @property
    def words(self) -> str:
        """For people: `E3, one run`."""
        return f"E{int(self)}, {_WORDS[self]}"


_WORDS = {
    Level.MODEL: "computed from a model",
    Level.CPU_NUMERICS: "numbers checked on a CPU",
    Level.COMPILED: "compiled, not yet measured",
    Level.ONE_RUN: "one run",
    Level.REPEATED: "repeated on another day",
    Level.THIRD_PARTY: "repeated by a third party",
}


def is_gpu(run: Run) -> bool:
    """Whether a GPU is measured."""
    return run.device.platform == "gpu"


def device_level(run: Run) -> Level:
    """What one run of kernels is worth: of a CPU, which interprets them, it is what they give."""
    return Level.ONE_RUN if is_gpu(run) else Level.CPU_NUMERICS


class Tokens(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """tokens.json: what modes that must not differ have generated.

    Attributes:
        hashes: SHA-256 of the tokens, by workload and in it by mode.
        logit_errors: Distance of a mode's logits from the reference, by mode.
    """

    hashes: dict[str, dict[str, str]]
    logit_errors: dict[str, float] = {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a kind's figures are made from.

    Attributes:
        run: What was to be done.
        samples: Of the kind's sample type, in the order of time.
        ceilings: None if none were measured.
        unfit: What makes the device unfit to be measured; None if nobody looked.
    """

    run: Run
    samples: Sequence[Any]
    ceilings: Ceilings | None
    unfit: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of result.

    Attributes:
        name: As manifests say it.
        sample: A msgspec.Struct, or a union of tagged ones; fields `case`, `mode`, `round` and
            `step`, where it has them, are checked for gaps.
        files: Names of files that a finished run must have, of `manifest.FILES`.
        needs_ceilings: Whether ceilings must have been measured before and after.
        needs_fitness: Whether somebody must have looked if the device is fit to be measured.
        level: What a single finished run is worth.
        figures: What samples come to. The only place where that is computed.
        complaints: What is wrong beyond what holds for all kinds; empty if nothing.
        complaints_today: What is wrong of a run by kernels that have not changed since.
        is_headline: Whether the README shows a figure of a run.
    """

    name: str
    sample: Any
    files: Callable[[Run], frozenset[str]]
    needs_ceilings: Callable[[Run], bool]
    level: Callable[[Run], Level]
    figures: Callable[[Evidence], list[Figure]]
    needs_fitness: Callable[[Run], bool] = lambda run: False
    complaints: Callable[[Evidence], list[str]] = lambda evidence: []
    complaints_today: Callable[[Run], list[str]] = lambda run: []
    is_headline: Callable[[Run, Figure], bool] = lambda run, figure: True
