"""Kind `throughput`: an engine runs each mix of a workload several times, offline and greedy."""

from collections.abc import Mapping, Sequence

import msgspec

from nanoflow_jax.results import figures, kind, manifest


class Sample(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run of a mix.

    Attributes:
        case: Name of the mix.
        round: Which run of it.
        requests: How many.
        input_tokens: Of all prompts.
        asked_tokens: That were to be generated.
        output_tokens: Generated.
        seconds: From the first submission to the last token.
        steps: Launched.
        tokens_sha256: Of the generated tokens, request by request.
        first_token_s: Per request, from its submission to its first token.
        per_token_s: Per request of at least two tokens, mean time between tokens.
    """

    case: str
    round: int
    requests: int
    input_tokens: int
    asked_tokens: int
    output_tokens: int
    seconds: float
    steps: int
    tokens_sha256: str
    first_token_s: tuple[float, ...]
    per_token_s: tuple[float, ...]


def _cases(evidence: kind.Evidence) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = {}
    for sample in evidence.samples:
        found.setdefault(sample.case, []).append(sample)
    return found


def _figures(evidence: kind.Evidence) -> list[figures.Figure]:
    made = []
    for case, runs in _cases(evidence).items():
        output = [run.output_tokens / run.seconds for run in runs]
        both = [(run.input_tokens + run.output_tokens) / run.seconds for run in runs]
        made.append(figures.summarise(f"{case}: output", "tokens/s", output))
        made.append(figures.summarise(f"{case}: input and output", "tokens/s", both))
    return made


def complaints(cases: Mapping[str, Sequence[Sample]]) -> list[str]:
    """What is wrong with runs that are to do the same, by what they are called."""
    differing = [
        f"runs of {case} gave different tokens"
        for case, runs in cases.items()
        if len({run.tokens_sha256 for run in runs}) > 1
    ]
    short = [
        f"run {run.round} of {case} gave {run.output_tokens} tokens of {run.asked_tokens}"
        for case, runs in cases.items()
        for run in runs
        if run.output_tokens != run.asked_tokens
    ]
    return differing + short


def _level(run: manifest.Run) -> kind.Level:
    """Of kernels that were interpreted counts what they gave, not how fast."""
    return kind.Level.CPU_NUMERICS if run.plan.get("interpreted") else kind.Level.ONE_RUN


KIND = kind.Kind(
    name="throughput",
    sample=Sample,
    files=lambda run: frozenset({manifest.SAMPLES}),
    needs_ceilings=kind.is_gpu,
    level=_level,
    figures=_figures,
    complaints=lambda evidence: complaints(_cases(evidence)),
)
