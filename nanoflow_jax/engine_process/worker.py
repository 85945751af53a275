"""The loop of the engine's process: messages in, steps, what they gave out."""

import contextlib
import dataclasses
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence

import jax
import msgspec

from nanoflow_jax import llm, start_up, wire
from nanoflow_jax import request as request_lib
from nanoflow_jax.batch import fingerprint
from nanoflow_jax.engine import build
from nanoflow_jax.engine_process import companion as companion_lib
from nanoflow_jax.engine_process import messages, preparing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What a process runs for its front.

    Attributes:
        make_engine: Builds the engine.
        beside: Begins what shares the engine with the front's requests, and ends it.
    """

    make_engine: llm.MakeEngine = build.build_engine
    beside: companion_lib.Beside = companion_lib.nobody


def run(sock: socket.socket, program: Program | None = None) -> int:
    """Serves the front at the other end of a socket until it is gone.

    Args:
        sock: Of the front.
        program: What to run; an engine that the front alone uses unless given.

    Returns:
        The exit code of the process.
    """
    program = program or Program()
    connection = Connection(sock)
    first = connection.take(wait=True)
    if not first or not isinstance(first[0], messages.Start):
        return 0
    with contextlib.ExitStack() as stack:
        try:
            model, ready = _start(first[0], connection.send, program.make_engine)
            stack.enter_context(model)
            beside = stack.enter_context(
                program.beside(model, first[0].config, lambda act: connection.put(Call(act)))
            )
        except (ValueError, OSError, MemoryError, jax.errors.JaxRuntimeError) as error:
            is_input = isinstance(error, ValueError)
            connection.send(messages.Failed(message=str(error) or repr(error), is_input=is_input))
            return 1
        connection.ends_with_front = False
        connection.send(msgspec.structs.replace(ready, sessions_at=beside.address))
        try:
            Worker(model, connection, beside=beside).run(first[1:])
        except (OSError, MemoryError, jax.errors.JaxRuntimeError) as error:
            connection.send(messages.Failed(message=str(error) or repr(error), is_input=False))
            return 1
    return 0


def _start(
    start: messages.Start,
    send: Callable[[messages.FromEngine], None],
    make_engine: llm.MakeEngine,
) -> tuple[llm.LLM, messages.Ready]:
    chosen: list[build.Settings] = []
    reports = start_up.reports(
        lambda text: send(messages.Said(text=text)), also_settings=chosen.append
    )
    model = llm.LLM.from_config(start.config, reports, make_engine=make_engine)
    settings = chosen[0]
    return model, messages.Ready(
        device=settings.device,
        dtype=settings.dtype,
        vocab_size=model.engine.limits.vocab_size,
        eos_ids=tuple(sorted(model.engine.limits.eos_ids)),
        max_context_len=settings.max_context_len,
        max_requests=settings.max_requests * settings.num_replicas,
        dense_batch=settings.dense_batch,
        num_pages=settings.num_pages * settings.num_replicas,
        page_size=settings.page_size,
        identity=fingerprint.of_model(start.config.model, model.source),
    )


@dataclasses.dataclass(frozen=True)
class Call:
    """Something that another thread of this process wants done between two steps."""

    act: Callable[[], None]


Message = messages.ToEngine | preparing.Prepared | Call


class Connection:
    """Messages to and from the front; a thread reads, so that the loop never waits for input.

    Attributes:
        is_closed: Whether the front is gone, as far as the loop has noticed.
        ends_with_front: Whether the process ends at once with the front. It does until it is
            ready: nobody takes messages while a model is loaded and compiled, for minutes perhaps.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._codec = wire.Codec(messages.ToEngine)
        self._inbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self.is_closed = False
        self.ends_with_front = True
        threading.Thread(target=self._read, name="inbox", daemon=True).start()

    def _read(self) -> None:
        while (data := wire.read_frame(self._sock)) is not None:
            self._inbox.put(self._codec.decode(data))
        if self.ends_with_front:
            os._exit(1)
        self._inbox.put(None)

    def put(self, message: preparing.Prepared | Call) -> None:
        """Adds a message of this process, from any thread."""
        self._inbox.put(message)

    def take(self, *, wait: bool) -> list[Message]:
        """Messages that have arrived; with `wait` at least one, unless the front is gone."""
        found: list[Message] = []
        while not self.is_closed and (not self._inbox.empty() or (wait and not found)):
            message = self._inbox.get()
            if message is None:
                self.is_closed = True
            else:
                found.append(message)
        return found

    def send(self, message: messages.FromEngine) -> None:
        """Sends a message; nothing if the front is gone."""
        try:
            self._sock.sendall(self._codec.frame(message))
        except ConnectionError:
            self.is_closed = True


@dataclasses.dataclass(eq=False, kw_only=True)
class _Served:
    """A request in the engine, as the loop needs to know it."""

    stream: bool
    sent_s: float
    started_s: float | None = None
    first_token_s: float | None = None


