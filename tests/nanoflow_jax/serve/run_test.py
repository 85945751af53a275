import asyncio
import socket

from nanoflow_jax import config
from nanoflow_jax.serve import run


def test_a_connection_sends_small_pieces_at_once():
    async def accepted(listener):
        found = asyncio.get_running_loop().create_future()

        async def note(reader, writer):
            sock = writer.get_extra_info("socket")
            found.set_result(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()
            await writer.wait_closed()

        async with await asyncio.start_server(note, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            nodelay = await found
            writer.close()
            await writer.wait_closed()
        return nodelay

    assert asyncio.run(accepted(run.bind(config.ServerSection(port=0))))
