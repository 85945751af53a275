"""What waits to be written to a stream; hidden states become bytes only when their turn comes."""

import asyncio
import collections
import dataclasses

import numpy as np
from jaxtyping import Float

from nanoflow_jax.split import codecs, messages, transport

# Smaller rows are written faster than a thread is woken.
_THREAD_BYTES = 64 << 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A message, and the rows that go with it.

    Attributes:
        message: An `Act` if there are rows.
        hidden: The rows.
    """

    message: messages.Message
    hidden: Float[np.ndarray, "n D"] | None = None

    @property
    def num_bytes(self) -> int:
        """Of its rows as they wait."""
        return 0 if self.hidden is None else self.hidden.nbytes


class Outbox:
    """Entries in the order in which they are to be written.

    Invariant: `num_bytes` is that of the entries.

    Attributes:
        num_bytes: Of rows that wait.
    """

    def __init__(self) -> None:
        self._entries: collections.deque[Entry] = collections.deque()
        self._filled = asyncio.Event()
        self._is_closed = False
        self.num_bytes = 0

    @property
    def is_done(self) -> bool:
        """Whether nothing is to be written any more."""
        return self._is_closed and not self._entries

    def put(self, message: messages.Message, hidden: np.ndarray | None = None) -> None:
        """Adds a message; nothing once closed."""
        self.put_entry(Entry(message=message, hidden=hidden))

    def put_entry(self, entry: Entry) -> None:
        """Adds an entry; nothing once closed."""
        if self._is_closed:
            return
        self._entries.append(entry)
        self.num_bytes += entry.num_bytes
        self._filled.set()

    def close(self, last: messages.Message) -> None:
        """Forgets what waits; this message is the last one."""
        if not self._is_closed:
            self._entries.clear()
            self.num_bytes = 0
            self.put(last)
            self._is_closed = True

    async def write_next(self, stream: transport.Stream, *, timeout_s: float) -> int:
        """Writes one entry as soon as there is one; the bytes of its frame.

        Raises:
            StreamLostError: The other end is gone, or did not read for so long.
            CodecError: Rows cannot be written.
        """
        while not self._entries:
            self._filled.clear()
            await self._filled.wait()
        entry = self._entries.popleft()
        self.num_bytes -= entry.num_bytes
        frame = await encode(entry)
        try:
            async with asyncio.timeout(timeout_s):
                await stream.write(frame)
        except TimeoutError as error:
            raise transport.StreamLostError(
                f"the other end did not read a frame of {len(frame)} bytes for {timeout_s:g} s"
            ) from error
        return len(frame)


async def encode(entry: Entry) -> bytes:
    """The frame of an entry.

    Raises:
        CodecError: Its rows cannot be written.
    """
    if entry.hidden is None:
        return messages.to_frame(entry.message)
    assert isinstance(entry.message, messages.Act)
    if entry.num_bytes < _THREAD_BYTES:
        return _encode(entry.message, entry.hidden)
    return await asyncio.to_thread(_encode, entry.message, entry.hidden)


def _encode(message: messages.Act, hidden: np.ndarray) -> bytes:
    return messages.to_frame(message, codecs.encode(hidden, message.codec))


async def decode(message: messages.Act, payload: bytes, *, dtype: str) -> np.ndarray:
    """The rows of a message.

    Raises:
        CodecError: They are not of the stated size, or not finite.
    """

    def read() -> np.ndarray:
        return codecs.decode(
            payload, message.codec, num_rows=message.num_rows, width=message.width, dtype=dtype
        )

    return read() if len(payload) < _THREAD_BYTES else await asyncio.to_thread(read)
