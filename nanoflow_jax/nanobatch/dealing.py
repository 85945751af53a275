"""Where the rows of a step go in a dense batch that a plan has cut into cells.

Every cell holds some of the decode rows, then pieces of chunks, then padding:

    cell 0 [ d d d | c c c c c . . )   cell 1 [ d d | c c c c . )

A step's decode rows are dealt to the cells one by one, each to the cell that is furthest behind
its share, so that any number of them is spread in proportion and no cell ever gets more than it
gets of the most. Tokens of chunks fill what is left, in proportion to it; a chunk may go on in a
later cell, never in an earlier one. So a token of a request comes before all later ones of that
request in the dense batch, on which the dependencies of prefill attention rely.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from nanoflow_jax.nanobatch.plan import TokenRange


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """Tokens that no operation of a plan separates, and the most that they hold.

    Attributes:
        tokens: Where in the dense batch.
        first_decode_row: Its place in the table of decode rows, which has the rows of one cell
            after those of another.
        decode_rows: Most decode rows; they take the first tokens of the cell.
        prefill_rows: Most pieces of chunks.
    """

    tokens: TokenRange
    first_decode_row: int
    decode_rows: int
    prefill_rows: int

    @property
    def end_decode_row(self) -> int:
        """Row of that table after its own."""
        return self.first_decode_row + self.decode_rows


class Piece(NamedTuple):
    """Consecutive tokens of one chunk in one cell."""

    chunk: int  # which chunk of the step
    offset: int  # tokens of the chunk before these
    start: int  # flat index of the first
    length: int
    cell: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the rows of one step are.

    Attributes:
        decode_tokens: Flat index of each decode row.
        decode_rows: Row of each in the table of decode rows.
        pieces: Of all chunks, by flat index; those of one chunk are in its order.
    """

    decode_tokens: Int32[np.ndarray, "R"]
    decode_rows: Int32[np.ndarray, "R"]
    pieces: tuple[Piece, ...]

    def chunk_tokens(self, chunk: int) -> Int32[np.ndarray, "T"]:
        """Flat index of each token of a chunk."""
        pieces = (piece for piece in self.pieces if piece.chunk == chunk)
        return np.concatenate([np.arange(p.start, p.start + p.length) for p in pieces])


class Dealer:
    """Deals the steps of one bucket to the cells of its plan.

    Invariant: cells lie side by side, and so do their rows in the table of decode rows.
    """

    def __init__(
        self,
        cells: Sequence[TokenRange],
        decode_weights: Sequence[int],
        *,
        decode_rows: int,
        prefill_rows: int,
    ) -> None:
        """Finds what each cell can hold.

        Args:
            cells: Of the plan; the last ends with the bucket.
            decode_weights: Of the plan, one for each cell. A cell of weight 0 takes only what no
                other has room for.
            decode_rows: Most decode rows of a step, at most the tokens of all cells.
            prefill_rows: Most chunks of a step.
        """
        self._deal = _deal_in_turn([c.length for c in cells], decode_weights, count=decode_rows)
        shares = np.bincount(self._deal, minlength=len(cells)).tolist()
        firsts = itertools.accumulate(shares, initial=0)
        self._cells = tuple(
            Cell(
                tokens=tokens,
                first_decode_row=first,
                decode_rows=share,
                prefill_rows=min(prefill_rows, tokens.length),
            )
            for tokens, first, share in zip(cells, firsts, shares, strict=False)
        )
        self._lengths = np.asarray([c.length for c in cells])
        self._decode_tokens, self._decode_rows = self._find_decode()
        self.check()

    @property
    def cells(self) -> tuple[Cell, ...]:
        """What each cell can hold."""
        return self._cells

    def place(self, num_decode: int, chunk_lens: Sequence[int]) -> Placement:
        """Places a step that fits the bucket.

        Args:
            num_decode: Decode rows.
            chunk_lens: Tokens of each chunk.
        """
        taken = np.bincount(self._deal[:num_decode], minlength=len(self._cells))
        room = self._lengths - taken
        # A row's place does not depend on the rows after it.
        return Placement(
            decode_tokens=self._decode_tokens[:num_decode],
            decode_rows=self._decode_rows[:num_decode],
            pieces=self._place_chunks(chunk_lens, taken, room),
        )

    def _find_decode(self) -> tuple[Int32[np.ndarray, "R"], Int32[np.ndarray, "R"]]:
        """Token and table row of each decode row of a full step."""
        cells = self._deal
        within = np.zeros(len(cells), np.int32)
        for cell in range(len(self._cells)):
            is_here = cells == cell
            within[is_here] = np.arange(np.count_nonzero(is_here))
        starts = np.asarray([c.tokens.start for c in self._cells], np.int32)
        firsts = np.asarray([c.first_decode_row for c in self._cells], np.int32)
        return starts[cells] + within, firsts[cells] + within

    def _place_chunks(
        self,
        chunk_lens: Sequence[int],
        taken: np.ndarray,
        room: np.ndarray,
    ) -> tuple[Piece, ...]:
        """Cuts the row of all chunks where one cell has its share of it."""
        total = sum(chunk_lens)
        if not total:
            return ()
        ends = np.cumsum(room) * total // np.sum(room)
        pieces: list[Piece] = []
        chunk = offset = done = 0
        for index, end in enumerate(ends.tolist()):
            start = self._cells[index].tokens.start + int(taken[index])
            while done < end:
                length = min(chunk_lens[chunk] - offset, end - done)
                if length:
                    pieces.append(Piece(chunk, offset, start, length, index))
                start, done, offset = start + length, done + length, offset + length
                if offset == chunk_lens[chunk]:
                    chunk, offset = chunk + 1, 0
        return tuple(pieces)

    def check(self) -> None:
        """Raises AssertionError if the class invariant is broken."""
        token = row = 0
        for cell in self._cells:
            assert cell.tokens.start == token and cell.first_decode_row == row
            assert cell.decode_rows <= cell.tokens.length
            token, row = cell.tokens.stop, row + cell.decode_rows


def _deal_in_turn(
    capacities: Sequence[int], weights: Sequence[int], *, count: int
) -> Int32[np.ndarray, "R"]:
    """The cell of each of `count` rows.

    Row after row goes to the cell with room whose next row would be the least above its share
    (Webster's method of highest averages): the first n rows are spread in proportion for any n.
    """
    given = [0] * len(capacities)
    dealt = np.empty(count, np.int32)
    for i in range(count):
        open_cells = [c for c, most in enumerate(capacities) if given[c] < most]
        weighted = [c for c in open_cells if weights[c]] or open_cells
        # Without weights, to the emptiest.
        best = min(weighted, key=lambda c: ((2 * given[c] + 1) / max(weights[c], 1), c))
        given[best] += 1
        dealt[i] = best
    return dealt
