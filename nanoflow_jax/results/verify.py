"""Works out again what a result folder claims, and what the claim is worth."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from nanoflow_jax.results import checks, figures, folder, kind, provenance
from nanoflow_jax.results.figures import Figure
from nanoflow_jax.results.folder import Result
from nanoflow_jax.results.kind import Level
from nanoflow_jax.results.manifest import MANIFEST, ResultError, Run

MOST_DISAGREEMENT = 0.05  # of medians of two days


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of verifying a folder.

    Attributes:
        path: The folder.
        result: None if it could not be read.
        complaints: Why it is refused; empty if it is not.
        changed: Kernel sources that are no longer what they were: history, no claim for today.
    """

    path: Path
    result: Result | None
    complaints: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()

    @property
    def word(self) -> str:
        """`verified`, `STALE`, `failed run` or `REFUSED`."""
        if self.complaints or self.result is None:
            return "REFUSED"
        if self.result.manifest.status == "failed":
            return "failed run"
        return "STALE" if self.changed else "verified"

    @property
    def is_claim(self) -> bool:
        """Whether its figures may be claimed of the code as it is."""
        return self.word == "verified"


def verify(path: Path, *, project: Path = provenance.PROJECT) -> Verdict:
    """Verifies one folder.

    Args:
        path: The folder.
        project: The checkout whose kernels are those of today.
    """
    try:
        result = folder.read(path)
        complaints = [*folder.damages(path, result.manifest, result.kind), *_claims(result)]
    except (ResultError, OSError) as error:
        return Verdict(path=path, result=None, complaints=(str(error),))
    changed = tuple(
        provenance.changed_kernels(result.manifest.origin.kernel_sources, project=project)
    )
    if not changed and not complaints and result.manifest.status == "done":
        complaints += result.kind.complaints_today(result.manifest.run)
    return Verdict(path=path, result=result, complaints=tuple(complaints), changed=changed)


def verify_all(root: Path, *, project: Path = provenance.PROJECT) -> list[Verdict]:
    """Verifies every folder under the root of all results, in the order of their names.

    Raises:
        ValueError: There is no such folder.
    """
    if not root.is_dir():
        raise ValueError(f"{root}: there is no such folder of results; see --results")
    found = []
    for device in sorted(root.iterdir()):
        paths = sorted(device.iterdir()) if device.is_dir() else [device]
        found += [verify(path, project=project) for path in paths]
    return found


def levels(verdict: Verdict, among: Sequence[Verdict]) -> dict[str, Level]:
    """What each figure of a verified result is worth.

    Args:
        verdict: Verified, or stale.
        among: Those that may repeat it.

    Returns:
        By the name of the figure.
    """
    assert verdict.result is not None and not verdict.complaints, f"{verdict.path} was refused"
    others = [other for other in among if _repeats(other, verdict)]
    figures_made = verdict.result.manifest.figures
    return {one.name: _level(verdict.result, _agreeing(one, others)) for one in figures_made}


def agreeing(figure: Figure, verdict: Verdict, among: Sequence[Verdict]) -> list[Path]:
    """Folders that repeat a figure of a result on other days, or by others, and agree."""
    others = [other for other in among if _repeats(other, verdict)]
    return [result.path for result in _agreeing(figure, others)]


def _agreeing(figure: Figure, others: Sequence[Verdict]) -> list[Result]:
    return [one.result for one in others if one.result and _agrees(figure, one.result)]


def _level(result: Result, repeats: Sequence[Result]) -> Level:
    single = result.kind.level(result.manifest.run)
    if single < Level.ONE_RUN or not repeats:
        return single
    parties = {one.manifest.run.measured_by for one in (result, *repeats)}
    return Level.REPEATED if len(parties) == 1 else Level.THIRD_PARTY


def _agrees(figure: Figure, other: Result) -> bool:
    return any(
        one.name == figure.name
        and one.unit == figure.unit
        and figures.do_agree(one.median, figure.median, within=MOST_DISAGREEMENT)
        for one in other.manifest.figures
    )


def _repeats(other: Verdict, verdict: Verdict) -> bool:
    """Whether it is the same measurement, by the same kernels, on another day or by others."""
    if not (other.result and verdict.result) or other.word not in ("verified", "STALE"):
        return False
    one, two = verdict.result.manifest, other.result.manifest
    return (
        _what(one.run) == _what(two.run)
        and one.origin.kernel_sources == two.origin.kernel_sources
        and (one.date, one.run.measured_by) != (two.date, two.run.measured_by)
    )


def _what(run: Run) -> tuple[object, ...]:
    """What is measured; the seed and the words of the command may differ."""
    return (
        run.kind,
        run.name,
        run.device,
        run.model,
        run.plan,
        run.setting,
        run.compiler_options,
    )


def _claims(result: Result) -> Iterator[str]:
    found = result.manifest
    file = result.path / MANIFEST
    try:
        found.check()
    except ValueError as error:
        yield f"{file}: {error}"
    if found.status == "running":
        yield (
            f"{result.path}: the run goes on, or was cut off; `python -m nanoflow_jax.evidence "
            f"close {result.path}` makes it a failed run"
        )
        return
    if found.num_samples != len(result.samples):
        yield (
            f"{file}: it says {found.num_samples} samples were taken, {len(result.samples)} are "
            "there"
        )
    if found.status == "failed":
        if found.figures:
            yield f"{file}: a failed run claims figures"
        return
    yield from _origin(result)
    wrong = list(checks.complaints(result.kind, result.evidence, result.tokens))
    yield from wrong
    if not wrong:
        yield from _figures(result)


def _origin(result: Result) -> Iterator[str]:
    file, origin = result.path / MANIFEST, result.manifest.origin
    if origin.commit is None:
        yield f"{file}: no commit is recorded"
    elif not origin.is_clean:
        yield f"{file}: the tree had changes beside commit {origin.commit[:12]}"
    wanted = ["python", "jax", "jaxlib"]
    if kind.is_gpu(result.manifest.run):
        wanted.append("driver")
    for name in wanted:
        if name not in origin.versions:
            yield f"{file}: the version of {name} is not recorded"


def _figures(result: Result) -> Iterator[str]:
    file = result.path / MANIFEST
    recomputed = {one.name: one for one in checks.derive(result.kind, result.evidence)}
    claimed = {one.name: one for one in result.manifest.figures}
    if len(claimed) < len(result.manifest.figures):
        yield f"{file}: two figures have one name"
    for name in sorted(recomputed.keys() - claimed.keys()):
        yield f"{file}: the figure {name!r} is missing"
    for name in sorted(claimed.keys() - recomputed.keys()):
        yield f"{file}: the samples give no figure {name!r}"
    for name in sorted(claimed.keys() & recomputed.keys()):
        if not figures.is_same(claimed[name], recomputed[name]):
            yield (
                f"{file}: {name!r} is {_said(claimed[name])}, the samples give "
                f"{_said(recomputed[name])}"
            )


def _said(figure: Figure) -> str:
    share = "" if figure.fraction is None else f", {figure.fraction:.4g} of {figure.ceiling}"
    return (
        f"{figure.median:.6g} {figure.unit} ({figure.low:.6g} to {figure.high:.6g} of "
        f"{figure.count}{share})"
    )
