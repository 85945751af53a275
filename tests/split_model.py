"""A model of a few numbers whose tokens depend on every token, layer and position before them.

So two ways of running it give the same tokens only if no row was lost, repeated, moved, or sent
through the wrong layers. Rows are computed one by one: chunks make no difference.
"""

import collections
import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Sequence

import numpy as np

from nanoflow_jax import request
from nanoflow_jax.split import cut as cut_lib
from nanoflow_jax.split import interface, messages, parts

NUM_LAYERS = 6
WIDTH = 16
VOCAB = 97
EOS = 0
IDENTITY = messages.Identity(
    model="toy",
    parts=tuple((name, "a" * 64) for name in parts.every(NUM_LAYERS)),
    config_sha256="b" * 64,
    tokenizer_sha256="c" * 64,
    num_layers=NUM_LAYERS,
    hidden_size=WIDTH,
    vocab_size=VOCAB,
    hidden_dtype="float32",
)
CUTS = [
    cut_lib.Cut(start=start, stop=stop, num_layers=NUM_LAYERS)
    for start in range(NUM_LAYERS)
    for stop in range(start + 1, NUM_LAYERS + 1)
]
ALL_SERVER = cut_lib.Cut(start=0, stop=NUM_LAYERS, num_layers=NUM_LAYERS)
CLIENT_FIRST = cut_lib.Cut(start=2, stop=NUM_LAYERS, num_layers=NUM_LAYERS)
SERVER_FIRST = cut_lib.Cut(start=0, stop=4, num_layers=NUM_LAYERS)
MIDDLE = cut_lib.Cut(start=2, stop=4, num_layers=NUM_LAYERS)
KINDS = [ALL_SERVER, CLIENT_FIRST, SERVER_FIRST, MIDDLE]

_GENERATOR = np.random.default_rng(0)
_EMBED = _GENERATOR.standard_normal((VOCAB, WIDTH)).astype(np.float32)
_SELF = _GENERATOR.standard_normal((NUM_LAYERS, WIDTH, WIDTH)).astype(np.float32) / 4
_PAST = _GENERATOR.standard_normal((NUM_LAYERS, WIDTH, WIDTH)).astype(np.float32) / 4
_HEAD = _GENERATOR.standard_normal((WIDTH, VOCAB)).astype(np.float32)


class _Rows:
    """Layers [start, stop) over the rows of one piece; remembers what each layer saw."""

    def __init__(self, start: int, stop: int) -> None:
        self._layers = range(start, stop)
        self._sums: list[list[np.ndarray]] = [[np.zeros(WIDTH, np.float32)] for _ in self._layers]
        self.length = 0

    def run(self, entering: int | np.ndarray) -> np.ndarray:
        """One more row."""
        row = _EMBED[entering] if isinstance(entering, int) else entering
        for layer, sums in zip(self._layers, self._sums, strict=True):
            sums.append(sums[-1] + row)
            past = sums[-1] / np.float32(self.length + 1)
            place = np.float32(np.cos(self.length + layer))
            row = np.tanh(_SELF[layer] @ row + _PAST[layer] @ past + place).astype(np.float32)
        self.length += 1
        return row

    def truncate(self, length: int) -> None:
        """Forgets the rows after so many."""
        for sums in self._sums:
            del sums[length + 1 :]
        self.length = length


def _pick(row: np.ndarray, params: request.SamplingParams, position: int) -> int:
    logits = row @ _HEAD
    if params.is_greedy:
        return int(logits.argmax())
    noise = np.random.default_rng([params.seed or 0, position]).gumbel(size=VOCAB)
    return int((logits / params.temperature + noise).argmax())


def _finish(
    token: int, num_drawn: int, params: request.SamplingParams, length: int, max_len: int
) -> request.FinishReason | None:
    if token == EOS and not params.ignore_eos:
        return request.FinishReason.STOP
    if num_drawn == params.max_tokens or length == max_len:
        return request.FinishReason.LENGTH
    return None


def generate(prompt: Sequence[int], params: request.SamplingParams) -> tuple[int, ...]:
    """What one process draws."""
    rows = _Rows(0, NUM_LAYERS)
    known = list(prompt)
    while True:
        while rows.length < len(known):
            leaving = rows.run(known[rows.length])
        known.append(_pick(leaving, params, len(known)))
        drawn = len(known) - len(prompt)
        if _finish(known[-1], drawn, params, len(known), 1 << 30) is not None:
            return tuple(known[len(prompt) :])


@dataclasses.dataclass
class _Open:
    piece: interface.Piece
    rows: _Rows
    waiting: collections.deque[int | np.ndarray]

    @property
    def due(self) -> int:
        """Where the next fed row must stand."""
        return self.rows.length + len(self.waiting)


