"""The README's figures: written from verified results, and by nobody's hand.

A block of them stands between `<!-- figures: NAME -->` and `<!-- end -->`, where NAME is that of
results without device and date.
"""

import re
from collections.abc import Iterator, Sequence

from nanoflow_jax.evidence import tables
from nanoflow_jax.results import verify
from nanoflow_jax.results.figures import Figure
from nanoflow_jax.results.kind import Level
from nanoflow_jax.results.provenance import RESULTS
from nanoflow_jax.results.verify import Verdict

_MARKER = re.compile(r"^<!-- (?:figures: (?P<name>\S+)|(?P<end>end)) -->$", re.MULTILINE)
_SECOND = r"(?:s|sec|second)\b"
_MANY = r"(?:[kKMGTPE]i?)?"
_AMOUNT = (
    rf"(?:tok(?:en)?s?|requests?|req|steps?|samples?|rows?|{_MANY}(?:B|bytes?|bits?|FLOPs?|FLOPS?))"
)
_RATE = (
    rf"(?:{_AMOUNT}\s?(?:/|per|an?|each)\s?(?:GPU\s?/\s?)?{_SECOND}|[MGTPE]FLOPS\b|{_MANY}bps\b)"
)
_TIME = r"(?:ms|[µμu]s|ns|(?:milli|micro|nano)seconds?)\b"
_OF_WHAT = r"(?:generated|output|input|prompt|decode|prefill|total)"
_FASTER = r"(?:faster|slower|quicker|as fast|as slow|the speed|the throughput|speed-?up)"
_TIMES = r"(?:[x×](?!\w)|times\b)"
_LIMIT = r"(?:ceiling|peak|roofline|bandwidth|throughput|speed|optimal|optimum|maximum|cuBLAS\w*)"
_NUMBER = r"(?<![\w.])\d[\d,.]*(?:e[+-]?\d+)?[kKM]?"
_GAP = r"[*_`~]*\s*[*_`~]*"
_WORD_NUMBER = r"(?:twice|half|(?:two|three|four|five|six|seven|eight|nine|ten) times)"
_BY_HAND = re.compile(
    "|".join(
        (
            rf"{_NUMBER}{_GAP}(?:{_OF_WHAT}\s+)*{_RATE}",
            rf"{_NUMBER}{_GAP}{_TIME}",
            rf"{_NUMBER}{_GAP}{_TIMES}{_GAP}{_FASTER}",
            r"(?<![\w.])\d+\.\d+\s?[x×](?!\w|\s?\d)",
            rf"{_NUMBER}{_GAP}(?:%|percent){_GAP}(?:\w+\s+){{0,2}}{_FASTER}",
            rf"{_NUMBER}{_GAP}(?:%|percent)\s+(?:MFU|utili[sz]ation)",
            rf"{_NUMBER}{_GAP}(?:%|percent)\s+of\s+(?:[\w'-]+\s+){{0,4}}{_LIMIT}",
            rf"{_FASTER}\s+(?:by|of|is)\s+(?:[\w']+\s+){{0,2}}{_NUMBER}{_GAP}(?:%|percent|{_TIMES})",
            rf"\b{_WORD_NUMBER}\s+{_FASTER}",
        )
    )
)
_SPEED_UNIT = re.compile(rf"(?<!\w)(?:{_RATE}|{_TIME})")
_HAS_NUMBER = re.compile(r"\d")


def written(text: str, verdicts: Sequence[Verdict]) -> str:
    """The README with the figures of verified results between its markers.

    Raises:
        ValueError: A marker has no counterpart, or no verified result has its name.
    """
    made, at = [], 0
    for name, begin, end in _blocks(text):
        made += [text[at:begin], "\n", block(name, verdicts), "\n"]
        at = end
    return "".join([*made, text[at:]])


