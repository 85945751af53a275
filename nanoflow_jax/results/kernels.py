"""Kind `kernels`: each kernel on shares of a GPU, beside what else does the same.

What a problem computes and moves stands in the result, so that one from before a change of
pallas_kernels.problem_shapes comes to what it came to.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from nanoflow_jax.results import figures, kind, manifest
from pallas_kernels import problem_shapes

OURS = "pallas"
IN_TURN = "pallas, one then the other"
ALL = "all"  # the way of a problem whose operands have no room
FLOPS_CEILING = "bf16_product_flops_per_s"
COPY_CEILING = "copy_bytes_per_s"
READ_CEILING = "read_bytes_per_s"

# One problem of each kernel that the README shows, at the largest size.
HEADLINES = (
    "llama-3-8b/gate_up/4096",
    "llama-3-8b/down/4096",
    "llama-3-8b/decode/256x1024",
    "llama-3-8b/prefill/1x8192+0",
    "llama-3-8b/decode+gate_up/1024",
    "mixtral-8x7b/gate_up/4096",
)
# The share of the SMs that decode attention has beside products.
_DECODE_SHARE = 48


class Sample(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Some calls of one way to do a problem, or why there are none.

    Attributes:
        case: Name of the problem, see pallas_kernels.problem_shapes.
        mode: The way and its share, unique in the case.
        way: pallas is ours on a share; others name an implementation.
        num_ctas: SMs it may use; None if nothing caps it.
        split: Of those, SMs of the product in a pair.
        round: Which round over all modes.
        calls: Of which seconds is the mean.
        seconds: Of one call; None if it was not timed.
        method: cupti, sum of the times of its kernels; or wall, of queued calls.
        error: Distance from the reference on the same operands, as a share of it in the 2-norm.
        fault: Why it was not timed; empty if it was.
        is_missing: Whether it was not timed because it cannot be had here.
    """

    case: str
    mode: str
    way: str
    num_ctas: int | None = None
    split: int | None = None
    round: int = 0
    calls: int = 0
    seconds: float | None = None
    method: str = ""
    error: float | None = None
    fault: str = ""
    is_missing: bool = False


