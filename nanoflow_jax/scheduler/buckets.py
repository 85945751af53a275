"""The step shapes that are compiled: which there are, and which one a step takes."""

import dataclasses
from collections.abc import Sequence

# More than prompts of ordinary length are chunks of a dense batch; each has room in every step.
_MOST_CHUNKS = 256
# A step of some ten rows must not be padded to hundreds.
_KEPT_ROWS = (1, 8, 64)


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class Bucket:
    """One compiled step shape.

    Attributes:
        tokens: Flat token batch, decode rows included.
        decode_rows: Most rows with one token to do.
        prefill_rows: Most chunks.
    """

    tokens: int
    decode_rows: int
    prefill_rows: int

    def __post_init__(self) -> None:
        if self.tokens < 1 or not 0 <= self.decode_rows <= self.tokens or self.prefill_rows < 0:
            raise ValueError(
                f"bucket {self} must have at least one token and no more decode rows than tokens"
            )
        if self.prefill_rows == 0 and self.decode_rows != self.tokens:
            raise ValueError(f"bucket {self} without prefill rows needs as many decode rows")

    def __str__(self) -> str:
        return f"{self.tokens}:{self.decode_rows}:{self.prefill_rows}"

    def holds(self, *, tokens: int, decode_rows: int, prefill_rows: int) -> bool:
        """Whether a step of this size fits."""
        return (
            tokens <= self.tokens
            and decode_rows <= self.decode_rows
            and prefill_rows <= self.prefill_rows
        )


def parse_buckets(text: str) -> tuple[Bucket, ...]:
    """Buckets from `TOKENS:DECODE_ROWS:PREFILL_ROWS,...`.

    Raises:
        ValueError: An entry has another form or an impossible size.
    """
    found = []
    for entry in text.split(","):
        parts = entry.strip().split(":")
        if len(parts) != 3 or not all(p.isdecimal() for p in parts):
            raise ValueError(
                f"--buckets entry {entry.strip()!r} is not TOKENS:DECODE_ROWS:PREFILL_ROWS"
            )
        tokens, decode_rows, prefill_rows = map(int, parts)
        found.append(Bucket(tokens=tokens, decode_rows=decode_rows, prefill_rows=prefill_rows))
    return tuple(sorted(set(found)))


def default_buckets(*, max_requests: int, dense_batch: int) -> tuple[Bucket, ...]:
    """A short list that wastes little: few programs, each step at most about half empty.

    Args:
        max_requests: Most requests in a step.
        dense_batch: Tokens in a full step.
    """
    rows = [1]
    while rows[-1] < max_requests:
        rows.append(min(rows[-1] * (8 if rows[-1] == 1 else 2), max_requests))
    if len(rows) > 5:  # thin out the middle
        rows = [r for r in rows if r in _KEPT_ROWS or r >= rows[-3]]
    decode = [Bucket(tokens=r, decode_rows=r, prefill_rows=0) for r in rows]
    few, quarter = min(8, max_requests), max(1, dense_batch // 4)
    mixed = [Bucket(tokens=quarter, decode_rows=min(few, quarter), prefill_rows=few)]
    for tokens in (dense_batch // 2, dense_batch):
        if tokens >= max_requests:
            chunks = min(max_requests, _MOST_CHUNKS)
            mixed.append(Bucket(tokens=tokens, decode_rows=max_requests, prefill_rows=chunks))
    return tuple(sorted({*decode, *mixed}))


def check_buckets(
    buckets: Sequence[Bucket], *, max_requests: int, dense_batch: int
) -> tuple[Bucket, ...]:
    """The buckets, sorted, after making sure that every step the scheduler may plan fits one.

    Raises:
        ValueError: The largest bucket does not hold the largest step, or more than any step.
    """
    largest = max(buckets)
    most_rows = max(b.prefill_rows for b in buckets)
    if largest.tokens < dense_batch or largest.decode_rows < max_requests:
        raise ValueError(
            f"the largest bucket {largest} holds less than --dense_batch={dense_batch} tokens or "
            f"--max_requests={max_requests} decode rows; add {dense_batch}:{max_requests}:8"
        )
    if largest.tokens > dense_batch:
        raise ValueError(
            f"bucket {largest} has more than --dense_batch={dense_batch} tokens, which no step "
            "fills; make it smaller or raise --dense_batch"
        )
    if largest.prefill_rows < most_rows:
        raise ValueError(
            f"the largest bucket {largest} has fewer prefill rows than another ({most_rows})"
        )
    if largest.prefill_rows < 1:
        raise ValueError(f"the largest bucket {largest} has no prefill row; no prompt could run")
    return tuple(sorted(buckets))


def pick_bucket(
    buckets: Sequence[Bucket], *, tokens: int, decode_rows: int, prefill_rows: int
) -> Bucket:
    """The smallest bucket that holds a step; buckets are sorted."""
    for bucket in buckets:
        if bucket.holds(tokens=tokens, decode_rows=decode_rows, prefill_rows=prefill_rows):
            return bucket
    raise AssertionError(f"no bucket holds {tokens}:{decode_rows}:{prefill_rows}")
