"""Says on a terminal what an ablation came to."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nanoflow_jax.results import ablation, figures, manifest
from nanoflow_jax.results.ablation import Role, Timed
from nanoflow_jax.results.figures import Figure

# Of the fastest overlapped mode.
LEAST_HIDDEN = 0.60
LEAST_SPEEDUP = 1.20
LEAST_SEQUENTIAL, LEAST_OVERLAPPED = 0.55, 0.72
LEAST_AT_ANY_BATCH = 0.98
_WITH_GOALS = ("512/512", "1024/512")
_BATCH = "batch "


def table(samples: Sequence[Any], made: Sequence[Figure]) -> Iterator[str]:
    """Lines for people: each workload's modes, what overlap hides, tokens, and what is missing.

    Args:
        samples: Of one result.
        made: Its figures.
    """
    by_name = {one.name: one for one in made}
    for case, modes in ablation.timed(samples).items():
        yield from _case(case, modes, by_name)
    yield from _tokens(samples)
    missing: dict[str, list[str]] = {}
    for one in samples:
        if isinstance(one, ablation.Missing):
            missing.setdefault(f"{one.mode}: {one.reason}", []).append(one.case)
    for what, cases in missing.items():
        yield f"not there: {what} ({', '.join(cases)})"


def _case(case: str, modes: Mapping[str, Timed], made: Mapping[str, Figure]) -> Iterator[str]:
    best = ablation.best_sequential(modes)
    yield f"{case}, tokens/s: median, and all of so many rounds"
    for name, one in modes.items():
        if one.role is Role.ALONE:
            each_ms = [1e3 * t.seconds / t.steps for t in one.rounds.values()]
            alone = figures.summarise(name, "ms", each_ms)
            yield f"  {name:<34}{alone.median:>11.3f} ms a step ({alone.count} rounds)"
            continue
        speed = made[f"{case}: {name}"]
        rounds = f"{speed.low:,.1f} to {speed.high:,.1f} of {speed.count}"
        line = f"  {name:<34}{speed.median:>11,.1f}  {rounds:<32}"
        if over := made.get(f"{case}: {name} over {best}"):
            line += f" {over.median:.3f} x the best sequential"
        if share := made.get(f"{case}: {name} over the paper's optimum"):
            line += f", {share.median:.1%} of the paper's optimum"
        if executed := made.get(f"{case}: {name}, executed"):
            line += f", executes {executed.median / 1e12:.0f} TFLOP/s ({executed.fraction:.1%})"
        if hidden := made.get(f"{case}: {name}, hidden share of {best}"):
            line += f", h {hidden.median:.2f}"
        yield line.rstrip()


def _tokens(samples: Sequence[Any]) -> Iterator[str]:
    for one in samples:
        if isinstance(one, ablation.Comparison):
            verdict = "FAILED" if one.wrong or not one.error <= one.most_error else "ok"
            yield (
                f"{verdict}: {one.case}, {one.mode}: {one.wrong} of {one.tokens - one.ties} tokens "
                f"differ ({one.ties} ties left out), logits off by {one.error:.1e} of at most "
                f"{one.most_error:.1e}"
            )


def goals(run: manifest.Run, samples: Sequence[Any], made: Sequence[Figure]) -> Iterator[str]:
    """Whether each goal of the overlapped modes is met; nothing without a GPU.

    Args:
        run: What was to be done.
        samples: Of one result.
        made: Its figures.
    """
    if run.device.platform != "gpu":
        return
    by_name = {one.name: one for one in made}
    cases = ablation.timed(samples)
    for case in _WITH_GOALS:
        yield from _workload_goals(case, cases.get(case, {}), by_name)
    batches = {case: modes for case, modes in cases.items() if case.startswith(_BATCH)}
    yield _batch_goal(batches, by_name)


def _workload_goals(
    case: str, modes: Mapping[str, Timed], made: Mapping[str, Figure]
) -> Iterator[str]:
    best = ablation.best_sequential(modes)
    overlapped = ablation.of_role(modes, Role.OVERLAPPED)
    if best is None or not overlapped:
        yield f"not measured: the goals of {case}"
        return
    fastest = max(overlapped, key=lambda name: overlapped[name].per_s)
    for name, least in (
        (f"{case}: {fastest}, hidden share of {best}", LEAST_HIDDEN),
        (f"{case}: {fastest} over {best}", LEAST_SPEEDUP),
        (f"{case}: {best} over the paper's optimum", LEAST_SEQUENTIAL),
        (f"{case}: {fastest} over the paper's optimum", LEAST_OVERLAPPED),
    ):
        found = made.get(name)
        yield _goal(name, None if found is None else found.median, least)


def _batch_goal(batches: Mapping[str, Mapping[str, Timed]], made: Mapping[str, Figure]) -> str:
    ratios = {
        case: found.median
        for case, modes in batches.items()
        for name in ablation.of_role(modes, Role.OVERLAPPED)
        if (found := made.get(f"{case}: {name} over {ablation.best_sequential(modes)}"))
    }
    worst = min(ratios, key=lambda case: ratios[case], default=None)
    if worst is None:
        return _goal("overlapped over sequential at any batch", None, LEAST_AT_ANY_BATCH)
    name = f"overlapped over sequential at {', '.join(ratios)}: worst at {worst}"
    return _goal(name, ratios[worst], LEAST_AT_ANY_BATCH)


def _goal(name: str, found: float | None, least: float) -> str:
    if found is None:
        return f"not measured: {name}; at least {least:.2f} wanted"
    verdict = "met" if found >= least else "NOT MET"
    return f"{verdict}: {name}: {found:.3f}, at least {least:.2f} wanted"
