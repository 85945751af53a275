"""Every token of a step has one place, in proportion, whatever step of the bucket it is."""

import itertools
import re

import numpy as np
import random_plans
from hypothesis import given
from hypothesis import strategies as st

from nanoflow_jax.nanobatch.dealing import Dealer, Piece
from nanoflow_jax.nanobatch.plan import cut_at


def _dealer(borders, weights, *, decode_rows, prefill_rows=4):
    return Dealer(cut_at(borders), weights, decode_rows=decode_rows, prefill_rows=prefill_rows)


@st.composite
def _steps(draw):
    """A dealer, and a step that its bucket holds."""
    plan = draw(random_plans.plans(max_cells=5))
    most = draw(st.integers(0, plan.num_tokens))
    rows = draw(st.integers(0, 6))
    dealer = Dealer(plan.cells, plan.decode_weights, decode_rows=most, prefill_rows=rows)
    num_decode = draw(st.integers(0, most))
    left, chunks = plan.num_tokens - num_decode, []
    while left and len(chunks) < rows and draw(st.booleans()):
        chunks.append(draw(st.integers(1, left)))
        left -= chunks[-1]
    return plan, dealer, num_decode, chunks


def test_one_cell_holds_decode_rows_then_chunks_then_padding():
    dealer = _dealer([0, 16], [16], decode_rows=8)
    placed = dealer.place(3, [4, 2])
    assert placed.decode_tokens.tolist() == placed.decode_rows.tolist() == [0, 1, 2]
    assert placed.pieces == (Piece(0, 0, 3, 4, 0), Piece(1, 0, 7, 2, 0))


def test_a_step_on_two_halves_worked_by_hand():
    dealer = _dealer([0, 8, 16], [1, 1], decode_rows=6)
    assert [cell.decode_rows for cell in dealer.cells] == [3, 3]
    assert [cell.first_decode_row for cell in dealer.cells] == [0, 3]
    placed = dealer.place(5, [7, 2])
    # Rows 0, 2, 4 go to the first half, 1 and 3 to the second.
    assert placed.decode_tokens.tolist() == [0, 8, 1, 9, 2]
    assert placed.decode_rows.tolist() == [0, 3, 1, 4, 2]
    # 5 and 6 tokens of room take 4 and 5 of the 9 tokens.
    assert placed.pieces == (Piece(0, 0, 3, 4, 0), Piece(0, 4, 10, 3, 1), Piece(1, 0, 13, 2, 1))


def test_rows_are_dealt_by_weight():
    dealer = _dealer([0, 8, 16], [3, 1], decode_rows=8)
    assert [cell.decode_rows for cell in dealer.cells] == [6, 2]
    assert sum(dealer.place(4, []).decode_tokens < 8) == 3


def test_a_cell_without_weight_takes_what_no_other_has_room_for():
    dealer = _dealer([0, 4, 8], [1, 0], decode_rows=6)
    assert [cell.decode_rows for cell in dealer.cells] == [4, 2]
    assert dealer.place(4, []).decode_tokens.tolist() == [0, 1, 2, 3]


def test_a_cell_holds_no_more_chunks_than_tokens():
    dealer = _dealer([0, 3, 16], [1, 1], decode_rows=1, prefill_rows=5)
    assert [cell.prefill_rows for cell in dealer.cells] == [3, 5]


def _tokens_of(piece):
    return range(piece.start, piece.start + piece.length)


@given(_steps())
def test_every_token_has_a_place_of_its_own(step):
    plan, dealer, num_decode, chunks = step
    placed = dealer.place(num_decode, chunks)
    taken = placed.decode_tokens.tolist() + [t for p in placed.pieces for t in _tokens_of(p)]
    assert len(set(taken)) == len(taken) == num_decode + sum(chunks)
    assert all(0 <= token < plan.num_tokens for token in taken)
    parts = {}
    for piece in placed.pieces:
        assert piece.offset == parts.get(piece.chunk, 0), "tokens of a chunk stay in order"
        parts[piece.chunk] = piece.offset + piece.length
    assert parts == dict(enumerate(chunks))
    starts = [piece.start for piece in placed.pieces]
    assert starts == sorted(starts)


@given(_steps())
def test_no_cell_gets_more_than_it_can_hold(step):
    _plan, dealer, num_decode, chunks = step
    placed = dealer.place(num_decode, chunks)
    for index, cell in enumerate(dealer.cells):
        here = [t for t in placed.decode_tokens.tolist() if t in range(*cell.tokens)]
        pieces = [piece for piece in placed.pieces if piece.cell == index]
        assert len(here) <= cell.decode_rows
        assert len(pieces) <= cell.prefill_rows
        assert len(here) + sum(piece.length for piece in pieces) <= cell.tokens.length
    for token, row in zip(placed.decode_tokens.tolist(), placed.decode_rows.tolist(), strict=True):
        (cell,) = (c for c in dealer.cells if token in range(*c.tokens))
        assert row - cell.first_decode_row == token - cell.tokens.start < cell.decode_rows


@given(_steps())
def test_within_a_cell_decode_rows_come_first_then_chunks_then_padding(step):
    _plan, dealer, num_decode, chunks = step
    placed = dealer.place(num_decode, chunks)
    kinds = ["p"] * dealer.cells[-1].tokens.stop
    for token in placed.decode_tokens.tolist():
        kinds[token] = "d"
    for piece in placed.pieces:
        kinds[piece.start : piece.start + piece.length] = "c" * piece.length
    for cell in dealer.cells:
        assert re.fullmatch("d*c*p*", "".join(kinds[slice(*cell.tokens)]))


@given(_steps())
def test_decode_rows_are_spread_in_proportion_as_far_as_cells_have_room(step):
    plan, dealer, num_decode, _chunks = step
    tokens = dealer.place(num_decode, []).decode_tokens
    given_rows = [int(np.sum((tokens >= c.start) & (tokens < c.stop))) for c in plan.cells]
    cells = range(len(plan.cells))
    for a, b in itertools.permutations(cells, 2):
        has_room = given_rows[b] < plan.cells[b].length
        if not plan.decode_weights[a]:
            assert not (has_room and plan.decode_weights[b] and given_rows[a])
        elif has_room and plan.decode_weights[b] and given_rows[a]:
            # Webster: a's last row was due no later than the next one of b.
            due_a = (2 * given_rows[a] - 1) * plan.decode_weights[b]
            assert due_a <= (2 * given_rows[b] + 1) * plan.decode_weights[a]


@given(_steps())
def test_a_row_keeps_its_place_when_rows_after_it_are_gone(step):
    _plan, dealer, num_decode, _chunks = step
    most = dealer.place(num_decode, [])
    fewer = dealer.place(num_decode // 2, [])
    assert most.decode_tokens[: num_decode // 2].tolist() == fewer.decode_tokens.tolist()


def test_tokens_of_chunks_are_spread_over_cells_that_are_not_full():
    dealer = _dealer([0, 100, 200, 400], [1, 1, 2], decode_rows=40)
    placed = dealer.place(40, [120, 60])
    loads = [sum(p.length for p in placed.pieces if p.cell == i) for i in range(3)]
    assert loads == [45, 45, 90]
