"""Sessions of split serving in one process: engines that hand hidden states to each other."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from nanoflow_jax import config, request
from nanoflow_jax.engine import model_source
from nanoflow_jax.split import engine as split_engine
from nanoflow_jax.split import interface


def build_split(
    folder: pathlib.Path,
    *,
    grid: Sequence[int] = (),
    layers: Sequence[tuple[int, int]] | None = None,
    **knobs: Any,
) -> split_engine.SplitEngine:
    """An engine of some layers in float32; the knobs are named as on the command line."""
    merged = {"penalty_requests": 2, "dtype": "float32", **knobs}
    section = config.EngineConfig.from_knobs(model=str(folder), **merged)
    source = model_source.open_model(section.model)
    return split_engine.build_split_engine(section, source, grid=grid, layers=layers)


def greedy(**params: Any) -> request.SamplingParams:
    """Greedy, with seed 0, unless told otherwise."""
    return request.SamplingParams(**{"temperature": 0.0, "seed": 0, "ignore_eos": True, **params})


@dataclasses.dataclass(eq=False, kw_only=True)
class Session:
    """One generation over the pieces of a plan, in the order of layers.

    Attributes:
        name: Of its pieces.
        prompt: Token ids.
        plan: Engine, first layer and end of each piece.
        params: How to draw.
        chunk: Tokens of the prompt that are sent at once.
    """

    name: str
    prompt: Sequence[int]
    plan: Sequence[tuple[split_engine.SplitEngine, int, int]]
    params: request.SamplingParams
    chunk: int = 1_000_000
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[request.TokenLogprobs] = dataclasses.field(default_factory=list)
    finish_reason: request.FinishReason | None = None
    error: str | None = None

    def open(self) -> None:
        """Opens all pieces and feeds the prompt to the first."""
        assert self.params.max_tokens is not None
        for index, (engine, start, stop) in enumerate(self.plan):
            engine.open(
                interface.Piece(
                    piece_id=self.piece_id(index),
                    start=start,
                    stop=stop,
                    params=self.params,
                    prompt_len=len(self.prompt),
                    max_len=len(self.prompt) + self.params.max_tokens,
                )
            )
        for start in range(0, len(self.prompt), self.chunk):
            self._feed_first(start, self.prompt[start : start + self.chunk])

    def piece_id(self, index: int) -> str:
        """The name of one of its pieces."""
        return f"{self.name} {index}"

    def _feed_first(self, position: int, token_ids: Sequence[int]) -> None:
        self.plan[0][0].feed(self.piece_id(0), position, token_ids=token_ids)

    def take(self, index: int, output: interface.PieceOutput) -> None:
        """Hands what came of a piece to the next one, or a token to the first."""
        assert self.finish_reason is None, "an output came after the last one"
        if output.hidden is not None:
            following = self.plan[index + 1][0]
            following.feed(self.piece_id(index + 1), output.position, hidden=output.hidden)
            return
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs
        self.finish_reason, self.error = output.finish_reason, output.error
        if self.finish_reason is not None:
            self.close()
        elif len(self.plan) > 1:  # one that has all layers goes on by itself
            self._feed_first(output.position + 1, output.token_ids)

    def close(self) -> None:
        """Ends its pieces."""
        for index, (engine, _, _) in enumerate(self.plan):
            engine.close_piece(self.piece_id(index))


def turn(
    engines: Sequence[split_engine.SplitEngine], sessions: Sequence[Session]
) -> list[request.RequestUpdate]:
    """One step of each engine that has work; what whole requests got."""
    owners = {s.piece_id(i): (s, i) for s in sessions for i in range(len(s.plan))}
    updates = []
    for engine in engines:
        if engine.has_work:
            for output in engine.step():
                session, index = owners[output.piece_id]
                session.take(index, output)
            engine.check()
        updates += engine.take_updates()
    return updates


def finish(
    engines: Sequence[split_engine.SplitEngine], sessions: Sequence[Session]
) -> list[request.RequestUpdate]:
    """Turns until nothing is left to do; checks that nothing compiled and no page is held."""
    updates = []
    while any(engine.has_work for engine in engines):
        updates += turn(engines, sessions)
    for engine in engines:
        assert engine.engine.num_late_compiles == 0
        assert engine.engine.num_pages_used == 0
    return updates


def tokens_of(updates: Sequence[request.RequestUpdate], request_id: str) -> list[int]:
    """The tokens of one whole request."""
    return [token for u in updates if u.request_id == request_id for token in u.token_ids]


def rows(*shape: int, seed: int = 0) -> np.ndarray:
    """Hidden states of no meaning."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
