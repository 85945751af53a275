"""Tables for people."""

from collections.abc import Sequence
from pathlib import Path

from nanoflow_jax.results import verify
from nanoflow_jax.results.figures import Figure
from nanoflow_jax.results.verify import Verdict

_LARGE = ((1e12, "T"), (1e9, "G"), (1e6, "M"))
_SMALL = ((1.0, ""), (1e-3, "m"), (1e-6, "u"), (1e-9, "n"))
_SCALED: dict[str, tuple[str, tuple[tuple[float, str], ...]]] = {
    "bytes/s": ("B/s", _LARGE),
    "FLOP/s": ("FLOP/s", _LARGE),
    "operations/s": ("FLOP/s", _LARGE),
    "s": ("s", _SMALL),
}


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows as lines whose columns stand under each other."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def results(verdicts: Sequence[Verdict]) -> str:
    """A line for each result, whatever became of it."""
    rows = [("result", "status", "level", "kind", "commit", "first figure, or what is wrong")]
    return aligned([*rows, *(_row(verdict, verdicts) for verdict in verdicts)])


def figures(verdicts: Sequence[Verdict]) -> str:
    """A line for each figure of the results that were not refused."""
    rows = [("result", "figure", "median", "low", "high", "samples", "of ceiling", "level")]
    for verdict in verdicts:
        if verdict.result is None or verdict.complaints:
            continue
        levels = verify.levels(verdict, verdicts)
        rows += [
            (
                name(verdict.path),
                one.name,
                quantity(one.median, one.unit),
                quantity(one.low, one.unit),
                quantity(one.high, one.unit),
                str(one.count),
                share(one),
                f"E{levels[one.name]:d}",
            )
            for one in verdict.result.manifest.figures
        ]
    return aligned(rows)


def name(folder: Path) -> str:
    """A result's folder without the root of all results."""
    return "/".join(folder.parts[-2:])


def quantity(value: float, unit: str) -> str:
    """A value with its unit, in four digits: `3.905 TB/s`, `12.3 ms`, `412.3 tokens/s`."""
    factor, shown = _scaled(value, unit)
    return f"{number(value / factor)} {shown}"


def span(low: float, high: float, unit: str) -> str:
    """Two values in the unit that suits the larger: `3.8 - 4.1 TB/s`."""
    factor, shown = _scaled(high, unit)
    return f"{number(low / factor)} - {number(high / factor)} {shown}"


def _scaled(value: float, unit: str) -> tuple[float, str]:
    short, scales = _SCALED.get(unit, (unit, ()))
    for factor, prefix in scales:
        if abs(value) >= factor:
            return factor, f"{prefix}{short}"
    return 1.0, short


def number(value: float) -> str:
    """Four digits; more only before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def share(figure: Figure) -> str:
    """The share of a ceiling; empty if the figure has none."""
    return "" if figure.fraction is None else f"{figure.fraction:.1%}"


def level(verdict: Verdict, among: Sequence[Verdict]) -> str:
    """The lowest level of a result's figures; empty if it claims none."""
    if verdict.result is None or verdict.complaints or not verdict.result.manifest.figures:
        return ""
    return f"E{min(verify.levels(verdict, among).values()):d}"


def _row(verdict: Verdict, among: Sequence[Verdict]) -> tuple[str, ...]:
    result = verdict.result
    if result is None:
        return (name(verdict.path), verdict.word, "", "", "", verdict.complaints[0])
    found = result.manifest
    commit = (found.origin.commit or "")[:8] + ("" if found.origin.is_clean else "+")
    said = verdict.complaints[0] if verdict.complaints else found.message
    if not said and found.figures:
        first = found.figures[0]
        said = f"{first.name} {quantity(first.median, first.unit)}"
        said += f", and {len(found.figures) - 1} more" if len(found.figures) > 1 else ""
    return (name(verdict.path), verdict.word, level(verdict, among), found.run.kind, commit, said)