def by_hand(text: str) -> list[str]:
    """Figures of speed that stand outside the markers, each with the number of its line."""
    chars = list(text)
    for _, begin, end in _blocks(text):
        chars[begin:end] = [char if char == "\n" else " " for char in text[begin:end]]
    outside = "".join(chars)
    found = [(m.start(), " ".join(m[0].split())) for m in _BY_HAND.finditer(outside)]
    found += _in_tables(outside)
    return [f"line {outside.count(chr(10), 0, at) + 1}: {said}" for at, said in sorted(found)]


def block(name: str, verdicts: Sequence[Verdict]) -> str:
    """The figures of the newest verified result of that name, for each device.

    Only what was measured: how fast a kernel is interpreted tells nothing of a GPU.

    Raises:
        ValueError: There is none.
    """
    newest: dict[str, Verdict] = {}
    for verdict in verdicts:
        if verdict.result is None or not verdict.is_claim:
            continue
        found = verdict.result.manifest
        if found.run.name != name or verdict.result.kind.level(found.run) < Level.ONE_RUN:
            continue
        before = newest.get(found.run.device.folder)
        if before is None or before.path.name < verdict.path.name:
            newest[found.run.device.folder] = verdict
    if not newest:
        raise ValueError(
            f"no verified result of today's kernels is named {name}: see `python -m "
            "nanoflow_jax.evidence list`, measure it, or take its figures out of the README"
        )
    rows = [row for _, verdict in sorted(newest.items()) for row in _rows(verdict, verdicts)]
    head = ["device", "what", "median", "from - to", "samples", "of its ceiling", "evidence"]
    if not any(row[5] for row in rows):
        head.pop(5)
        for row in rows:
            row.pop(5)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _rows(verdict: Verdict, among: Sequence[Verdict]) -> Iterator[list[str]]:
    assert verdict.result is not None
    run = verdict.result.manifest.run
    levels = verify.levels(verdict, among)
    for figure in verdict.result.manifest.figures:
        if not verdict.result.kind.is_headline(run, figure):
            continue
        level = levels[figure.name]
        yield [
            f"{run.device.name}, {run.device.count}" if run.device.count > 1 else run.device.name,
            figure.name,
            tables.quantity(figure.median, figure.unit),
            tables.span(figure.low, figure.high, figure.unit),
            str(figure.count),
            tables.share(figure),
            f"{level.words}: {', '.join(_links(figure, verdict, level, among))}",
        ]


def _links(
    figure: Figure, verdict: Verdict, level: Level, among: Sequence[Verdict]
) -> Iterator[str]:
    shown = [verdict.path]
    if level > Level.ONE_RUN:
        shown += verify.agreeing(figure, verdict, among)
    for path in shown:
        yield f"[{path.name[:10]}]({RESULTS}/{tables.name(path)})"


def _blocks(text: str) -> Iterator[tuple[str, int, int]]:
    """Name, begin and end of what is between each pair of markers."""
    name, begin = None, 0
    for marker in _MARKER.finditer(text):
        line = text.count("\n", 0, marker.start()) + 1
        if (marker["name"] is None) == (name is None):
            raise ValueError(f"line {line}: {marker[0]} stands without its counterpart")
        if name is not None:
            yield name, begin, marker.start()
        name, begin = marker["name"], marker.end()
    if name is not None:
        raise ValueError(f"<!-- figures: {name} --> has no <!-- end -->")


def _in_tables(text: str) -> list[tuple[int, str]]:
    """Numbers in columns of tables whose head says a unit of speed."""
    found: list[tuple[int, str]] = []
    head: list[str] = []
    at = 0
    for line in text.splitlines(keepends=True):
        cells = line.strip().strip("|").split("|") if "|" in line else []
        if not cells:
            head = []
        elif not head:
            head = cells
        else:
            found += [
                (at, f"{cell.strip()} under {title.strip()}")
                for title, cell in zip(head, cells, strict=False)
                if _SPEED_UNIT.search(title) and _HAS_NUMBER.search(cell)
            ]
        at += len(line)
    return found
