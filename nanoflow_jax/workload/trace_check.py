"""Made-up requests beside those of a real trace, which a file has."""

import csv
import gzip
import pathlib
import zlib
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float64, Int64

from nanoflow_jax.workload import traces
from nanoflow_jax.workload.traces import NO_LIMITS, Limits

# Names of the columns in files of this project, of NanoFlow and of Azure.
_COLUMNS = (
    ("input_tokens", "output_tokens"),
    ("input", "output"),
    ("ContextTokens", "GeneratedTokens"),
)
_LIMIT = 0.03
_PERCENTS = np.arange(1, 100)
_SHOWN = (5, 25, 50, 75, 95, 99)


def read(path: pathlib.Path) -> Int64[np.ndarray, "n 2"]:
    """Prompt and output tokens of each request of a trace.

    Args:
        path: CSV, or CSV that gzip packed, with a line of names.

    Raises:
        ValueError: The file cannot be read, names no columns of lengths, has no row, or has one
            that is not two positive numbers.
    """
    try:
        packed = path.suffix == ".gz"
        with gzip.open(path, "rt") if packed else path.open(encoding="utf-8") as file:
            rows = list(csv.reader(file))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as CSV: {error}") from error
    named = rows[0] if rows else []
    pair = next((pair for pair in _COLUMNS if set(pair) <= set(named)), None)
    if pair is None:
        known = "; ".join(" and ".join(pair) for pair in _COLUMNS)
        raise ValueError(
            f"{path} has columns {', '.join(named) or '(none)'}; wanted are those of one of {known}"
        )
    places = [named.index(name) for name in pair]
    if len(rows) < 2:
        raise ValueError(f"{path} has no request below its line of names")
    lines = enumerate(rows[1:], start=2)
    return np.array([_lengths(path, number, row, places) for number, row in lines])


def _lengths(path: pathlib.Path, number: int, row: list[str], places: list[int]) -> list[int]:
    texts = [row[place].strip() if place < len(row) else "" for place in places]
    if not all(text.isdecimal() and int(text) > 0 for text in texts):
        raise ValueError(
            f"{path}, row {number}: {','.join(row)!r} has no positive numbers of prompt and output "
            "tokens; correct the row or take it out"
        )
    return [int(text) for text in texts]


def compare(name: str, real: Int64[np.ndarray, "n 2"], *, seed: int) -> tuple[str, float]:
    """Lines for people: moments and quantiles, of all requests and of those within the limits.

    Args:
        name: Of the trace that is made up, as often as it has requests in the file.
        real: From `read`.
        seed: Of what is made up.

    Returns:
        The lines, and the largest relative error among means, deviations and hundredths; of the
        last, one token is no error, for tokens are whole.

    Raises:
        ValueError: Lengths in the file do not differ.
    """
    lines, errors = [], []
    for title, limits in (("all requests", NO_LIMITS), ("within NanoFlow's limits", Limits())):
        kept = real[traces.within(real[:, 0], real[:, 1], limits)]
        if len(kept) < 2 or not kept.std(axis=0).all():
            raise ValueError(
                f"of the file's {len(real):,} requests, {title} are {len(kept):,}, whose prompts "
                "or outputs do not differ: nothing to compare; give a file of the trace"
            )
        made = traces.generate(name, len(kept), seed=seed, limits=limits)
        both = np.stack([made.input_lens, made.output_lens], axis=1)
        lines.append(f"{name}, {title}: {len(kept):,} of the file / as many made up")
        columns = zip(("prompt", "output"), kept.T, both.T, strict=True)
        for column, wanted, found in columns:
            worst = _worst(wanted, found)
            errors.append(worst)
            lines.append(f"  {column}: {'; '.join(_numbers(wanted, found))}; worst {worst:.1%}")
        logs = [np.corrcoef(np.log(lens.T))[0, 1] for lens in (kept, both)]
        lines.append(f"  correlation of logarithms: {logs[0]:.2f} / {logs[1]:.2f}")
    worst = max(errors)
    verdict = "no" if worst <= _LIMIT else "a"
    lines.append(
        f"{verdict} mean, deviation or quantile in steps of 1 % is off by more than {_LIMIT:.0%} "
        f"and a token; the worst is {worst:.1%}"
    )
    return "\n".join(lines), worst


def _numbers(wanted: Int64[np.ndarray, "n"], found: Int64[np.ndarray, "n"]) -> Iterator[str]:
    yield f"mean {wanted.mean():.1f} / {found.mean():.1f}"
    yield f"deviation {wanted.std():.1f} / {found.std():.1f}"
    pairs = zip(_SHOWN, *(np.percentile(x, _SHOWN) for x in (wanted, found)), strict=True)
    yield "quantiles " + ", ".join(f"{p} %: {a:.0f} / {b:.0f}" for p, a, b in pairs)


def _worst(wanted: Int64[np.ndarray, "n"], found: Int64[np.ndarray, "n"]) -> float:
    moments = [abs(found.mean() / wanted.mean() - 1), abs(found.std() / wanted.std() - 1)]
    return float(max(*moments, *_misses(*(np.percentile(x, _PERCENTS) for x in (wanted, found)))))


def _misses(wanted: Float64[np.ndarray, "q"], found: Float64[np.ndarray, "q"]) -> list[float]:
    off = np.abs(found - wanted)
    return list(np.where(off <= 1, 0.0, off / wanted))
