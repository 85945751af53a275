"""The front's end: starts the engine's process, hands it requests, and outlives its end."""

import asyncio
import collections
import contextlib
import enum
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from nanoflow_jax import config as config_lib
from nanoflow_jax import request as request_lib
from nanoflow_jax import wire
from nanoflow_jax.engine_process import messages, tickets

_LOG = logging.getLogger(__name__)
_BUFFER_BYTES = 4 << 20
_RESTART_WINDOW_S = 600.0
_TICK_S = 1.0


class State(enum.StrEnum):
    """Whether requests can be served."""

    STARTING = "starting"
    READY = "ready"
    STOPPED = "stopped"


class EngineLostError(Exception):
    """The engine ended and is not started again."""


class EngineRefusedError(EngineLostError):
    """The engine cannot be started with these knobs."""


class EngineClient:
    """One engine in a process of its own.

    Invariant: while `state` is READY, `tickets` holds each request that the engine holds.

    Attributes:
        config: The engine's knobs.
    """

    def __init__(
        self,
        config: config_lib.EngineConfig,
        *,
        say: Callable[[str], None],
        on_step: Callable[[messages.Stepped], None] = lambda stepped: None,
        on_abort: Callable[[], None] = lambda: None,
        max_restarts: int = 3,
        stall_s: float = 300.0,
        program: Sequence[str] = ("nanoflow_jax.engine_process",),
    ) -> None:
        """Makes a client; `run` starts the engine.

        Args:
            config: The engine's knobs.
            say: Shows a line of the start to people.
            on_step: Called with what each step gave.
            on_abort: Called for each request that is taken back before its end.
            max_restarts: In ten minutes; after one more end of the engine, `run` raises.
            stall_s: An engine that has requests and says nothing for so long is ended.
            program: Module that is the engine's process, and what it is told after the descriptor
                of its socket.
        """
        self.config = config
        self._say = say
        self._on_step = on_step
        self._on_abort = on_abort
        self._max_restarts = max_restarts
        self._stall_s = stall_s
        self._program = tuple(program)
        self._is_leaving = False
        self._codec = wire.Codec(messages.FromEngine)
        self._tickets: dict[str, tickets.Ticket] = {}
        self._num_submitted = 0
        self._writer: asyncio.StreamWriter | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._heard_at = time.monotonic()
        self._restarts: collections.deque[float] = collections.deque()
        self._failure: messages.Failed | None = None
        self._traces: collections.deque[asyncio.Future[str | None]] = collections.deque()
        self.state = State.STARTING
        self.ready: messages.Ready | None = None
        self.load = messages.Load()
        self.num_starts = 0
        self._is_ready = asyncio.Event()

    @property
    def pid(self) -> int | None:
        """The engine's process, if there is one."""
        return self._process.pid if self._process is not None else None

    async def wait_ready(self) -> messages.Ready:
        """Waits until the engine takes requests; what it said of itself."""
        await self._is_ready.wait()
        assert self.ready is not None
        return self.ready

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: request_lib.SamplingParams,
        *,
        priority: int = 0,
        stream: bool = False,
    ) -> tickets.Ticket:
        """Hands a request to the engine.

        Args:
            prompt_ids: Token ids.
            params: Its seed is set.
            priority: Lower runs first.
            stream: Whether the ticket gets each token as it comes.

        Raises:
            EngineStoppedError: There is no engine at the moment.
        """
        if self.state is not State.READY:
            raise tickets.EngineStoppedError("the engine is not running at the moment; try again")
        name = f"{self._num_submitted:x}"
        self._num_submitted += 1
        ticket = tickets.Ticket(name, prompt_ids)
        self._send(
            messages.Submit(
                request_id=name,
                prompt_ids=ticket.prompt_ids,
                params=params,
                priority=priority,
                stream=stream,
                sent_s=time.monotonic(),
            )
        )
        self._tickets[name] = ticket
        return ticket

    def abort(self, ticket: tickets.Ticket) -> None:
        """Takes a request out of the engine, if it is still there; frees its pages."""
        if self._tickets.pop(ticket.request_id, None) is not None:
            self._send(messages.Abort(request_id=ticket.request_id))
            self._on_abort()

    def drop_all(self, reason: str) -> None:
        """Ends every request, telling those who wait for it why."""
        if self.state is State.READY:
            for name in self._tickets:
                self._send(messages.Abort(request_id=name))
        self._drop_tickets(reason)

    def drain(self) -> None:
        """Lets no new sessions in."""
        if self.state is State.READY:
            self._send(messages.Drain())

    async def leave(self, within_s: float) -> None:
        """Has the engine's process tell its sessions and end; `run` returns then.

        Args:
            within_s: How long this may take. Afterwards the process is there still.
        """
        self._is_leaving = True
        process = self._process
        if self.state is State.READY and process is not None:
            self._send(messages.Leave())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(within_s):
                    await process.wait()

    async def start_trace(self, folder: str) -> None:
        """Begins to record what the device does.

        Raises:
            ValueError: It could not begin.
        """
        await self._trace(messages.StartTrace(folder=folder))

    async def stop_trace(self) -> None:
        """Writes what was recorded.

        Raises:
            ValueError: Nothing was being recorded, or it could not be written.
        """
        await self._trace(messages.StopTrace())

    async def _trace(self, message: messages.StartTrace | messages.StopTrace) -> None:
        if self.state is not State.READY:
            raise ValueError("the engine is not running at the moment")
        told: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._traces.append(told)
        self._send(message)
        error = await told
        if error is not None:
            raise ValueError(error)

    def _send(self, message: messages.ToEngine) -> None:
        assert self._writer is not None
        self._writer.write(self._codec.frame(message))

    async def run(self) -> None:
        """Keeps an engine running until it is cancelled.

        Raises:
            EngineRefusedError: The knobs or the model are wrong.
            EngineLostError: The engine cannot start, or ended too often.
        """
        try:
            while True:
                await self._run_once()
                if self._is_leaving:
                    return
                self._check_restart()
        finally:
            self.state = State.STOPPED
            self._drop_tickets("the server is stopping")

    def _check_restart(self) -> None:
        reason = self._failure.message if self._failure is not None else "its process ended"
        if self._failure is not None and self._failure.is_input:
            raise EngineRefusedError(reason)
        now = time.monotonic()
        self._restarts.append(now)
        while self._restarts[0] < now - _RESTART_WINDOW_S:
            self._restarts.popleft()
        if self.ready is None or len(self._restarts) > self._max_restarts:
            raise EngineLostError(f"the engine ended and is not started again: {reason}")
        _LOG.error("the engine ended (%s); it is started again", reason)

    async def _run_once(self) -> None:
        """Starts the engine and reads what it says until it is gone."""
        ours, its = socket.socketpair()
        with ours, its:
            for end in (ours, its):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
            self._failure = None
            self.state = State.STARTING
            self.num_starts += 1
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                self._program[0],
                str(its.fileno()),
                *self._program[1:],
                pass_fds=[its.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,
            )
            its.close()
            reader, self._writer = await asyncio.open_unix_connection(
                sock=ours, limit=_BUFFER_BYTES
            )
            watch = asyncio.create_task(self._watch())
            try:
                self._send(messages.Start(config=self.config))
                await self._read(reader)
            finally:
                watch.cancel()
                self._is_ready.clear()
                if self.state is State.READY:
                    self.state = State.STARTING
                self._drop_tickets("the engine stopped while it worked on this; try again")
                self._writer.close()
                await self._end_process()

    async def _end_process(self) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        code = await self._process.wait()
        if self._failure is None and self.state is not State.STOPPED and code:
            ending = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            message = f"its process ended with {ending}"
            self._failure = messages.Failed(message=message, is_input=False)
        self._process = None

    def _drop_tickets(self, reason: str) -> None:
        left, self._tickets = self._tickets, {}
        for ticket in left.values():
            ticket.put(tickets.EngineStoppedError(reason))
        while self._traces:
            told = self._traces.popleft()
            if not told.done():
                told.set_result(reason)
        self.load = messages.Load()

    async def _watch(self) -> None:
        """Ends an engine that has work and is silent."""
        while True:
            await asyncio.sleep(_TICK_S)
            if not self._tickets:
                self._heard_at = time.monotonic()
            if time.monotonic() - self._heard_at > self._stall_s and self._process is not None:
                _LOG.error("the engine said nothing for %g s; it is ended", self._stall_s)
                message = f"it said nothing for {self._stall_s:g} s while it had requests"
                self._failure = messages.Failed(message=message, is_input=False)
                self._process.kill()
                return

    async def _read(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                header = await reader.readexactly(wire.HEADER_BYTES)
                data = await reader.readexactly(wire.body_bytes(header))
                self._heard_at = time.monotonic()
                self._take(self._codec.decode(data))

    def _take(self, message: messages.FromEngine) -> None:
        match message:
            case messages.Stepped():
                self._take_step(message)
            case messages.Refused():
                ticket = self._tickets.pop(message.request_id, None)
                if ticket is not None:
                    kind = tickets.GrammarRefusedError if message.is_of_grammar else ValueError
                    ticket.put(kind(message.message))
            case messages.Said():
                self._say(message.text)
            case messages.Ready():
                self.ready = message
                self.state = State.READY
                self._is_ready.set()
            case messages.Traced():
                told = self._traces.popleft() if self._traces else None  # dropped meanwhile
                if told is not None and not told.done():
                    told.set_result(message.error)
            case messages.Failed():
                self._failure = message

    def _take_step(self, stepped: messages.Stepped) -> None:
        self.load = stepped.load
        for scored in stepped.scored:
            self._put(scored)
        for delta in stepped.deltas:
            self._put(delta)
        for completion, times in zip(stepped.completions, stepped.times, strict=True):
            ticket = self._tickets.pop(completion.request_id, None)
            if ticket is not None:
                ticket.times = times
                ticket.put(completion)
        self._on_step(stepped)

    def _put(self, event: request_lib.ScoredPrompt | request_lib.Delta) -> None:
        ticket = self._tickets.get(event.request_id)
        if ticket is not None:
            ticket.put(event)

    @contextlib.contextmanager
    def aborting(self, held: Sequence[tickets.Ticket]) -> Iterator[None]:
        """On the way out, takes what is left of these requests out of the engine."""
        try:
            yield
        finally:
            for ticket in held:
                self.abort(ticket)