class Work(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a problem comes to.

    Attributes:
        kernel: Which one solves it, of pallas_kernels.problem_shapes.KERNELS.
        flops: Floating-point operations, a multiplication and an addition as two.
        num_bytes: Read and written at least.
    """

    kernel: str
    flops: int
    num_bytes: int


def setting_of(problems: Iterable[problem_shapes.Problem]) -> dict[str, Any]:
    """What a result's setting says of its problems, by name; `works` reads it."""
    return {problem.name: msgspec.to_builtins(_work(problem.shape)) for problem in problems}


def works(run: manifest.Run) -> dict[str, Work]:
    """What the problems of a run come to, by name.

    Raises:
        ValueError: Its setting does not say.
    """
    try:
        return msgspec.convert(run.setting.get("problems"), dict[str, Work])
    except msgspec.ValidationError as error:
        raise ValueError(
            f"the setting's `problems` do not say what each computes and moves: {error}"
        ) from error


def work_of(case: str, found: Mapping[str, Work]) -> Work:
    """What a case comes to.

    Raises:
        ValueError: It is not among those found.
    """
    if case not in found:
        raise ValueError(f"the setting's `problems` have no {case!r}, which samples are of")
    return found[case]


def _work(shape: problem_shapes.Shape) -> Work:
    return Work(kernel=shape.KERNEL, flops=shape.flops, num_bytes=shape.num_bytes)


def mode(way: str, num_ctas: int | None, split: int | None) -> str:
    """Name of a way with a share: `xla`, `pallas 48`, `pallas 84+48`."""
    if num_ctas is None:
        return way
    return f"{way} {num_ctas}" if split is None else f"{way} {split}+{num_ctas - split}"


def is_our_fault(sample: Sample) -> bool:
    """Whether it says that a kernel of ours, or a whole problem, failed or was wrong."""
    return bool(sample.fault) and not sample.is_missing and sample.way.startswith((OURS, ALL))


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile, ends included; of one value, that value."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def by_mode(samples: Iterable[Sample]) -> dict[str, dict[str, list[Sample]]]:
    """Timed samples, by case and in it by mode, in the order of time."""
    found: dict[str, dict[str, list[Sample]]] = {}
    for sample in samples:
        if sample.seconds is not None:
            found.setdefault(sample.case, {}).setdefault(sample.mode, []).append(sample)
    return found


def bound(work: Work, ceilings: figures.Ceilings) -> str:
    """Name of the ceiling that limits a problem: the one at which it takes longer.

    Of memory the faster of a copy and of reading alone.
    """
    memory = max(COPY_CEILING, READ_CEILING, key=ceilings.of)
    flops_s = work.flops / ceilings.of(FLOPS_CEILING)
    return FLOPS_CEILING if flops_s >= work.num_bytes / ceilings.of(memory) else memory


def shape_of(case: str) -> problem_shapes.Shape:
    """The shape of a case.

    Raises:
        ValueError: There is no problem of that name.
    """
    for problem in (*problem_shapes.problems(), *problem_shapes.tiny_problems()):
        if problem.name == case:
            return problem.shape
    raise ValueError(f"there is no problem {case!r} in pallas_kernels/problem_shapes.py")


def rate(
    work: Work, samples: Sequence[Sample], ceilings: figures.Ceilings | None
) -> figures.Figure:
    """Operations or bytes per second of one mode, and its share of what the device can do.

    Args:
        work: Of the samples' case.
        samples: Timed ones of one mode.
        ceilings: Of the device, which say which of the two counts; operations where there are none.
    """
    limit = None if ceilings is None else bound(work, ceilings)
    is_memory = limit in (COPY_CEILING, READ_CEILING)
    amount = work.num_bytes if is_memory else work.flops
    return figures.summarise(
        f"{samples[0].case}: {samples[0].mode}",
        "bytes/s" if is_memory else "operations/s",
        [amount / sample.seconds for sample in samples if sample.seconds is not None],
        ceiling=limit,
        ceilings=ceilings,
    )


def curve(
    case: str, modes: Mapping[str, Sequence[Sample]], rates: Mapping[str, figures.Figure]
) -> dict[int, figures.Figure]:
    """What share of its speed our kernel has on how many SMs; the last is all of them.

    Args:
        case: Of the samples.
        modes: Timed samples by mode.
        rates: Of the same modes.

    Returns:
        By SMs; empty if it was not timed on shares.
    """
    ours = {
        one[0].num_ctas: name
        for name, one in modes.items()
        if one[0].way == OURS and one[0].split is None and one[0].num_ctas is not None
    }
    if len(ours) < 2:
        return {}
    most = max(ours)
    return {
        share: figures.ratio(f"{case}: {share} of {most} SMs", rates[name], rates[ours[most]])
        for share, name in sorted(ours.items())
    }


def best(modes: Mapping[str, Sequence[Sample]], way: str) -> str | None:
    """The fastest mode of a way by the median; None if it was not timed."""
    medians = {
        name: statistics.median(sample.seconds for sample in one if sample.seconds is not None)
        for name, one in modes.items()
        if one[0].way == way
    }
    return min(medians, key=lambda name: (medians[name], name), default=None)


def speedups(
    case: str, modes: Mapping[str, Sequence[Sample]], rates: Mapping[str, figures.Figure]
) -> list[figures.Figure]:
    """How many times as fast the best of ours is as the best of each other way."""
    ours = best(modes, OURS)
    if ours is None:
        return []
    others = dict.fromkeys(one[0].way for one in modes.values() if one[0].way != OURS)
    found = []
    for way in others:
        other = best(modes, way)
        assert other is not None
        found.append(figures.ratio(f"{case}: {ours} over {other}", rates[ours], rates[other]))
    return found


def _figures(evidence: kind.Evidence) -> list[figures.Figure]:
    found: list[figures.Figure] = []
    problems = works(evidence.run)
    for case, modes in by_mode(evidence.samples).items():
        work = work_of(case, problems)
        rates = {name: rate(work, one, evidence.ceilings) for name, one in modes.items()}
        found += [
            *rates.values(),
            *curve(case, modes, rates).values(),
            *speedups(case, modes, rates),
        ]
    return found


def _is_headline(run: manifest.Run, figure: figures.Figure) -> bool:
    """Whether it is our kernel's speed on all SMs or on decode's share, or against another way."""
    case, _, what = figure.name.partition(": ")
    if case not in HEADLINES:
        return False
    shown = {mode(OURS, num_ctas, None) for num_ctas in (run.setting.get("num_sms"), _DECODE_SHARE)}
    return what in shown or " over " in what


def _complaints(evidence: kind.Evidence) -> list[str]:
    # What failed stands in the samples and takes nothing from the rest.
    return [] if by_mode(evidence.samples) else ["nothing was timed"]


def _complaints_today(run: manifest.Run) -> list[str]:
    """Problems that do not come to what they come to by the code as it is."""
    found = []
    for case, work in works(run).items():
        try:
            wanted = _work(shape_of(case))
        except ValueError as error:
            found.append(str(error))
            continue
        if work != wanted:
            found.append(
                f"{case} is recorded as {_said(work)}; pallas_kernels/problem_shapes.py, which has "
                f"not changed, makes it {_said(wanted)}"
            )
    return found


def _said(work: Work) -> str:
    return f"{work.kernel}, {work.flops} operations, {work.num_bytes} bytes"


KIND = kind.Kind(
    name="kernels",
    sample=Sample,
    files=lambda run: frozenset({manifest.SAMPLES, manifest.CURVES}),
    needs_ceilings=kind.is_gpu,
    needs_fitness=kind.is_gpu,
    level=kind.device_level,
    figures=_figures,
    complaints=_complaints,
    complaints_today=_complaints_today,
    is_headline=_is_headline,
)
