"""An engine that runs pieces of sessions beside whole requests, in the same steps."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from nanoflow_jax import config as config_lib
from nanoflow_jax import request as request_lib
from nanoflow_jax.engine import build, fed, model_source
from nanoflow_jax.engine import engine as engine_lib
from nanoflow_jax.models import architecture
from nanoflow_jax.split import interface, pieces

# How the engine's names of pieces begin, which no request's does.
_MARK = "piece\0"


class SplitEngine:
    """Runs pieces and requests; fulfils `interface.PieceEngine`.

    Invariant: the engine holds a request for each piece that is open and has not ended; of a piece
    of all layers, from when its prompt is there.
    """

    def __init__(self, engine: engine_lib.Engine, held: pieces.Held) -> None:
        """No piece is open.

        Args:
            engine: Runs the segments that are held.
            held: What it has of the model.
        """
        self._engine, self.held = engine, held
        self._open: dict[str, pieces.Progress] = {}
        self._by_name: dict[str, pieces.Progress] = {}
        self._names = itertools.count()
        self._updates: list[request_lib.RequestUpdate] = []
        self._idle_steps = 0

    @property
    def engine(self) -> engine_lib.Engine:
        """What runs the steps, with limits and counters; its own `step` is not to be called."""
        return self._engine

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything.

        Not if all that waits needs pages, which others keep between the rows that they are fed.
        """
        return self._engine.has_work and self._idle_steps < 2

    def add(self, request: request_lib.Request) -> None:
        """Takes a whole request in, whose updates `take_updates` gives; see `Engine.add`."""
        self._idle_steps = 0
        self._engine.add(request)

    def abort(self, request_id: str, *, output_len: int | None = None) -> None:
        """Ends a whole request; see `Engine.abort`."""
        self._idle_steps = 0
        self._engine.abort(request_id, output_len=output_len)

    def take_updates(self) -> list[request_lib.RequestUpdate]:
        """What steps gave to whole requests since the last call."""
        updates, self._updates = self._updates, []
        return updates

    def open(self, piece: interface.Piece) -> None:
        """See `interface.PieceEngine.open`."""
        if piece.piece_id in self._open:
            raise ValueError(f"piece id {piece.piece_id!r} is already in use")
        self.held.check(piece, max_context_len=self._engine.limits.max_context_len)
        self._idle_steps = 0
        # A name of our own: what is still on its way of an ended piece is not for the next.
        progress = pieces.Progress(
            piece=piece, name=f"{_MARK}{next(self._names)}", draws=self.held.draws(piece)
        )
        if not progress.is_whole:
            self._engine.add(
                progress.request(),
                fed.Fed(
                    architecture.Span(piece.start, piece.stop),
                    num_layers=self.held.config.num_layers,
                    max_len=piece.max_len,
                ),
            )
        self._open[piece.piece_id] = self._by_name[progress.name] = progress

    def feed(
        self,
        piece_id: str,
        position: int,
        *,
        token_ids: Sequence[int] | None = None,
        hidden: Float[np.ndarray, "n D"] | None = None,
    ) -> None:
        """See `interface.PieceEngine.feed`; hidden states may be float32, or as the model runs."""
        progress = self._find(piece_id)
        taken: dict[str, Any]
        if progress.piece.start == 0:
            taken = {"token_ids": self.held.tokens(piece_id, token_ids, hidden)}
        else:
            taken = {"hidden": self.held.rows(piece_id, token_ids, hidden)}
        [rows] = taken.values()
        progress.advance(position, len(rows))
        self._idle_steps = 0
        if not progress.is_whole:
            self._engine.feed(progress.name, **taken)
            return
        progress.token_ids += rows
        if progress.awaits_draw:
            self._engine.add(progress.request())

    def truncate(self, piece_id: str, position: int) -> None:
        """See `interface.PieceEngine.truncate`; nothing more is told of the forgotten rows."""
        progress = self._find(piece_id)
        if progress.retreat(position) and not progress.is_whole:
            self._idle_steps = 0
            self._engine.truncate(progress.name, position)

    def close_piece(self, piece_id: str) -> None:
        """See `interface.PieceEngine.close_piece`."""
        progress = self._open.pop(piece_id, None)
        if progress is not None:
            self._idle_steps = 0
            del self._by_name[progress.name]
            self._engine.abort(progress.name)

    def _find(self, piece_id: str) -> pieces.Progress:
        progress = self._open.get(piece_id)
        if progress is None:
            raise ValueError(f"no piece {piece_id!r} is open; open it first")
        if progress.has_ended:
            raise ValueError(f"piece {piece_id!r} has ended and takes no more rows; close it")
        return progress

    def step(self) -> list[interface.PieceOutput]:
        """See `interface.PieceEngine.step`.

        Raises:
            JaxRuntimeError: The device fails whatever it is given.
        """
        counters = self._engine.counters
        before = counters.steps, counters.failed_steps
        updates = self._engine.step()
        is_idle = before == (counters.steps, counters.failed_steps)
        self._idle_steps = self._idle_steps + 1 if is_idle else 0
        outputs = [
            interface.PieceOutput(
                piece_id=self._by_name[left.request_id].piece.piece_id,
                position=left.start,
                hidden=left.hidden,
            )
            for left in self._engine.take_left()
            if left.request_id in self._by_name
        ]
        for update in updates:
            progress = self._by_name.get(update.request_id)
            if progress is not None:
                outputs.append(progress.output(update))
            elif not update.request_id.startswith(_MARK):
                self._updates.append(update)
        return outputs

    def check(self) -> None:
        """Raises AssertionError if an invariant is broken."""
        self._engine.check()

    def close(self) -> None:
        """See `Engine.close`."""
        self._engine.close()


def build_split_engine(
    config: config_lib.EngineConfig,
    source: model_source.ModelSource,
    *,
    grid: Sequence[int] = (),
    layers: Sequence[tuple[int, int]] | None = None,
    reports: build.Reports | None = None,
) -> SplitEngine:
    """Loads layers, makes their caches and compiles every program.

    Args:
        config: The knobs.
        source: The opened model.
        grid: Borders between layers at which requests may enter and leave, ascending.
        layers: Ranges [start, stop) to hold, ascending; their ends are borders too. All unless
            given.
        reports: Called while it goes on.

    Raises:
        ValueError: The knobs do not fit, or the ranges are none of this model's.
    """
    spans = pieces.held_spans(source.config.num_layers, grid, layers)
    engine, dtype = build.build_in_segments(config, source, spans, reports)
    return SplitEngine(engine, pieces.Held(config=source.config, spans=spans, dtype=dtype))
