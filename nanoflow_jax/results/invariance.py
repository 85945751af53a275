"""Kind `invariance`: an engine with --batch_invariant and one without run the same mixes in turn.

tokens.json has what some requests gave alone and among all others of a mix, logprobs included: with
the setting both must be the same to the last bit, or nothing may be claimed of its cost.
"""

from collections.abc import Mapping, Sequence

from nanoflow_jax.results import figures, kind, manifest, throughput

MODES = PLAIN, INVARIANT = ("plain", "invariant")


class Sample(throughput.Sample, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run of a mix.

    Attributes:
        mode: One of MODES.
    """

    mode: str


def _speeds(evidence: kind.Evidence) -> Mapping[str, Mapping[str, Sequence[float]]]:
    """Generated tokens per second in each round, by mix and mode."""
    found: dict[str, dict[str, list[float]]] = {}
    for run in evidence.samples:
        speeds = found.setdefault(run.case, {}).setdefault(run.mode, [])
        speeds.append(run.output_tokens / run.seconds)
    return found


def _figures(evidence: kind.Evidence) -> list[figures.Figure]:
    made = []
    for case, by_mode in _speeds(evidence).items():
        missing = [mode for mode in MODES if mode not in by_mode]
        if missing:
            raise ValueError(f"{case} has no run of mode {' and '.join(missing)}")
        made += [
            figures.summarise(f"{case}, {mode}: output", "tokens/s", by_mode[mode])
            for mode in MODES
        ]
        # Runs of one round were taken one after the other, on a machine in one state.
        rounds = zip(by_mode[INVARIANT], by_mode[PLAIN], strict=False)
        shares = [invariant / plain for invariant, plain in rounds]
        made.append(figures.summarise(f"{case}: invariant of plain", "x", shares))
    return made


def _complaints(evidence: kind.Evidence) -> list[str]:
    found: dict[str, list[throughput.Sample]] = {}
    for run in evidence.samples:
        found.setdefault(f"{run.case}, {run.mode}", []).append(run)
    return throughput.complaints(found)


def _level(run: manifest.Run) -> kind.Level:
    is_interpreted = any(plan.get("interpreted") for plan in run.plan.values())
    return kind.Level.CPU_NUMERICS if is_interpreted else kind.Level.ONE_RUN


KIND = kind.Kind(
    name="invariance",
    sample=Sample,
    files=lambda run: frozenset({manifest.SAMPLES, manifest.TOKENS}),
    needs_ceilings=kind.is_gpu,
    level=_level,
    figures=_figures,
    complaints=_complaints,
)
