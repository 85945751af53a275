"""Says on a terminal what an ablation came to."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nanoflow_jax.results import (
    ablation,
    ablation_operations,
    ablation_sweep,
    figures,
    kind,
    manifest,
)
from nanoflow_jax.results.ablation import Role, Timed
from nanoflow_jax.results.figures import Figure

# Of the fastest overlapped mode.
LEAST_HIDDEN = 0.60
LEAST_SPEEDUP = 1.20
LEAST_SEQUENTIAL, LEAST_OVERLAPPED = 0.55, 0.72
LEAST_AT_ANY_BATCH = 0.98
_WITH_GOALS = ("512/512", "1024/512")


def table(samples: Sequence[Any], made: Sequence[Figure]) -> Iterator[str]:
    """Lines for people: each workload's modes, what overlap hides, tokens, and what is missing.

    Args:
        samples: Of one result.
        made: Its figures.
    """
    by_name = {one.name: one for one in made}
    for case, modes in ablation.timed(samples).items():
        yield from _case(case, modes, by_name)
        yield from _operations(case, modes, samples, by_name)
    yield from _threshold(ablation.speedups_of_cutting(ablation.timed(samples)))
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


def _threshold(speedups: Mapping[int, float]) -> Iterator[str]:
    """From which dense batch on cutting pays, as the flag that an engine takes."""
    if not speedups:
        return
    measured = ", ".join(f"{tokens}: {speedups[tokens]:.3f}" for tokens in sorted(speedups))
    found = ablation_sweep.threshold(speedups)
    if found is None:
        yield f"not worth cutting, even at the largest dense batch of the sweep ({measured})"
    else:
        flags = f"--plan=halves --plan_min_tokens={found}"
        yield f"worth cutting from {found} tokens on ({measured}): {flags}"


def _operations(
    case: str, modes: Mapping[str, Timed], samples: Sequence[Any], made: Mapping[str, Figure]
) -> Iterator[str]:
    """Times of operations in the best sequential mode, and how many times as long in others."""
    times = {
        s.mode: s.operation_s for s in samples if isinstance(s, ablation.Traced) and s.case == case
    }
    best = ablation.best_sequential(modes)
    if best is None or best not in times:
        return
    split = [*ablation.of_role(modes, Role.SPLIT)]
    yield f"{case}, operations: ms a step in {best}, and times as long in other modes"
    for operation, seconds in times[best].items():
        line = f"  {operation:<34}{1e3 * seconds:>11.3f}"
        for mode in (*split, *ablation.of_role(modes, Role.OVERLAPPED)):
            names = (ablation_operations.slowdown(case, mode, operation, o) for o in (best, *split))
            found = [f"{made[name].median:.2f}" for name in names if name in made]
            line += f"  {mode}: {', of split '.join(found)}" if found else ""
        yield line
    for mode in split:
        cost = made.get(ablation_operations.cost_of_splitting(case, mode, best))
        if cost is not None:
            yield f"  weights read again, smaller products: {cost.median:+.1%} of {best}"


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
    if not kind.is_gpu(run):
        return
    by_name = {one.name: one for one in made}
    cases = ablation.timed(samples)
    for case in _WITH_GOALS:
        yield from _workload_goals(case, cases.get(case, {}), by_name)
    yield _batch_goal(ablation.speedups_of_cutting(cases))


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


def _batch_goal(speedups: Mapping[int, float]) -> str:
    worst = min(speedups, key=lambda tokens: speedups[tokens], default=None)
    if worst is None:
        return _goal("overlapped over sequential at any batch", None, LEAST_AT_ANY_BATCH)
    batches = ", ".join(map(str, sorted(speedups)))
    name = f"overlapped over sequential at batches of {batches}: worst at {worst}"
    verdict = _goal(name, speedups[worst], LEAST_AT_ANY_BATCH)
    least = ablation_sweep.threshold(speedups)
    if speedups[worst] >= LEAST_AT_ANY_BATCH or least is None:
        return verdict
    return f"{verdict}; met with --plan_min_tokens={least}, below which nothing is cut"


def _goal(name: str, found: float | None, least: float) -> str:
    if found is None:
        return f"not measured: {name}; at least {least:.2f} wanted"
    verdict = "met" if found >= least else "NOT MET"
    return f"{verdict}: {name}: {found:.3f}, at least {least:.2f} wanted"
