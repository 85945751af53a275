"""Streams of frames over gRPC: raw bytes both ways, one stream for each session."""

import asyncio
import contextlib
import dataclasses
import ipaddress
import pathlib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, Protocol

import grpc
import grpc.aio

_SERVICE = "nanoflow.split"
SESSION = "Session"
PROBE = "Probe"
TRIAL = "Trial"
WEIGHTS = "Weights"
_TOKEN_KEY = "authorization"


class StreamLostError(Exception):
    """The other end is gone, or the way to it."""


class Stream(Protocol):
    """One stream of frames, as both ends see it."""

    async def read(self) -> bytes | None:
        """The next frame; None after the last.

        Raises:
            StreamLostError: The stream broke.
        """

    async def write(self, frame: bytes) -> None:
        """Sends a frame; returns when there is room for another.

        Raises:
            StreamLostError: The stream broke.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class TlsFiles:
    """Keys and certificates of one end, as PEM files.

    Attributes:
        certificate: This end's chain; a client has one only for mutual TLS.
        key: This end's private key.
        authority: Signed the other end's. A server that has one takes no client without a
            certificate of it; a client without one goes by the system's.
    """

    certificate: str = ""
    key: str = ""
    authority: str = ""

    def read(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """Certificate, key and authority; None for what is not given.

        Raises:
            ValueError: A file cannot be read, or a certificate is without its key.
        """
        if bool(self.certificate) != bool(self.key):
            raise ValueError("TLS: a certificate needs its key, and a key its certificate")
        return _pem(self.certificate), _pem(self.key), _pem(self.authority)


def _pem(path: str) -> bytes | None:
    if not path:
        return None
    try:
        return pathlib.Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"TLS: {path} cannot be read: {error}") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where a gateway is, and how to get in.

    Attributes:
        host: Name or address.
        port: Its port; to listen on, 0 is any free one.
        token: Shown as `Authorization: Bearer TOKEN`; empty for none.
        tls: Without, everything travels in the open.
        allow_plaintext: Whether that is taken even where others can listen.
    """

    host: str
    port: int
    token: str = dataclasses.field(default="", repr=False)
    tls: TlsFiles | None = None
    allow_plaintext: bool = False

    def __post_init__(self) -> None:
        if self.tls is None and not self.allow_plaintext and not _is_loopback(self.host):
            raise ValueError(
                f"{self.host} is not this machine: hidden states and tokens would travel in the "
                "open; give TLS files, or allow plaintext"
            )

    @property
    def address(self) -> str:
        """As gRPC writes it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def connect(endpoint: Endpoint, *, max_frame_bytes: int) -> grpc.aio.Channel:
    """A channel to a gateway; streams of many sessions share it.

    Raises:
        ValueError: TLS files cannot be read.
    """
    options = _options(max_frame_bytes)
    if endpoint.tls is None:
        return grpc.aio.insecure_channel(endpoint.address, options=options)
    certificate, key, authority = endpoint.tls.read()
    credentials = grpc.ssl_channel_credentials(authority, key, certificate)
    return grpc.aio.secure_channel(endpoint.address, credentials, options=options)


def open_stream(channel: grpc.aio.Channel, method: str, token: str) -> "ClientStream":
    """Begins a stream."""
    metadata = ((_TOKEN_KEY, f"Bearer {token}"),) if token else ()
    return ClientStream(channel.stream_stream(f"/{_SERVICE}/{method}")(metadata=metadata))


class ClientStream:
    """A stream as the client sees it."""

    def __init__(self, call: Any) -> None:
        self._call = call

    async def read(self) -> bytes | None:
        """See `Stream`."""
        with _losses():
            frame = await self._call.read()
        return None if frame is grpc.aio.EOF else frame

    async def write(self, frame: bytes) -> None:
        """See `Stream`."""
        with _losses():
            await self._call.write(frame)

    async def finish(self) -> None:
        """Says that no frame follows."""
        with _losses():
            await self._call.done_writing()

    def cancel(self) -> None:
        """Ends the stream at once; a task that reads or writes must be cancelled as well."""
        self._call.cancel()


class ServerStream:
    """A stream as the gateway sees it.

    Attributes:
        authorization: As the client sent it, if it did.
    """

    def __init__(self, context: grpc.aio.ServicerContext) -> None:
        self._context = context
        metadata = dict(context.invocation_metadata() or ())
        self.authorization: str | None = metadata.get(_TOKEN_KEY)

    async def read(self) -> bytes | None:
        """See `Stream`."""
        with _losses():
            frame = await self._context.read()
        return None if frame is grpc.aio.EOF else frame

    async def write(self, frame: bytes) -> None:
        """See `Stream`."""
        with _losses():
            await self._context.write(frame)


@contextlib.contextmanager
def _losses() -> Iterator[None]:
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise StreamLostError(f"{error.code().name.lower()}: {error.details()}") from error
    except (grpc.aio.BaseError, asyncio.InvalidStateError) as error:
        raise StreamLostError(f"the stream is over: {error}") from error


Handler = Callable[[ServerStream], Awaitable[None]]


async def listen(
    endpoint: Endpoint, handlers: Mapping[str, Handler], *, max_frame_bytes: int
) -> tuple[grpc.aio.Server, int]:
    """Starts a server; its port.

    Args:
        endpoint: Where to listen.
        handlers: By method; a stream ends when its handler returns.
        max_frame_bytes: Larger ones end their stream before they are read.

    Raises:
        ValueError: TLS files cannot be read, or the port cannot be had.
    """
    server = grpc.aio.server(options=_options(max_frame_bytes))
    methods = {
        name: grpc.stream_stream_rpc_method_handler(_servicer(handler))
        for name, handler in handlers.items()
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, methods),))
    try:
        port = _bind(server, endpoint)
    except RuntimeError as error:
        raise ValueError(f"{endpoint.address} cannot be listened on: {error}") from error
    await server.start()
    return server, port


def _bind(server: grpc.aio.Server, endpoint: Endpoint) -> int:
    if endpoint.tls is None:
        return int(server.add_insecure_port(endpoint.address))
    certificate, key, authority = endpoint.tls.read()
    if certificate is None or key is None:
        raise ValueError("TLS: a gateway needs a certificate and its key")
    credentials = grpc.ssl_server_credentials(
        [(key, certificate)], authority, require_client_auth=authority is not None
    )
    return int(server.add_secure_port(endpoint.address, credentials))


def _servicer(handler: Handler) -> Callable[[Any, grpc.aio.ServicerContext], Awaitable[None]]:
    async def serve(_requests: Any, context: grpc.aio.ServicerContext) -> None:
        await handler(ServerStream(context))

    return serve


def _options(max_frame_bytes: int) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", max_frame_bytes),
        ("grpc.max_send_message_length", max_frame_bytes),
        # A second gateway on the same port would be given some of the streams.
        ("grpc.so_reuseport", 0),
        # Channels of one process to one gateway keep their connections apart.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.initial_reconnect_backoff_ms", 100),
        # How long an attempt to connect may take, handshakes included: many round trips.
        ("grpc.min_reconnect_backoff_ms", 10_000),
        # Sessions back off by themselves.
        ("grpc.max_reconnect_backoff_ms", 200),
        ("grpc.enable_http_proxy", 0),
    ]
