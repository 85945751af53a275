"""An engine's process that serves its front and, at a gateway, split sessions, in the same steps.

Only the front of `python -m nanoflow_jax.split serve --http_port=...` starts it:
`python -m nanoflow_jax.split.engine_process FD GATEWAY`.
"""

import asyncio
import concurrent.futures
import contextlib
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

import msgspec

from nanoflow_jax import config as config_lib
from nanoflow_jax import llm
from nanoflow_jax.engine import build, interface, model_source
from nanoflow_jax.engine_process import companion, worker
from nanoflow_jax.parallel import peers
from nanoflow_jax.serve import keys as keys_lib
from nanoflow_jax.serve import log
from nanoflow_jax.split import (
    command_flags,
    engine_thread,
    identity,
    settings,
    shared_engine,
    transport,
)
from nanoflow_jax.split import engine as engine_lib
from nanoflow_jax.split import gateway as gateway_lib
from nanoflow_jax.split.weights import giver

# While it waits, the engine says that it is well, so that the front does not take it for stuck:
# requests may wait for pages of sessions whose clients think.
_PULSE_S = 5.0


class GatewayFlags(msgspec.Struct, frozen=True, kw_only=True):
    """What a gateway is made of, beside its engine; the process's second argument.

    Attributes:
        endpoint: Where it listens.
        grid: Borders at which sessions may enter and leave.
        limits: What sessions are granted.
        api_key_file: Keys that clients need; empty for none.
        share_weights: What clients may fetch of the model; see `parts.shared`.
    """

    endpoint: transport.Endpoint
    grid: tuple[int, ...]
    limits: settings.GatewaySection
    api_key_file: str
    share_weights: tuple[str, ...] = ()

    def encoded(self) -> str:
        """As an argument; it holds no secret."""
        return msgspec.json.encode(self).decode()

    def gateway(
        self,
        config: config_lib.EngineConfig,
        source: model_source.ModelSource,
        engine: engine_lib.SplitEngine,
        *,
        host: engine_thread.Host | None = None,
    ) -> gateway_lib.Gateway:
        """The gateway in front of an engine that was built of this model; see `Gateway`."""
        ours = identity.of(
            config.model, source, engine.held.dtype, progress=command_flags.hash_meter()
        )
        weights = None
        if self.share_weights and source.folder is not None:
            weights = giver.Giver(
                source.folder, source.config, ours, self.share_weights, limits=self.limits
            )
        return gateway_lib.Gateway(
            engine,
            ours,
            limits=self.limits,
            keys=keys_lib.ApiKeys.load(self.api_key_file),
            borders=self.grid,
            host=host,
            weights=weights,
        )


class _Host:
    """The engine's loop, as the gateway's pieces see it; fulfils `engine_thread.Host`."""

    def __init__(self, engine: shared_engine.SharedEngine, post: companion.Post) -> None:
        self._engine = engine
        self._post = post

    def post(self, call: Callable[[], None]) -> None:
        self._post(call)

    def listen(self, tell: shared_engine.Tell) -> None:
        self._engine.listen(tell)


class GatewayThread:
    """A gateway on an event loop in a thread of its own; fulfils `companion.Companion`."""

    def __init__(
        self, gateway: gateway_lib.Gateway, endpoint: transport.Endpoint, post: companion.Post
    ) -> None:
        self._gateway = gateway
        self._endpoint = endpoint
        self._post = post
        self._loop: concurrent.futures.Future[asyncio.AbstractEventLoop] = (
            concurrent.futures.Future()
        )
        self._stop = asyncio.Event()

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"{self._endpoint.host}:{self._gateway.port}"

    @property
    def num_sessions(self) -> int:
        """Open ones."""
        return self._gateway.num_sessions

    def drain(self) -> None:
        """Opens no more sessions."""
        self._gateway.drain()

    @contextlib.contextmanager
    def running(self) -> Iterator["GatewayThread"]:
        """Serves until left; then sessions are told, and end.

        Raises:
            ValueError: TLS files cannot be read, or the port cannot be had.
        """
        thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="gateway")
        thread.start()
        try:
            loop = self._loop.result()
            try:
                yield self
            finally:
                loop.call_soon_threadsafe(self._stop.set)
        finally:
            thread.join()

    async def _serve(self) -> None:
        try:
            async with self._gateway.serving(self._endpoint):
                self._loop.set_result(asyncio.get_running_loop())
                while not self._stop.is_set():
                    self._post(lambda: None)
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(_PULSE_S):
                            await self._stop.wait()
        except BaseException as error:
            if self._loop.done():
                raise
            self._loop.set_exception(error)


def program(flags: GatewayFlags) -> worker.Program:
    """An engine in segments, and a gateway beside its front."""

    def make_engine(
        config: config_lib.EngineConfig,
        source: model_source.ModelSource,
        reports: build.Reports | None,
        group: peers.Group | None,
    ) -> interface.TokenEngine:
        assert group is None, "a server's engine has one process"
        return shared_engine.SharedEngine(
            engine_lib.build_split_engine(config, source, grid=flags.grid, reports=reports)
        )

    @contextlib.contextmanager
    def beside(
        model: llm.LLM, config: config_lib.EngineConfig, post: companion.Post
    ) -> Iterator[companion.Companion]:
        engine = model.engine
        assert isinstance(engine, shared_engine.SharedEngine)
        host = _Host(engine, post)
        made = flags.gateway(config, model.source, engine.pieces, host=host)
        with GatewayThread(made, flags.endpoint, post).running() as thread:
            yield thread

    return worker.Program(make_engine=make_engine, beside=beside)


def main() -> int:
    """Runs the engine on the socket whose descriptor is the first argument."""
    # Ctrl-C goes to all processes of a terminal; the front decides when the engine ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    log.to_stderr(access=False)
    flags = msgspec.json.decode(sys.argv[2], type=GatewayFlags)
    return worker.run(socket.socket(fileno=int(sys.argv[1])), program(flags))


if __name__ == "__main__":
    sys.exit(main())