class ToyEngine:
    """A piece engine that computes a few rows a step.

    Attributes:
        open_pieces: By their ids.
        steps: How many pieces had rows in each step.
        fails: Raised by the next step, if set.
        num_rows: Computed, of all pieces.
        holds_at: A piece that has drawn so many tokens waits while this is set.
        spoils: Puts a value that is not finite into rows that leave.
    """

    def __init__(
        self,
        *,
        rows_per_step: int = 8,
        max_pieces: int = 64,
        held: Sequence[tuple[int, int]] = ((0, NUM_LAYERS),),
    ) -> None:
        self._rows_per_step = rows_per_step
        self._max_pieces = max_pieces
        self._held = held
        self.open_pieces: dict[str, _Open] = {}
        self.steps: list[int] = []
        self.fails: Exception | None = None
        self.num_rows = 0
        self.holds_at: int | None = None
        self._steps_left = 0
        self._gate = threading.Event()
        self._gate.set()
        self.spoils = False

    @contextlib.contextmanager
    def paused(self, *, after: int = 0) -> Iterator[None]:
        """After so many more steps, one that begins meanwhile ends only afterwards."""
        self._steps_left = after
        self._gate.clear()
        try:
            yield
        finally:
            self._gate.set()

    @property
    def has_work(self) -> bool:
        return bool(self._runnable)

    @property
    def _runnable(self) -> list[_Open]:
        return [
            held
            for held in self.open_pieces.values()
            if held.waiting
            and (self.holds_at is None or held.rows.length < held.piece.prompt_len + self.holds_at)
        ]

    def open(self, piece: interface.Piece) -> None:
        if len(self.open_pieces) >= self._max_pieces:
            raise ValueError(f"{self._max_pieces} pieces are open; there is no room for another")
        if not any(low <= piece.start and piece.stop <= high for low, high in self._held):
            raise ValueError(f"layers [{piece.start}, {piece.stop}) are not here")
        rows = _Rows(piece.start, piece.stop)
        self.open_pieces[piece.piece_id] = _Open(piece, rows, collections.deque())

    def feed(
        self,
        piece_id: str,
        position: int,
        *,
        token_ids: Sequence[int] | None = None,
        hidden: np.ndarray | None = None,
    ) -> None:
        held = self.open_pieces[piece_id]
        if position != held.due:
            raise ValueError(f"rows from {position} came; those from {held.due} are due")
        entering = token_ids if held.piece.start == 0 else hidden
        if entering is None or (token_ids is None) == (hidden is None):
            raise ValueError("rows of the wrong kind")
        held.waiting.extend(entering)
        if held.due > held.piece.max_len:
            raise ValueError(f"row {held.due} is past max_len={held.piece.max_len}")

    def truncate(self, piece_id: str, position: int) -> None:
        held = self.open_pieces[piece_id]
        if position > held.due:
            raise ValueError(f"there is no row {position}")
        while held.due > max(position, held.rows.length):
            held.waiting.pop()
        if position < held.rows.length:
            held.rows.truncate(position)

    def close_piece(self, piece_id: str) -> None:
        self.open_pieces.pop(piece_id, None)

    def step(self) -> list[interface.PieceOutput]:
        if self._steps_left == 0:
            self._gate.wait()
        else:
            self._steps_left -= 1
        if self.fails is not None:
            error, self.fails = self.fails, None
            raise error
        budget, outputs = self._rows_per_step, []
        with_rows = self._runnable
        self.steps.append(len(with_rows))
        # Those that were served go to the back, so that none starves.
        for held in with_rows:
            count = min(len(held.waiting), max(1, budget))
            budget -= count
            outputs.extend(self._run(held, count))
            self.open_pieces[held.piece.piece_id] = self.open_pieces.pop(held.piece.piece_id)
        return outputs

    def _run(self, held: _Open, count: int) -> list[interface.PieceOutput]:
        piece, begin = held.piece, held.rows.length
        self.num_rows += count
        leaving = [held.rows.run(held.waiting.popleft()) for _ in range(count)]
        if piece.stop < NUM_LAYERS:
            hidden = np.stack(leaving)
            if self.spoils:
                hidden[-1, 3] = np.nan
            return [interface.PieceOutput(piece_id=piece.piece_id, position=begin, hidden=hidden)]
        if held.waiting or held.rows.length < piece.prompt_len:
            return []
        return [self._draw(held, leaving[-1])]

    def _draw(self, held: _Open, row: np.ndarray) -> interface.PieceOutput:
        piece, length = held.piece, held.rows.length
        token = _pick(row, piece.params, length)
        # By position, since rows may have been forgotten.
        drawn = length - piece.prompt_len + 1
        finish = _finish(token, drawn, piece.params, length + 1, piece.max_len)
        if piece.start == 0 and finish is None:
            held.waiting.append(token)
        return interface.PieceOutput(
            piece_id=piece.piece_id, position=length - 1, token_ids=(token,), finish_reason=finish
        )
