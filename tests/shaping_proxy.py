"""A TCP proxy that makes a link slow, or breaks it, for tests."""

import asyncio
import contextlib
import struct
from collections.abc import Callable

_FRAME = b"NFSL"
_LENGTHS = struct.Struct("<II")


class _Pipe:
    """One connection: both its ends, and the tasks that carry bytes between them."""

    def __init__(self, near: asyncio.StreamWriter, far: asyncio.StreamWriter) -> None:
        self.near = near
        self.far = far

    def cut(self) -> None:
        """Both ends see the connection reset."""
        for writer in (self.near, self.far):
            writer.transport.abort()


class ShapingProxy:
    """Carries connections to a port, at a given delay and bandwidth, until told otherwise.

    Attributes:
        port: Where it listens.
        target_port: Where new connections go.
        delay_s: Each way, for each piece of data.
        bytes_per_s: Each way; None for no bound.
        up_bytes: Carried to the target, of all connections.
        down_bytes: Carried back.
        is_open: Whether new connections are taken.
        num_taken: How many were.
        spoil: "up" or "down": changes a byte of the next rows that go there, once.
        target_after_cut: Where connections go after the next `cut`, if elsewhere.
    """

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.delay_s = 0.0
        self.bytes_per_s: float | None = None
        self.up_bytes = 0
        self.down_bytes = 0
        self.is_open = True
        self.num_taken = 0
        self.num_cuts = 0
        self.spoil: str | None = None
        self.target_after_cut: int | None = None
        self._cut_up: int | None = None
        self._cut_down: int | None = None
        self._flows = asyncio.Event()
        self._flows.set()
        self._pipes: set[_Pipe] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "ShapingProxy":
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.is_open = False
        self.cut()
        # Connections that were just taken begin, and end, before the loop does.
        for _ in range(4):
            await asyncio.sleep(0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Resets all connections."""
        self.num_cuts += bool(self._pipes)
        self.target_port = self.target_after_cut or self.target_port
        for pipe in list(self._pipes):
            pipe.cut()
        self._pipes.clear()

    def cut_after(self, *, up: int | None = None, down: int | None = None) -> None:
        """Resets all connections once so many more bytes have gone up or down."""
        self._cut_up = None if up is None else self.up_bytes + up
        self._cut_down = None if down is None else self.down_bytes + down

    def half_close(self) -> None:
        """The target sees that nothing more comes; what it says is still carried."""
        for pipe in self._pipes:
            pipe.far.write_eof()

    def stall(self) -> None:
        """Carries nothing, and breaks nothing, until `flow`."""
        self._flows.clear()

    def flow(self) -> None:
        """Carries again."""
        self._flows.set()

    async def _accept(self, reader: asyncio.StreamReader, near: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._carry_both(reader, near)
        except asyncio.CancelledError:
            pass  # the proxy ends; asyncio's server would log it
        finally:
            near.transport.abort()
            self._tasks.discard(task)

    async def _carry_both(self, reader: asyncio.StreamReader, near: asyncio.StreamWriter) -> None:
        if not self.is_open:
            near.transport.abort()
            return
        try:
            far_reader, far = await asyncio.open_connection("127.0.0.1", self.target_port)
        except OSError:
            near.transport.abort()
            return
        pipe = _Pipe(near, far)
        self.num_taken += 1
        self._pipes.add(pipe)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._carry(reader, far, self._count_up))
                group.create_task(self._carry(far_reader, near, self._count_down))
        finally:
            pipe.cut()
            self._pipes.discard(pipe)

    async def _carry(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        count: Callable[[int], None],
    ) -> None:
        """Reads at once and writes after the delay, so that data in flight overlaps."""
        loop = asyncio.get_running_loop()
        due: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=64)

        async def write() -> None:
            while True:
                at_s, data = await due.get()
                await asyncio.sleep(max(0.0, at_s - loop.time()))
                await self._flows.wait()
                if not data:
                    with contextlib.suppress(OSError):
                        writer.write_eof()
                    return
                writer.write(data)
                with contextlib.suppress(OSError):
                    await writer.drain()
                count(len(data))

        writing = asyncio.create_task(write())
        free_s = loop.time()
        try:
            data = b"-"
            while data:
                try:
                    data = await reader.read(4096)
                except OSError:
                    data = b""
                data = self._spoilt(data, "up" if count == self._count_up else "down")
                if self.bytes_per_s is not None:
                    free_s = max(free_s, loop.time()) + len(data) / self.bytes_per_s
                await due.put((max(free_s, loop.time()) + self.delay_s, data))
            await writing
        finally:
            writing.cancel()

    def _spoilt(self, data: bytes, direction: str) -> bytes:
        """The data with one bit changed in the payload of a frame, if there is one to spoil."""
        begin = data.find(_FRAME)
        while self.spoil == direction and begin >= 0:
            header_bytes, payload_bytes = _LENGTHS.unpack_from(data, begin + 4)
            place = begin + 4 + _LENGTHS.size + header_bytes + payload_bytes // 2
            if payload_bytes and place < len(data):
                self.spoil = None
                return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
            begin = data.find(_FRAME, begin + 4)
        return data

    def _count_up(self, num_bytes: int) -> None:
        self.up_bytes += num_bytes
        if self._cut_up is not None and self.up_bytes >= self._cut_up:
            self._cut_up = None
            self.cut()

    def _count_down(self, num_bytes: int) -> None:
        self.down_bytes += num_bytes
        if self._cut_down is not None and self.down_bytes >= self._cut_down:
            self._cut_down = None
            self.cut()
