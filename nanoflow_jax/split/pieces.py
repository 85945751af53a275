"""What an engine holds of a model, which pieces it can run, and how far each of them is."""

import dataclasses
import itertools
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from nanoflow_jax import request as request_lib
from nanoflow_jax.models import architecture
from nanoflow_jax.split import interface


def held_spans(
    num_layers: int, grid: Sequence[int], layers: Sequence[tuple[int, int]] | None
) -> tuple[architecture.Span, ...]:
    """The segments of an engine, in order.

    Args:
        num_layers: L.
        grid: Borders, ascending.
        layers: Ranges [start, stop) that are held, ascending; None for all.

    Raises:
        ValueError: The grid does not cut between layers, or the ranges are no parts of the model.
    """
    cut = architecture.cut(num_layers, grid)
    if layers is None:
        return cut
    edges = [edge for held in layers for edge in held]
    if not edges or edges[0] < 0 or edges[-1] > num_layers or not _ascends(layers):
        text = ", ".join(f"{start}:{stop}" for start, stop in layers)
        raise ValueError(
            f"layers {text or 'none'} are no ascending ranges within 0:{num_layers}, the model's; "
            "give START:STOP for each"
        )
    found = []
    for start, stop in layers:
        inner = [border for border in grid if start < border < stop]
        borders = [start, *inner, stop]
        found += [architecture.Span(*pair) for pair in itertools.pairwise(borders)]
    return tuple(found)


def _ascends(layers: Sequence[tuple[int, int]]) -> bool:
    is_some = all(start < stop for start, stop in layers)
    return is_some and all(a[1] <= b[0] for a, b in itertools.pairwise(layers))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Held:
    """What an engine has of a model, and what may enter it.

    Attributes:
        config: The model.
        spans: The segments that the engine runs, in order.
        dtype: Of hidden states.
    """

    config: architecture.ModelConfig
    spans: tuple[architecture.Span, ...]
    dtype: np.dtype[Any]

    def draws(self, piece: interface.Piece) -> bool:
        """Whether a piece ends with the head."""
        return piece.stop == self.config.num_layers

    def check(self, piece: interface.Piece, *, max_context_len: int) -> None:
        """Raises ValueError, with the reason, if the engine cannot run a piece."""
        span = architecture.Span(piece.start, piece.stop)
        inside = [held for held in self.spans if span.covers(held)]
        covered = sum(stop - start for start, stop in inside)
        if not inside or covered != span.stop - span.start:
            text = ", ".join(f"{start}:{stop}" for start, stop in self.spans)
            raise ValueError(
                f"layers {span.start}:{span.stop} are not made of the segments that are here, "
                f"{text}; take borders of the grid, and layers that are held"
            )
        if not 1 <= piece.prompt_len <= piece.max_len <= max_context_len:
            raise ValueError(
                f"prompt_len={piece.prompt_len} and max_len={piece.max_len} are not 1 or more, "
                f"ascending and at most {max_context_len}, which the context holds"
            )
        if self.draws(piece):
            _check_params(piece.params, has_prompt=piece.start == 0)

    def tokens(
        self,
        piece_id: str,
        token_ids: Sequence[int] | None,
        hidden: Float[np.ndarray, "n D"] | None,
    ) -> list[int]:
        """Token ids that enter the first layer, checked.

        Raises:
            ValueError: They are none, or hidden states came instead.
        """
        if hidden is not None or not token_ids:
            raise ValueError(f"piece {piece_id!r} begins with the embedding: feed token ids alone")
        found = list(token_ids)
        for token in found:
            is_int = isinstance(token, int) and not isinstance(token, bool)
            if not is_int or not 0 <= token < self.config.vocab_size:
                raise ValueError(
                    f"{token!r} is not a token id of this model, 0 to {self.config.vocab_size - 1}"
                )
        return found

    def rows(
        self,
        piece_id: str,
        token_ids: Sequence[int] | None,
        hidden: Float[np.ndarray, "n D"] | None,
    ) -> Float[np.ndarray, "n D"]:
        """Hidden states that enter between layers: checked, and copied as the model runs.

        Raises:
            ValueError: They have another shape or dtype or are not finite, or token ids came
                instead.
        """
        if token_ids is not None or hidden is None:
            raise ValueError(f"piece {piece_id!r} begins between layers: feed hidden states alone")
        width = self.config.hidden_size
        if hidden.ndim != 2 or hidden.shape[1] != width or not len(hidden):
            raise ValueError(f"hidden states have shape {hidden.shape}, not (rows, {width})")
        if hidden.dtype not in (self.dtype, np.float32):
            raise ValueError(
                f"hidden states are {hidden.dtype}; send {self.dtype}, the model's, or float32"
            )
        rows = hidden.astype(self.dtype)
        is_finite = np.isfinite(rows.astype(np.float32)).all(axis=1)
        if not is_finite.all():
            raise ValueError(
                f"hidden states of row {int(np.argmin(is_finite))} of {len(rows)} are not finite"
            )
        return rows