class Worker:
    """Feeds one model from one connection.

    Invariant: `served` holds the requests that the generator holds.
    """

    def __init__(
        self,
        model: llm.LLM,
        connection: Connection,
        *,
        beside: companion_lib.Companion | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = model.engine
        self._generator = model.generator
        self._connection = connection
        self._beside = beside or companion_lib.Nobody()
        self._clock = clock
        self._is_leaving = False
        self._served: dict[str, _Served] = {}
        self._preparer = preparing.Preparer(model.engine.grammars, connection.put)

    def run(self, first: Sequence[Message]) -> None:
        """Works until the front is gone, or says that this is to end.

        Args:
            first: Messages that arrived during the start.
        """
        inbox = first
        while not self._connection.is_closed:
            for message in inbox:
                self._handle(message)
            if self._is_leaving:
                return
            if self._engine.has_work:
                self._step()
            elif any(isinstance(message, Call) for message in inbox):
                self._say_load()
            inbox = self._connection.take(wait=not self._engine.has_work)

    def _handle(self, message: Message) -> None:
        match message:
            case messages.Submit():
                if not self._preparer.try_hold(message):
                    self._submit(message)
            case preparing.Prepared():
                self._take_prepared(message)
            case messages.Abort():
                self._preparer.release(message.request_id)
                self._served.pop(message.request_id, None)
                self._generator.abort(message.request_id)
                if not self._engine.has_work:
                    self._say_load()
            case Call():
                message.act()
            case messages.Drain():
                self._beside.drain()
            case messages.Leave():
                self._is_leaving = True
            case messages.StartTrace():
                self._trace(lambda: jax.profiler.start_trace(message.folder))
            case messages.StopTrace():
                self._trace(jax.profiler.stop_trace)
            case messages.Start():
                raise AssertionError("the engine was started twice")

    def _take_prepared(self, message: preparing.Prepared) -> None:
        if not self._preparer.release(message.submit.request_id):
            return  # aborted meanwhile
        if message.error is None:
            self._submit(message.submit)
            return
        self._connection.send(
            messages.Refused(
                request_id=message.submit.request_id, message=message.error, is_of_grammar=True
            )
        )

    def _submit(self, message: messages.Submit) -> None:
        try:
            self._generator.submit(
                message.request_id, message.prompt_ids, message.params, priority=message.priority
            )
        except ValueError as error:
            refused = messages.Refused(request_id=message.request_id, message=str(error))
            self._connection.send(refused)
            return
        self._served[message.request_id] = _Served(stream=message.stream, sent_s=message.sent_s)

    def _trace(self, act: Callable[[], None]) -> None:
        try:
            act()
        except (RuntimeError, OSError) as error:  # tracing already, not tracing, disk full
            self._connection.send(messages.Traced(error=str(error)))
        else:
            self._connection.send(messages.Traced())

    def _step(self) -> None:
        result = self._generator.step()
        now = self._clock()
        for delta in result.deltas:
            served = self._served[delta.request_id]
            if served.first_token_s is None:
                served.started_s = result.started_s[delta.request_id] - served.sent_s
                served.first_token_s = now - served.sent_s
        done = [self._served.pop(completion.request_id) for completion in result.completions]
        streams = {c.request_id for c, s in zip(result.completions, done, strict=True) if s.stream}
        streams |= {name for name, served in self._served.items() if served.stream}
        self._connection.send(
            messages.Stepped(
                scored=tuple(s for s in result.scored if s.request_id in streams),
                deltas=tuple(d for d in result.deltas if d.request_id in streams),
                completions=tuple(
                    _told(completion, served)
                    for completion, served in zip(result.completions, done, strict=True)
                ),
                times=tuple(
                    _times(completion, served, now)
                    for completion, served in zip(result.completions, done, strict=True)
                ),
                load=self._load(),
            )
        )

    def _say_load(self) -> None:
        self._connection.send(
            messages.Stepped(scored=(), deltas=(), completions=(), times=(), load=self._load())
        )

    def _load(self) -> messages.Load:
        engine = self._engine
        return messages.Load(
            running=engine.num_running,
            waiting=engine.num_waiting,
            pages_used=engine.num_pages_used,
            decode_tokens=engine.counters.decode_tokens,
            prefill_tokens=engine.counters.prompt_tokens,
            generated_tokens=engine.counters.generated_tokens,
            steps=engine.counters.steps,
            preemptions=engine.num_preemptions,
            late_compiles=engine.num_late_compiles,
            cpu_s=time.process_time(),
            failed_steps=engine.counters.failed_steps,
            sessions=self._beside.num_sessions,
        )


def _told(completion: request_lib.Completion, served: _Served) -> request_lib.Completion:
    """A completion without what the front knows already."""
    if served.stream:
        return dataclasses.replace(completion, prompt_ids=(), choices=(), prompt_logprobs=None)
    return dataclasses.replace(completion, prompt_ids=())


def _times(completion: request_lib.Completion, served: _Served, now: float) -> messages.Times:
    failed = (str(request_lib.FinishReason.ERROR),) if completion.error is not None else ()
    return messages.Times(
        started_s=served.started_s,
        first_token_s=served.first_token_s,
        end_s=now - served.sent_s,
        num_tokens=sum(len(choice.token_ids) for choice in completion.choices),
        reasons=failed or tuple(str(choice.finish_reason) for choice in completion.choices),
    )
