"""What comes from outside for a request that runs some layers only, and is not computed yet."""

import collections
import dataclasses

import numpy as np
from jaxtyping import Float

from nanoflow_jax.models import architecture


class Fed:
    """The layers of such a request, and the hidden states that wait to enter them.

    Hidden states are let go when a step takes them, and could not be had again.

    Invariant: the rows held are at consecutive positions, of which `_next` is the first.
    """

    def __init__(self, span: architecture.Span, *, num_layers: int, max_len: int) -> None:
        """Nothing has come.

        Args:
            span: Its layers.
            num_layers: L.
            max_len: Most positions.
        """
        self.span, self.max_len = span, max_len
        self.is_hidden, self.leaves = span.start > 0, span.stop < num_layers
        self._rows: collections.deque[Float[np.ndarray, "n D"]] = collections.deque()
        self._next = 0

    @property
    def has_run(self) -> bool:
        """Whether a step has taken any position."""
        return self._next > 0

    def add(self, rows: Float[np.ndarray, "n D"]) -> None:
        """Holds the rows of the next positions."""
        self._rows.append(rows)

    def take(self, start: int, count: int) -> list[Float[np.ndarray, "n D"]]:
        """The rows of the next positions, [start, start + count); none where tokens enter."""
        assert start == self._next, f"row {start} is taken before row {self._next}"
        self._next += count
        taken: list[Float[np.ndarray, "n D"]] = []
        while self.is_hidden and count:
            first = self._rows.popleft()
            taken.append(first[:count])
            if len(first) > count:
                self._rows.appendleft(first[count:])
            count -= len(taken[-1])
        return taken

    def truncate(self, position: int) -> None:
        """Forgets what is at and after a position."""
        keep = max(position - self._next, 0)
        self._next = min(position, self._next)
        kept: list[Float[np.ndarray, "n D"]] = []
        for rows in self._rows:
            kept.append(rows[:keep])
            keep -= len(kept[-1])
        self._rows = collections.deque(rows for rows in kept if len(rows))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeftRows:
    """Hidden states of consecutive positions of a request, which left before the model's end.

    Attributes:
        request_id: Whose.
        start: Position of the first.
        hidden: One row for each.
    """

    request_id: str
    start: int
    hidden: Float[np.ndarray, "n D"]

    def before(self, position: int) -> "LeftRows":
        """The rows before a position."""
        return dataclasses.replace(self, hidden=self.hidden[: max(position - self.start, 0)])
