"""A TCP relay that delays what it carries: a link with a round trip, on one machine."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

_PIECE_BYTES = 1 << 16


@contextlib.asynccontextmanager
async def delayed(target_port: int, *, one_way_s: float) -> AsyncIterator[int]:
    """Relays connections to a port of this machine; the port where it listens.

    Args:
        target_port: Where connections go.
        one_way_s: What each piece of data waits, in either direction; pieces in flight overlap.
    """
    tasks: set[asyncio.Task[None]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", target_port)
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            task = asyncio.create_task(_carry(source, sink, one_way_s))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _carry(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, one_way_s: float
) -> None:
    """Reads at once and writes after the delay; ends with the connection."""
    loop = asyncio.get_running_loop()
    due: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    async def read() -> None:
        data = b"-"
        while data:
            try:
                data = await reader.read(_PIECE_BYTES)
            except OSError:
                data = b""
            due.put_nowait((loop.time() + one_way_s, data))

    reading = asyncio.create_task(read())
    try:
        while (item := await due.get())[1]:
            await asyncio.sleep(max(0.0, item[0] - loop.time()))
            writer.write(item[1])
            await writer.drain()
    except OSError:
        pass  # one end is gone, which the other one learns as this ends
    finally:
        reading.cancel()
        writer.transport.abort()