def _check_params(params: request_lib.SamplingParams, *, has_prompt: bool) -> None:
    """Refuses what needs the tokens of a prompt that is not here, or more than a piece can say."""
    wrong = {
        "repetition_penalty": params.repetition_penalty != 1.0 and not has_prompt,
        "prompt_logprobs": params.prompt_logprobs is not None,
        "bad_words": bool(params.bad_words),
        "n": params.n != 1,
    }
    for name, is_set in wrong.items():
        if is_set:
            raise ValueError(
                f"{name}={getattr(params, name)!r} cannot be had of a session whose layers are "
                "split; leave it out, or send an ordinary request"
            )


@dataclasses.dataclass(kw_only=True)
class Progress:
    """An open piece and how far it is.

    Attributes:
        piece: What was opened.
        name: Its request in the engine.
        draws: Whether it ends with the head.
        num_fed: Positions that came.
        awaits_draw: Whether a token comes of the last of them.
        has_ended: Whether it gives nothing more.
        token_ids: What came, of a piece of all layers.
        num_drawn: Tokens that were handed on.
    """

    piece: interface.Piece
    name: str
    draws: bool
    num_fed: int = 0
    token_ids: list[int] = dataclasses.field(default_factory=list)
    num_drawn: int = 0
    awaits_draw: bool = False
    has_ended: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether it has all layers, so that it is fed a prompt and then goes on by itself."""
        return self.draws and self.piece.start == 0

    def request(self) -> request_lib.Request:
        """What the engine is asked; of a prompt that is not here it knows the length."""
        piece, params = self.piece, self.piece.params
        if not self.draws:
            return request_lib.Request(
                request_id=self.name, prompt_ids=(0,), params=request_lib.SamplingParams()
            )
        most = piece.max_len + 1 - piece.prompt_len
        params = dataclasses.replace(
            params,
            max_tokens=min(most, params.max_tokens or most),
            seed=secrets.randbits(63) if params.seed is None else params.seed,
        )
        return request_lib.Request(
            request_id=self.name,
            prompt_ids=tuple(self.token_ids) or (0,) * piece.prompt_len,
            params=params,
        )

    def advance(self, position: int, count: int) -> None:
        """Counts rows that come.

        Raises:
            ValueError: They are not the next, too many, or come before the token that they follow.
        """
        piece, stop = self.piece, position + count
        if position != self.num_fed:
            raise ValueError(
                f"rows of piece {piece.piece_id!r} begin at position {position}, and "
                f"{self.num_fed} is the next"
            )
        if stop > piece.max_len:
            raise ValueError(
                f"piece {piece.piece_id!r} was opened for {piece.max_len} positions, and these "
                f"rows end at {stop}"
            )
        if self.is_whole and stop > piece.prompt_len:
            raise ValueError(
                f"piece {piece.piece_id!r} has all layers and goes on by itself after the "
                f"{piece.prompt_len} rows of its prompt; these end at {stop}"
            )
        if self.draws:
            if position < piece.prompt_len < stop or (position >= piece.prompt_len and count > 1):
                raise ValueError(
                    f"piece {piece.piece_id!r} draws: after the {piece.prompt_len} rows of its "
                    f"prompt they come one at a time, and not as {position} to {stop}"
                )
            if self.awaits_draw:
                raise ValueError(
                    f"piece {piece.piece_id!r} draws, and no token was drawn of row "
                    f"{position - 1} yet; send the next row after it"
                )
            self.awaits_draw = stop >= piece.prompt_len
        self.num_fed = stop

    def retreat(self, position: int) -> bool:
        """Forgets rows at and after a position, and says whether there were any.

        Raises:
            ValueError: The position was not reached, or what was drawn cannot be taken back.
        """
        piece = self.piece
        if not 0 <= position <= self.num_fed:
            raise ValueError(
                f"piece {piece.piece_id!r} has {self.num_fed} rows and cannot be cut at {position}"
            )
        if position == self.num_fed:
            return False
        keeps_count = piece.params.uses_penalties or piece.params.grammar is not None
        if self.is_whole and self.num_fed == piece.prompt_len:
            raise ValueError(
                f"piece {piece.piece_id!r} has all layers and its prompt is running; open another"
            )
        if self.draws and keeps_count:
            raise ValueError(
                f"piece {piece.piece_id!r} draws with penalties or a grammar, which cannot take "
                "tokens back; open another"
            )
        self.num_fed, self.awaits_draw = position, False
        del self.token_ids[position:]
        return True

    def output(self, update: request_lib.RequestUpdate) -> interface.PieceOutput:
        """What an update of its request says, which is of the last row."""
        last = self.num_fed - 1 + (self.num_drawn if self.is_whole else 0)
        self.awaits_draw, self.num_drawn = False, self.num_drawn + len(update.token_ids)
        self.has_ended = update.finish_reason is not None
        return interface.PieceOutput(
            piece_id=self.piece.piece_id,
            position=max(last, 0),
            token_ids=update.token_ids,
            logprobs=update.logprobs,
            finish_reason=update.finish_reason,
            error=update.error,
        )
