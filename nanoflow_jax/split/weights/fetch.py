"""Fetches the layers that a client runs, with config and tokenizer, from its gateway."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TextIO

import grpc.aio

from nanoflow_jax import meter
from nanoflow_jax.split import attempts, errors, messages, question, settings, transport
from nanoflow_jax.split.messages import Code
from nanoflow_jax.split.weights import store as store_lib

_LEAST_WAIT_S = 0.05


async def fetch(
    endpoint: transport.Endpoint,
    layers: Sequence[tuple[int, int]],
    folder: Path,
    *,
    knobs: settings.ClientSection,
    tell: Callable[[str], None],
    stream: TextIO,
) -> None:
    """Makes a folder that has what it takes to run some layers, or goes on with one.

    Whatever is in the folder afterwards was compared with its hash by this call.

    Args:
        endpoint: The gateway.
        layers: Ranges [start, stop).
        folder: New, empty, or that of an earlier fetch from the same model.
        knobs: Timeouts, attempts.
        tell: Shows lines about what goes on.
        stream: Where to show progress.

    Raises:
        SplitError: The gateway refuses, cannot be reached, or has another model than it had.
        ValueError: The folder cannot be used or written.
    """
    with store_lib.Store.opened(folder) as store:
        channel = transport.connect(endpoint, max_frame_bytes=knobs.frame_limits.frame_bytes)
        try:
            fetcher = _Fetcher(channel, endpoint.token, layers, store, knobs=knobs, tell=tell)
            await fetcher.run(stream)
        finally:
            await channel.close()


class _Fetcher:
    """One fetch, over as many streams as it takes."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        token: str,
        layers: Sequence[tuple[int, int]],
        store: store_lib.Store,
        *,
        knobs: settings.ClientSection,
        tell: Callable[[str], None],
    ) -> None:
        self._channel, self._token, self._store = channel, token, store
        self._layers = tuple(layers)
        self._knobs, self._tell = knobs, tell
        self._attempts = attempts.Attempts(knobs)
        self._blobs: tuple[messages.Blob, ...] = ()
        self._began_s = time.monotonic()
        self._num_fetched = self._done = 0
        self._has_waited = False

    async def run(self, stream: TextIO) -> None:
        while not self._blobs:
            await self._try(self._ask)
        self._store.begin(self._blobs)
        total = sum(blob.nbytes for blob in self._blobs)
        self._done = self._num_done()
        self._meter = meter.Meter(total, unit="B", stream=stream, first=self._done)
        try:
            for blob in self._blobs:
                await self._complete(blob)
        finally:
            self._meter.close()
        self._store.write_index(self._blobs)

    async def _complete(self, blob: messages.Blob) -> None:
        """Until it is here with its hash; what is damaged is fetched once more."""
        try:
            if await asyncio.to_thread(self._store.is_sound, blob):
                return
        except store_lib.DamagedError as error:
            self._say_damaged(error)
        for is_last in (False, True):
            with self._store.appending(blob):
                pass  # of no bytes, too, there is a file
            while self._store.num_done(blob) < blob.nbytes:
                await self._try(lambda: self._receive(blob))
            try:
                await asyncio.to_thread(self._store.finish, blob)
                return
            except store_lib.DamagedError as error:
                if is_last:
                    raise errors.SplitError(
                        Code.MODEL,
                        f"{error}, twice: the gateway's files changed since it started, or are "
                        "damaged; start it again",
                    ) from error
                self._say_damaged(error)

    def _say_damaged(self, error: store_lib.DamagedError) -> None:
        self._done = self._num_done()
        self._tell(f"{error}; it is fetched again")

    def _num_done(self) -> int:
        return sum(map(self._store.num_done, self._blobs))

    async def _try(self, attempt: Callable[[], Awaitable[None]]) -> None:
        """Once; afterwards waits if it failed and may be tried again.

        Raises:
            SplitError: It may not.
        """
        try:
            await attempt()
        except errors.RefusedError as refusal:
            if refusal.retry_after_s is None:
                raise
            if not self._has_waited:
                self._tell(f"waiting for a turn: {refusal.detail}")
                self._has_waited = True
            await asyncio.sleep(max(refusal.retry_after_s, _LEAST_WAIT_S))
        except errors.SplitError as error:
            if not error.retryable:
                raise
            note = f"{self._num_fetched} bytes fetched; run it again and it goes on"
            await self._attempts.failed(error, note=note)
            # The gateway that is there now may be another.
            if self._blobs:
                await self._try(self._ask)

    async def _ask(self) -> None:
        """What is to be fetched, which must be what it was."""
        asked = messages.AskBlobs(
            major=messages.PROTOCOL_MAJOR, minor=messages.PROTOCOL_MINOR, layers=self._layers
        )
        async with self._asking(asked) as stream:
            offer, _ = await question.hear(stream, self._knobs)
        if not isinstance(offer, messages.Blobs):
            raise _unexpected(offer)
        if not offer.blobs:
            raise errors.SplitError(Code.PROTOCOL, "the gateway offers nothing at all")
        if self._blobs and set(offer.blobs) != set(self._blobs):
            (first, *_) = sorted({one.name for one in {*offer.blobs} ^ {*self._blobs}})
            raise errors.SplitError(
                Code.MODEL,
                f"the gateway's model was changed while it was fetched: {first} is another; the "
                "two are not mixed: give another --weights_folder, or delete this one",
            )
        self._blobs = self._blobs or offer.blobs

    async def _receive(self, blob: messages.Blob) -> None:
        """More of it, until it is whole or the stream is lost."""
        with self._store.appending(blob) as file:
            offset = file.tell()
            want = messages.Want(sha256=blob.sha256, offset=offset)
            async with self._asking(want) as stream:
                while offset < blob.nbytes:
                    chunk, data = await question.hear(stream, self._knobs)
                    if not isinstance(chunk, messages.Chunk):
                        raise _unexpected(chunk)
                    end = offset + len(data)
                    if chunk.offset != offset or not offset < end <= blob.nbytes:
                        raise errors.SplitError(
                            Code.PROTOCOL,
                            f"bytes [{chunk.offset}, {chunk.offset + len(data)}) of {blob.name} "
                            f"came; those from {offset} to at most {blob.nbytes} are due",
                        )
                    file.write(data)
                    offset = end
                    self._count(len(data))

    def _count(self, num_bytes: int) -> None:
        self._attempts.succeeded()
        self._num_fetched += num_bytes
        self._done += num_bytes
        seconds = max(time.monotonic() - self._began_s, 1e-9)
        self._meter.update(self._done, f"{meter.bytes_text(int(self._num_fetched / seconds))}/s")

    def _asking(
        self, asked: messages.Message
    ) -> contextlib.AbstractAsyncContextManager[transport.ClientStream]:
        return question.asking(self._channel, transport.WEIGHTS, self._token, asked)


def _unexpected(message: messages.Message) -> errors.SplitError:
    return errors.SplitError(
        Code.PROTOCOL, f"{type(message).__name__} is nothing that a gateway says here"
    )
