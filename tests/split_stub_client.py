"""A client of split sessions that needs no jax and stops in the middle of decode, to be killed.

Its first layers give rows of ones. It says `in decode`, and from then on neither gives nor takes
rows; if its session ends it says why and ends. Run as PORT IDENTITY, the latter in JSON.
"""

import asyncio
import collections
import sys
from collections.abc import Sequence

import msgspec
import numpy as np

from nanoflow_jax import request
from nanoflow_jax.split import client, codecs, cut, errors, interface, messages, settings, transport

_PROMPT = (1, 5, 9, 20, 33)
_NUM_DRAWN = 3


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


class _Stub:
    """The client's piece: takes token ids, gives ones, and waits for ever after a few tokens."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._waiting: collections.deque[interface.PieceOutput] = collections.deque()

    @property
    def has_work(self) -> bool:
        return bool(self._waiting)

    def open(self, piece: interface.Piece) -> None:
        self._name = piece.piece_id

    def feed(self, piece_id: str, position: int, *, token_ids: Sequence[int], hidden: None) -> None:
        if position >= len(_PROMPT) + _NUM_DRAWN:
            _say("in decode")
            return
        rows = np.ones((len(token_ids), self._width), np.float32)
        output = interface.PieceOutput(piece_id=piece_id, position=position, hidden=rows)
        self._waiting.append(output)

    def close_piece(self, piece_id: str) -> None:
        self._waiting.clear()

    def step(self) -> list[interface.PieceOutput]:
        return [self._waiting.popleft()]


async def _run(port: int, identity: messages.Identity) -> None:
    made = client.SplitClient(
        transport.Endpoint(host="127.0.0.1", port=port),
        identity,
        engine=_Stub(identity.hidden_size),
        held_layers=((0, 1),),
        codecs=(codecs.Codec.F32,),
        knobs=settings.ClientSection(max_attempts=1),
    )
    params = request.SamplingParams(max_tokens=50, temperature=0.0, seed=0, ignore_eos=True)
    part = cut.Cut(start=1, stop=identity.num_layers, num_layers=identity.num_layers)
    async with made:
        try:
            await made.generate(_PROMPT, params, part)
        except errors.SplitError as error:
            _say(str(error))


if __name__ == "__main__":
    asyncio.run(_run(int(sys.argv[1]), msgspec.json.decode(sys.argv[2], type=messages.Identity)))
