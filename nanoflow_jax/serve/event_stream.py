"""Sends server-sent events; notices clients that leave."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

# Proxies close connections on which nothing moves; a comment is ignored by clients.
_KEEP_ALIVE_S = 15.0
_COMMENT = b": still here\n\n"


class EventStream(Response):
    """An answer in pieces."""

    media_type = "text/event-stream"

    def __init__(self, pieces: AsyncGenerator[bytes, None]) -> None:
        """Wraps pieces, whole events; they are closed when the client is gone."""
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._pieces = pieces
        self._wrote_at = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send_all(send))
        others = [
            asyncio.create_task(wait_until_gone(receive)),
            asyncio.create_task(self._keep_alive(send)),
        ]
        try:
            await asyncio.wait({sending, *others}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, *others):
                task.cancel()
            results = await asyncio.gather(sending, *others, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with contextlib.aclosing(self._pieces) as pieces:
            async for piece in pieces:
                await self._write(send, piece)
        await self._write(send, b"", more=False)

    async def _write(self, send: Send, body: bytes, *, more: bool = True) -> None:
        await send({"type": "http.response.body", "body": body, "more_body": more})
        self._wrote_at = time.monotonic()

    async def _keep_alive(self, send: Send) -> None:
        while True:
            await asyncio.sleep(_KEEP_ALIVE_S / 2)
            if time.monotonic() - self._wrote_at > _KEEP_ALIVE_S:
                await self._write(send, _COMMENT)


async def wait_until_gone(receive: Receive) -> None:
    """Returns when the client has left; the body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
