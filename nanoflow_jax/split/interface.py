"""What runs pieces of a model's layers: the engine side of split serving, as its callers see it."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Float

from nanoflow_jax import request


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """Layers [start, stop) of one session on one engine.

    Attributes:
        piece_id: Unique among the pieces that the engine holds.
        start: First layer. At 0 token ids enter, else hidden states of the border before it.
        stop: The layer after the last. At the model's end the piece has the head and draws, else
            hidden states leave at the border before it.
        params: How to draw, where the piece ends with the head.
        prompt_len: Tokens of the prompt.
        max_len: Most positions, the prompt's included; room for all of them is reserved.
    """

    piece_id: str
    start: int
    stop: int
    params: request.SamplingParams
    prompt_len: int
    max_len: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class PieceOutput:
    """What one step gave of one piece.

    Attributes:
        piece_id: Whose.
        position: Of the first row; of the row that a token was drawn from, if one was.
        hidden: [n, D] hidden states that leave, in order of position; None at the model's end.
        token_ids: Drawn, where the piece ends with the head.
        logprobs: One entry per drawn token, where asked for.
        finish_reason: Why the piece gives nothing more, with its last output.
        error: Why it failed, if it did.
    """

    piece_id: str
    position: int
    hidden: Float[np.ndarray, "n D"] | None = None
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[request.TokenLogprobs, ...] = ()
    finish_reason: request.FinishReason | None = None
    error: str | None = None


class PieceEngine(Protocol):
    """Runs pieces of many sessions, and perhaps whole requests, in steps."""

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""

    def open(self, piece: Piece) -> None:
        """Takes a piece in and reserves its room.

        Raises:
            ValueError: It cannot be served; others are not affected.
        """

    def feed(
        self,
        piece_id: str,
        position: int,
        *,
        token_ids: Sequence[int] | None = None,
        hidden: Float[np.ndarray, "n D"] | None = None,
    ) -> None:
        """Gives a piece its next rows, at [position, position + n), in order.

        A piece that draws but does not start at layer 0 gets the rows of drawn tokens here too.

        Raises:
            ValueError: They are not the next rows, of the wrong kind, shape or dtype, or not
                finite.
        """

    def truncate(self, piece_id: str, position: int) -> None:
        """Forgets the rows at and after a position; the next rows begin there.

        Raises:
            ValueError: There is no such row.
        """

    def close_piece(self, piece_id: str) -> None:
        """Ends a piece and frees its room; an unknown one is ignored."""

    def step(self) -> list[PieceOutput]:
        """One turn; what came out of it, or of the turn before."""
