"""A client's layers that compute nothing, to time the server's alone."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from nanoflow_jax import request
from nanoflow_jax.split import interface


class StandIn:
    """A piece engine whose hidden states are ones, and which draws token 0.

    It fulfils `interface.PieceEngine` for pieces that do not have all layers.
    """

    def __init__(self, *, width: int, num_layers: int) -> None:
        """No piece is open.

        Args:
            width: D.
            num_layers: L.
        """
        self._width, self._num_layers = width, num_layers
        self._open: dict[str, interface.Piece] = {}
        self._outputs: list[interface.PieceOutput] = []

    @property
    def has_work(self) -> bool:
        """See `interface.PieceEngine`."""
        return bool(self._outputs)

    def open(self, piece: interface.Piece) -> None:
        """See `interface.PieceEngine`."""
        self._open[piece.piece_id] = piece

    def feed(
        self,
        piece_id: str,
        position: int,
        *,
        token_ids: Sequence[int] | None = None,
        hidden: Float[np.ndarray, "n D"] | None = None,
    ) -> None:
        """See `interface.PieceEngine`; whatever comes is taken."""
        piece = self._open[piece_id]
        count = len(token_ids or ()) if hidden is None else len(hidden)
        if piece.stop < self._num_layers:
            rows = np.ones((count, self._width), np.float32)
            self._outputs.append(
                interface.PieceOutput(piece_id=piece_id, position=position, hidden=rows)
            )
        elif position + count >= piece.prompt_len:
            self._outputs.append(_drawn(piece, position + count))

    def truncate(self, piece_id: str, position: int) -> None:
        """See `interface.PieceEngine`; nothing is remembered that could be forgotten."""

    def close_piece(self, piece_id: str) -> None:
        """See `interface.PieceEngine`."""
        self._open.pop(piece_id, None)
        self._outputs = [one for one in self._outputs if one.piece_id != piece_id]

    def step(self) -> list[interface.PieceOutput]:
        """See `interface.PieceEngine`."""
        outputs, self._outputs = self._outputs, []
        return outputs


def _drawn(piece: interface.Piece, end: int) -> interface.PieceOutput:
    drawn = end - piece.prompt_len + 1
    is_last = drawn == piece.params.max_tokens or end + 1 >= piece.max_len
    return interface.PieceOutput(
        piece_id=piece.piece_id,
        position=end - 1,
        token_ids=(0,),
        finish_reason=request.FinishReason.LENGTH if is_last else None,
    )
