"""Generates with a client's own layers alone, where it has the whole model."""

import asyncio
import time
from collections.abc import Sequence

from nanoflow_jax import request
from nanoflow_jax.split import driver, engine_thread, errors, interface, remote, report
from nanoflow_jax.split.messages import Code


async def generate(
    engine: engine_thread.EngineThread, piece: interface.Piece, prompt_ids: Sequence[int]
) -> driver.Generation:
    """Generates one choice over a piece of all layers.

    Args:
        engine: Has them.
        piece: What to open.
        prompt_ids: Token ids, at least one.

    Raises:
        ValueError: The engine refuses it.
        SplitError: The engine failed.
    """
    outputs: asyncio.Queue[interface.PieceOutput] = asyncio.Queue()
    record = report.Record(begun_s=time.monotonic(), client_begun_s=engine.busy_s)
    token_ids: list[int] = []
    logprobs: list[request.TokenLogprobs] = []
    finish = None
    await engine.open(piece, outputs.put_nowait)
    try:
        engine.feed(piece.piece_id, 0, token_ids=prompt_ids)
        while finish is None:
            output = await outputs.get()
            if output.error is not None:
                raise errors.SplitError(Code.ENGINE, f"the client's engine: {output.error}")
            for token in output.token_ids or ():
                token_ids.append(token)
                record.drew(server_s=0.0, client_busy_s=engine.busy_s)
            logprobs += output.logprobs
            finish = output.finish_reason
    finally:
        engine.close_piece(piece.piece_id)
    made = record.report(None, "", report.Promise(), remote.Traffic(), client_busy_s=engine.busy_s)
    return driver.Generation(
        token_ids=tuple(token_ids), logprobs=tuple(logprobs), finish_reason=finish, report=made
    )
