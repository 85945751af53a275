"""Says on a terminal what kernels were measured to do."""

from collections.abc import Iterator, Mapping, Sequence

from nanoflow_jax.results import figures, kernels
from nanoflow_jax.results.kernels import Sample, Work

_WORDS = {
    kernels.FLOPS_CEILING: "arithmetic",
    kernels.COPY_CEILING: "memory",
    kernels.READ_CEILING: "memory",
}
_HEAD = f"  {'way':<32}{'us':>11}  {'quartiles':<24}{'TFLOP/s':>8}{'GB/s':>7}  of ceiling"


def table(
    samples: Sequence[Sample], works: Mapping[str, Work], ceilings: figures.Ceilings | None
) -> Iterator[str]:
    """Lines for people: each problem with all that did it, its curve, and what failed.

    Args:
        samples: Of one result.
        works: What its problems come to, by name.
        ceilings: Of the device; None where there are none.
    """
    for case, modes in kernels.by_mode(samples).items():
        yield from _case(case, modes, kernels.work_of(case, works), ceilings)
    missing: dict[str, list[str]] = {}
    for sample in samples:
        if sample.is_missing:
            missing.setdefault(f"{sample.mode} {sample.fault}", []).append(sample.case)
        elif sample.fault:
            yield f"FAILED: {sample.case}, {sample.mode}: {sample.fault}"
    for what, cases in missing.items():
        yield f"not there: {what} ({len(cases)} problems)"


def _case(
    case: str,
    modes: Mapping[str, Sequence[Sample]],
    work: Work,
    ceilings: figures.Ceilings | None,
) -> Iterator[str]:
    rates = {name: kernels.rate(work, one, ceilings) for name, one in modes.items()}
    limit = next(iter(rates.values())).ceiling
    words = f", bound by {_WORDS[limit]}" if limit else ""
    amount = f"{work.flops / 1e9:.4g} GFLOP, {work.num_bytes / 1e6:.4g} MB"
    yield f"{case}: {work.kernel}, {amount}{words}"
    yield _HEAD
    curve = kernels.curve(case, modes, rates)
    for name, one in modes.items():
        # Shares are in the curve.
        is_share = one[0].way == kernels.OURS and one[0].split is None
        if curve and is_share and one[0].num_ctas != max(curve):
            continue
        low, middle, high = kernels.quartiles([s.seconds for s in one if s.seconds is not None])
        fraction = rates[name].fraction
        yield (
            f"  {name:<32}{1e6 * middle:>11.1f}  "
            f"{f'{1e6 * low:.1f} to {1e6 * high:.1f}':<24}"
            f"{work.flops / middle / 1e12:>8.1f}{work.num_bytes / middle / 1e9:>7.0f}  "
            f"{'' if fraction is None else f'{fraction:.0%}'}".rstrip()
        )
    if curve:
        most = max(curve)
        points = (f"{share / most:.2f} {one.median:.2f}" for share, one in curve.items())
        yield f"  share of SMs and of speed: {', '.join(points)}"
    for speedup in kernels.speedups(case, modes, rates):
        what = speedup.name.removeprefix(f"{case}: ")
        yield f"  {what}: {speedup.median:.3g} times as fast"
