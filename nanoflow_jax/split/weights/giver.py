"""The gateway's side: gives clients the parts of the model that it may give away."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence

from checkpoints import content, files, text_files
from checkpoints import folder as checkpoint_folder
from checkpoints.errors import CheckpointError
from nanoflow_jax.models import architecture
from nanoflow_jax.split import (
    errors,
    frames,
    handshake,
    identity,
    messages,
    parts,
    settings,
    transport,
)
from nanoflow_jax.split.messages import Code
from nanoflow_jax.split.weights import pace

_LOG = logging.getLogger(__name__)
# Small, so that rows of sessions need not wait long behind one on a slow link.
_CHUNK_BYTES = 256 << 10


class Giver:
    """What a gateway gives away of its model.

    Of each stream a window of `content.READ_BYTES` is in memory, never a whole part.

    Invariant: at most `max_fetches` streams give bytes.
    """

    def __init__(
        self,
        folder: checkpoint_folder.ModelFolder,
        config: architecture.ModelConfig,
        ours: messages.Identity,
        shared: Sequence[str],
        *,
        limits: settings.GatewaySection,
    ) -> None:
        """Reads the text files, and no weights.

        Args:
            folder: The model.
            config: What its config.json describes.
            ours: Its identity, with all parts.
            shared: What may be given away; see `parts.shared`.
            limits: What streams are granted.

        Raises:
            ValueError: `shared` names what this model does not have, or a file cannot be read.
        """
        self._folder, self._config, self._limits = folder, config, limits
        self._stamp = folder.stamp()
        self._shares = ", ".join(shared)
        self._model = ours.model
        names = parts.shared(shared, config.num_layers)
        hashes = {name: found for name, found in ours.parts if name in names}
        tensors = identity.part_tensors(config, hashes)
        self._parts = {hashes[name]: content.Part(folder, tensors[name]) for name in hashes}
        self._blobs = {
            name: messages.Blob(name=name, sha256=found, nbytes=self._parts[found].nbytes)
            for name, found in hashes.items()
        }
        self._texts: dict[str, bytes] = {}
        self._text_blobs = tuple(self._read_texts())
        self._num_giving = 0

    def _read_texts(self) -> list[messages.Blob]:
        found = []
        for name in text_files.NAMES:
            path = self._folder.text_file(name)
            if path is not None:
                text = files.read_bytes(path, advice="download it again")
                sha256 = content.sha256_of([text])
                self._texts[sha256] = text
                found.append(messages.Blob(name=name, sha256=sha256, nbytes=len(text)))
        return found

    def offer(self, asked: messages.AskBlobs) -> messages.Blobs:
        """What it takes to run some layers.

        Raises:
            RefusedError: There are no such layers, or not all of it may be given away.
        """
        num_layers = self._config.num_layers
        for start, stop in asked.layers:
            if not 0 <= start < stop <= num_layers:
                raise errors.RefusedError(
                    Code.LAYERS,
                    f"[{start}, {stop}) is no range of layers of a model with {num_layers}",
                )
        needed = identity.part_names(self._config, asked.layers)
        for name in needed:
            if name not in self._blobs:
                raise errors.RefusedError(
                    Code.REFUSED,
                    f"layers {_text(asked.layers)} need {name} of {self._model!r}, which this "
                    f"gateway does not give away; it gives {self._shares} (its --share_weights)",
                )
        blobs = (*self._text_blobs, *(self._blobs[name] for name in needed))
        return messages.Blobs(model=self._model, blobs=blobs)

    async def give(self, stream: transport.Stream, want: messages.Want, *, turn: pace.Pace) -> None:
        """Sends bytes, as fast as they are read at the other end and as `turn` lets them pass.

        Raises:
            RefusedError: There are no such bytes to be had, or none now.
            SplitError: The model's files are not what they were.
            StreamLostError: The other end is gone, or does not read.
        """
        part, text = self._parts.get(want.sha256), self._texts.get(want.sha256)
        if part is None and text is None:
            raise errors.RefusedError(
                Code.MODEL,
                f"nothing with hash {want.sha256:.12} is given away here: the gateway has another "
                "model than when it was asked, or shares less of it",
            )
        nbytes = part.nbytes if part is not None else len(text or b"")
        if want.offset > nbytes:
            raise errors.RefusedError(
                Code.LIMIT, f"{want.sha256:.12} has {nbytes} bytes; {want.offset} were asked for"
            )
        if self._num_giving >= self._limits.max_fetches:
            raise errors.RefusedError(
                Code.OVERLOADED,
                f"weights are given on {self._num_giving} streams; no more are begun",
                retry_after_s=self._limits.retry_after_s,
            )
        self._num_giving += 1
        try:
            async for offset, chunk in self._chunks(part, text, want.offset, nbytes):
                await turn.take(len(chunk))
                frame = messages.to_frame(messages.Chunk(offset=offset), chunk)
                async with asyncio.timeout(self._limits.write_timeout_s):
                    await stream.write(frame)
        except TimeoutError as error:
            raise transport.StreamLostError("a client does not read the weights") from error
        finally:
            self._num_giving -= 1

    async def _chunks(
        self, part: content.Part | None, text: bytes | None, offset: int, nbytes: int
    ) -> AsyncIterator[tuple[int, bytes]]:
        size = min(_CHUNK_BYTES, self._limits.max_payload_bytes)
        while offset < nbytes:
            stop = offset + content.READ_BYTES
            if part is not None:
                window = await asyncio.to_thread(self._read, part, offset, stop)
            else:
                window = (text or b"")[offset:stop]
            for begin in range(0, len(window), size):
                yield offset + begin, window[begin : begin + size]
            offset += len(window)

    def _read(self, part: content.Part, start: int, stop: int) -> bytes:
        try:
            if self._folder.stamp() == self._stamp:
                return part.read(start, stop)
            changed = f"{self._model!r} is not what it was when the gateway started"
        except CheckpointError as error:
            changed = str(error)
        _LOG.warning("weights are not given away any more: %s", changed)
        raise errors.SplitError(
            Code.MODEL,
            f"the files of the gateway's model changed or broke since it started ({changed}); "
            "it must be started again",
        )


async def answer(
    stream: transport.ServerStream,
    giver: Giver | None,
    *,
    check_key: Callable[[transport.ServerStream], None],
    turn: pace.Pace,
    limits: settings.GatewaySection,
) -> None:
    """Answers the one question of a stream.

    Args:
        stream: It.
        giver: What may be given away; None if nothing is.
        check_key: Raises RefusedError unless the client may be here.
        turn: When bytes may pass.
        limits: Of the gateway.
    """
    try:
        with contextlib.suppress(transport.StreamLostError):
            try:
                await _answer(stream, giver, check_key=check_key, turn=turn, limits=limits)
            except errors.RefusedError as error:
                await stream.write(messages.to_frame(error.reject()))
            except errors.SplitError as error:
                failure = messages.Err(code=error.code, detail=error.detail[:4096], retryable=False)
                await stream.write(messages.to_frame(failure))
    except TimeoutError:
        _LOG.info("a client that wanted weights did not say which")


async def _answer(
    stream: transport.ServerStream,
    giver: Giver | None,
    *,
    check_key: Callable[[transport.ServerStream], None],
    turn: pace.Pace,
    limits: settings.GatewaySection,
) -> None:
    async with asyncio.timeout(2 * limits.heartbeat_s):
        data = await stream.read()
    if data is None:
        return
    check_key(stream)
    try:
        message, _ = messages.from_frame(data, limits.frame_limits)
    except frames.FrameError as error:
        raise errors.RefusedError(Code.BAD_FRAME, str(error)) from error
    if isinstance(message, messages.AskBlobs):
        handshake.check_version(message)
    if giver is None:
        raise errors.RefusedError(
            Code.REFUSED, "this gateway gives no weights away; it needs --share_weights for that"
        )
    match message:
        case messages.AskBlobs():
            await stream.write(messages.to_frame(giver.offer(message)))
        case messages.Want():
            await giver.give(stream, message, turn=turn)
        case _:
            raise errors.RefusedError(
                Code.PROTOCOL, f"{type(message).__name__} is nothing that asks for weights"
            )


def _text(layers: Sequence[tuple[int, int]]) -> str:
    return ",".join(f"{start}:{stop}" for start, stop in layers)
