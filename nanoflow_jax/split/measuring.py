"""Times of ranges of layers: of an engine here, and of a gateway's through ordinary sessions."""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from nanoflow_jax import request
from nanoflow_jax.split import client as client_lib
from nanoflow_jax.split import cut as cut_lib
from nanoflow_jax.split import interface
from nanoflow_jax.split.planning.segments import Timed

Say = Callable[[str], None]
_REPEATS = 5  # of which the median counts, after one that only warms up


def ranges(borders: Sequence[int], held: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges of held layers to time: each single one between borders, and each from either end.

    Args:
        borders: Ascending, 0 and L included.
        held: Ranges [start, stop) of layers.
    """
    found = set(held)
    for low, high in held:
        inside = [low, *(b for b in borders if low < b < high), high]
        found.update(itertools.pairwise(inside))
        found.update((low, border) for border in inside[1:])
        found.update((border, high) for border in inside[:-1])
    return sorted(found)


def cuts(borders: Sequence[int], held: Sequence[tuple[int, int]]) -> list[cut_lib.Cut]:
    """All ranges of layers that a gateway may run for a client, few if it holds few.

    Args:
        borders: Ascending, 0 and L included.
        held: Ranges [start, stop) of the client's layers.
    """
    num_layers = borders[-1]
    found = [
        cut_lib.Cut(start=start, stop=stop, num_layers=num_layers)
        for start, stop in itertools.combinations(borders, 2)
    ]
    return [
        cut
        for cut in found
        if all(any(a <= low and high <= b for a, b in held) for low, high in cut.client_layers)
    ]


def time_engine(
    engine: interface.PieceEngine,
    spans: Sequence[tuple[int, int]],
    *,
    prompt_lens: Sequence[int],
    num_steps: int,
    width: int,
    num_layers: int,
    say: Say,
) -> list[Timed]:
    """Times an engine that nobody else uses.

    Args:
        engine: Which has the layers.
        spans: Ranges of them.
        prompt_lens: Tokens of the prompts.
        num_steps: Further tokens of each, at least one.
        width: D.
        num_layers: L.
        say: Shows progress.

    Raises:
        ValueError: The engine refuses.
    """
    found = []
    for (start, stop), length in itertools.product(spans, prompt_lens):
        piece = interface.Piece(
            piece_id="timed",
            start=start,
            stop=stop,
            params=_params(num_steps),
            prompt_len=length,
            max_len=length + num_steps + 1,
        )
        runs = [
            _time_piece(engine, piece, num_steps, width=width, draws=stop == num_layers)
            for _ in range(1 + _REPEATS)
        ]
        found.append(_timed(start, stop, length, num_steps, runs[1:]))
        say(_progress("this end", found[-1]))
    return found


async def time_gateway(
    client: client_lib.SplitClient,
    cuts: Sequence[cut_lib.Cut],
    *,
    prompt_lens: Sequence[int],
    num_steps: int,
    say: Say,
) -> list[Timed]:
    """Times a gateway by what it says that its steps took, as any client may.

    Args:
        client: Whose layers compute nothing; see `stand_in`.
        cuts: Ranges to time.
        prompt_lens: As of `time_engine`.
        num_steps: The same.
        say: The same.

    Raises:
        SplitError: The gateway refuses, or is lost.
    """
    found = []
    for cut, length in itertools.product(cuts, prompt_lens):
        runs = []
        for _ in range(1 + _REPEATS):
            done = await client.generate([0] * length, _params(num_steps), cut)
            first_s = done.report.server_first_s
            runs.append((first_s, (done.report.server_s - first_s) / num_steps))
        found.append(_timed(cut.start, cut.stop, length, num_steps, runs[1:]))
        say(_progress("the gateway", found[-1]))
    return found


def _params(num_steps: int) -> request.SamplingParams:
    return request.SamplingParams(max_tokens=num_steps + 1, temperature=0.0, ignore_eos=True)


def _timed(
    start: int, stop: int, length: int, num_steps: int, runs: Sequence[tuple[float, float]]
) -> Timed:
    return Timed(
        start=start,
        stop=stop,
        prompt_len=length,
        prefill_s=statistics.median(prefill_s for prefill_s, _ in runs),
        context_len=length + (num_steps + 1) / 2,
        step_s=statistics.median(step_s for _, step_s in runs),
    )


def _progress(who: str, timed: Timed) -> str:
    return (
        f"{who}, layers {timed.start}:{timed.stop}: {timed.prompt_len} tokens in "
        f"{timed.prefill_s * 1e3:.2f} ms, one more in {timed.step_s * 1e3:.2f} ms"
    )


def _time_piece(
    engine: interface.PieceEngine,
    piece: interface.Piece,
    num_steps: int,
    *,
    width: int,
    draws: bool,
) -> tuple[float, float]:
    """Seconds of the prompt, and the median of those of steps."""
    engine.open(piece)
    try:
        times = list(_lap_times(engine, piece, num_steps, width=width, draws=draws))
    finally:
        engine.close_piece(piece.piece_id)
    return times[0], statistics.median(times[1:])


def _lap_times(
    engine: interface.PieceEngine,
    piece: interface.Piece,
    num_steps: int,
    *,
    width: int,
    draws: bool,
) -> Iterator[float]:
    """Of the prompt, then of each further row."""
    end = 0
    is_whole = draws and piece.start == 0
    for lap in range(1 + num_steps):
        count = piece.prompt_len if lap == 0 else 1
        begun_s = time.monotonic()
        if lap == 0 or not is_whole:
            if piece.start == 0:
                engine.feed(piece.piece_id, end, token_ids=[0] * count)
            else:
                engine.feed(piece.piece_id, end, hidden=np.ones((count, width), np.float32))
        end += count
        _step_until(engine, piece.piece_id, end)
        yield time.monotonic() - begun_s


def _step_until(engine: interface.PieceEngine, piece_id: str, end: int) -> None:
    """Steps until what came of the row before `end` is there.

    Raises:
        ValueError: The piece failed.
    """
    while True:
        for output in engine.step():
            if output.piece_id != piece_id:
                continue
            if output.error is not None:
                raise ValueError(f"the engine could not be timed: {output.error}")
            rows = 1 if output.hidden is None else len(output.hidden)
            if output.position + rows >= end:
                return
