"""Runs the server: binds, starts the engine, serves, drains on a signal, and ends."""

import asyncio
import contextlib
import dataclasses
import errno
import logging
import os
import pathlib
import signal
import socket
import types
from collections.abc import Callable, Sequence

import uvicorn

from nanoflow_jax import config as config_lib
from nanoflow_jax import console
from nanoflow_jax.engine_process import client as client_lib
from nanoflow_jax.serve import app as app_lib
from nanoflow_jax.serve import (
    batch_routes,
    batch_runner,
    batches,
    data_dir,
    files,
    guarded_protocol,
    keys,
    metrics,
    open_files,
    page_routes,
)
from nanoflow_jax.serve import service as service_lib
from nanoflow_jax.tokenizer import words as words_lib

_LOG = logging.getLogger(__name__)
_BACKLOG = 2048
# Of each connection, in the kernel: left alone it grows to megabytes for a client that does not
# read, who would not be noticed either.
_SEND_BUFFER_BYTES = 256 << 10
_KEEP_ALIVE_S = 75
# After a drain, the time for error pieces to reach their clients.
_FAREWELL_S = 5
_POLL_S = 0.05


def serve(
    section: config_lib.ServerSection,
    engine: config_lib.EngineConfig,
    *,
    folder: pathlib.Path | None,
    model_name: str,
    say: Callable[[str], None],
    program: Sequence[str] = ("nanoflow_jax.engine_process",),
) -> int:
    """Serves until a signal ends it.

    Args:
        section: The server's knobs.
        engine: The engine's.
        folder: Of the model's tokenizer, if it has one.
        model_name: Under which it is served.
        say: Shows a line.
        program: The engine's process; see `EngineClient`.

    Returns:
        The exit code.

    Raises:
        ValueError: A knob, the model or the address cannot be used.
        RunError: The engine is gone for good.
    """
    api_keys = keys.ApiKeys.load(section.api_key_file)
    words = words_lib.Words.load(folder, tool_format=engine.model.tool_format)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(words))
        listener = stack.enter_context(contextlib.closing(bind(section)))
        place = state_folder(section.data_dir)
        jobs = _batches(section, stack.enter_context(data_dir.opened(place))) if place else None
        say(f"starting: {model_name}")
        if section.host not in ("127.0.0.1", "::1", "localhost") and not api_keys.are_needed:
            say(
                f"warning: --host={section.host} lets other machines in and there is no "
                "--api_key_file: everybody who can reach the port can use the server"
            )
        room = open_files.connection_room(section.max_connections)
        if room < section.max_connections:
            say(
                f"warning: --max_connections={section.max_connections} is more than this system "
                f"allows; there will be at most {room} (see ulimit -n)"
            )
            section = dataclasses.replace(section, max_connections=room)
        return asyncio.run(
            _Server(
                section, engine, words, model_name, listener, api_keys, jobs, say, program
            ).run()
        )


def bind(section: config_lib.ServerSection) -> socket.socket:
    """A socket that listens at the address of the knobs.

    Raises:
        ValueError: The address cannot be used.
    """
    family = socket.AF_INET6 if ":" in section.host else socket.AF_INET
    # By the protocol's name asyncio knows where to switch off Nagle's algorithm, which holds back
    # the first token until the client has acknowledged the head, up to 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
    try:
        listener.bind((section.host, section.port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ValueError(
            f"--host={section.host} --port={section.port} cannot be used: {error.strerror}; "
            f"{_advice(error)}"
        ) from error
    return listener


def _advice(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "give another --port, or end the program that has it"
    if error.errno == errno.EACCES:
        return "give a --port from 1024 up"
    return "give --host an address of this machine, such as 127.0.0.1, or 0.0.0.0 for all of them"


class _Uvicorn(uvicorn.Server):
    """Uvicorn whose signals go to the one who runs it."""

    def __init__(self, config: uvicorn.Config, on_signal: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_signal = on_signal

    def handle_exit(self, sig: int, frame: types.FrameType | None) -> None:
        """Passes a signal on; called between two instructions of anything."""
        self._on_signal()

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        """Handles signals in the event loop; none is raised again afterwards."""
        loop = asyncio.get_running_loop()
        wanted = (signal.SIGINT, signal.SIGTERM)
        for number in wanted:
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in wanted:
                loop.remove_signal_handler(number)


class _Server:
    """One run of the server."""

    def __init__(
        self,
        section: config_lib.ServerSection,
        engine: config_lib.EngineConfig,
        words: words_lib.Words,
        model_name: str,
        listener: socket.socket,
        api_keys: keys.ApiKeys,
        jobs: batches.BatchStore | None,
        say: Callable[[str], None],
        program: Sequence[str],
    ) -> None:
        self._section = section
        self._say = say
        self._listener = listener
        counted = metrics.Metrics()
        self._client = client_lib.EngineClient(
            engine,
            say=say,
            on_step=counted.take_step,
            on_abort=counted.count_abort,
            max_restarts=section.max_engine_restarts,
            stall_s=section.engine_stall_s,
            program=program,
        )
        counted.watch(self._client)
        self._service = service_lib.Service(
            section,
            model_name=model_name,
            words=words,
            client=self._client,
            metrics=counted,
        )
        self._jobs = jobs
        more = [page_routes.make_router()]
        if jobs is not None:
            more.append(batch_routes.make_router(jobs))
        app = app_lib.build_app(self._service, api_keys=api_keys, more=more)
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                app,
                http=guarded_protocol.guarded_protocol(
                    max_connections=section.max_connections,
                    read_timeout_s=section.read_timeout_s,
                    write_timeout_s=section.write_timeout_s,
                ),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=False,
                proxy_headers=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=_FAREWELL_S,
            ),
            self._on_signal,
        )
        self._num_signals = 0
        self._drained: asyncio.Task[None] | None = None
        self._batching: asyncio.Task[None]

    async def run(self) -> int:
        """Serves until a signal, or until the engine is gone.

        Raises:
            ValueError: The engine cannot be started with these knobs.
            RunError: It is gone for good.
        """
        engine = asyncio.create_task(self._client.run())
        serving = asyncio.create_task(self._uvicorn.serve(sockets=[self._listener]))
        announcing = asyncio.create_task(self._announce())
        self._batching = asyncio.create_task(self._run_batches())
        try:
            await asyncio.wait({engine, serving}, return_when=asyncio.FIRST_COMPLETED)
            self._uvicorn.should_exit = True
            await serving
        finally:
            for task in (announcing, self._batching):
                task.cancel()
            await asyncio.gather(announcing, self._batching, return_exceptions=True)
            engine.cancel()
            results = await asyncio.gather(engine, return_exceptions=True)
        if isinstance(results[0], client_lib.EngineRefusedError):
            raise ValueError(str(results[0])) from results[0]
        if isinstance(results[0], client_lib.EngineLostError):
            raise console.RunError(str(results[0])) from results[0]
        if isinstance(results[0], Exception):
            raise results[0]
        return 0

    async def _run_batches(self) -> None:
        """Goes on with batches, from the first time that the engine is ready."""
        if self._jobs is None:
            return
        ready = await self._client.wait_ready()
        runner = batch_runner.BatchRunner(
            self._jobs,
            service_lib.BatchEngine(self._service),
            self._service.words,
            dataclasses.replace(ready.identity, name=self._service.model_name),
            batch_runner.Settings(
                models=frozenset({self._service.model_name}), lookahead=2 * ready.max_requests
            ),
        )
        await runner.run()

    async def _announce(self) -> None:
        while self._service.status != "ready":
            await asyncio.sleep(_POLL_S)
        host, port = self._listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        self._say(f"ready: {self._service.model_name} at http://{shown}:{port}")
        ready = self._client.ready
        if ready is not None and ready.sessions_at:
            self._say(f"ready: split sessions at {ready.sessions_at}")

    def _on_signal(self) -> None:
        self._num_signals += 1
        if self._num_signals == 1:
            self._service.is_draining = True
            self._batching.cancel()
            self._client.drain()
            left = self._left()
            if left:
                self._say(
                    f"draining: {left} have {self._section.drain_seconds:g} s to finish; "
                    "a second signal stops at once"
                )
            else:
                self._say("stopping")
            self._drained = asyncio.get_running_loop().create_task(self._drain())
        else:
            self._say("stopping at once")
            self._client.drop_all("the server is stopping")
            self._uvicorn.should_exit = self._uvicorn.force_exit = True

    def _left(self) -> str:
        """What has not finished yet; empty if nothing."""
        # Rows of batches go on at the next start.
        counts = {
            "choices": self._service.num_choices,
            "split sessions": self._client.load.sessions,
        }
        return " and ".join(f"{count} {name}" for name, count in counts.items() if count)

    async def _drain(self) -> None:
        """Waits for requests and sessions in work; ends what is left at the end."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._section.drain_seconds):
                while self._left():
                    await asyncio.sleep(_POLL_S)
        has_sessions = self._client.load.sessions > 0
        self._client.drop_all("the server is stopping")
        if has_sessions:
            await self._client.leave(_FAREWELL_S)
        self._uvicorn.should_exit = True


def _batches(section: config_lib.ServerSection, place: pathlib.Path) -> batches.BatchStore:
    limits = files.Limits(max_file_bytes=section.max_file_bytes)
    store = files.FileStore(place / "files", limits)
    return batches.BatchStore(place / "batches", store)


def state_folder(knob: str) -> pathlib.Path | None:
    """Where uploaded files and batches are kept; None for nowhere."""
    if not knob:
        return None
    if knob != "auto":
        return pathlib.Path(knob)
    base = os.environ.get("XDG_STATE_HOME") or pathlib.Path.home() / ".local" / "state"
    return pathlib.Path(base) / "nanoflow_jax"
