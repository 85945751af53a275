"""Processes that share a model: how they find each other, talk, and end together.

Process 0 leads. It listens at an address that all of them were given, and the others connect to it
and to nobody else:

    process 1  <---->  process 0  <---->  process 2

A program that runs on the devices of all of them waits for ever once one of them is gone. So each
process watches its connections from threads that need nothing of its main thread: when one ends
without a farewell, or nothing has come over it for so long that the other machine must be gone,
the process says so and ends.
"""

import contextlib
import dataclasses
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import msgspec

from nanoflow_jax import console, wire
from nanoflow_jax.config import ProcessesSection

LEAD = 0
_HELLO_S = 10.0
_RETRY_S = 0.2
# For the others to read why this process ends, and for a process to learn that another has ended.
_GRACE_S = 3.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """How long processes wait for each other, in seconds.

    Attributes:
        join_s: For all to have come.
        beat_s: Between signs of life.
        silence_s: Without a sign of life after which a process counts as gone.
    """

    join_s: float = 300.0
    beat_s: float = 2.0
    silence_s: float = 30.0


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The first message to process 0: who comes, and what must be the same for all."""

    process_id: int
    num_processes: int
    about: dict[str, str]


class Welcome(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """All are there; `port` is that of jax's own coordinator, on the machine of process 0."""

    port: int


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The process that said hello cannot take part."""

    message: str


class Beat(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A sign of life."""


class Said(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What is meant for the other's main thread."""

    body: bytes


class Farewell(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The sender needs nothing more: it is done, or ends because of an error."""

    error: str | None = None


Message = Hello | Welcome | Refused | Beat | Said | Farewell
_CODEC = wire.Codec(Message)


def leave(message: str) -> None:
    """Ends this process at once, whatever its other threads are in the middle of."""
    # Not sys.stderr: a thread that waits for a device might hold its lock.
    os.write(2, f"error: {message}\n".encode())
    os._exit(console.FAILED)


class Peer:
    """The connection to another process.

    Invariant: what came in and was not taken yet is in the queue, in order.
    """

    def __init__(
        self, process_id: int, sock: socket.socket, on_lost: Callable[["Peer", str], None]
    ) -> None:
        self.process_id = process_id
        self.is_gone = threading.Event()
        self._sock = sock
        self._on_lost = on_lost
        self._sending = threading.Lock()
        self._inbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)

    def start(self) -> None:
        """Begins to watch."""
        self._reader.start()

    def send(self, message: Message) -> None:
        """Hands a message to the system."""
        try:
            with self._sending:
                self._sock.sendall(_CODEC.frame(message))
        except OSError as error:
            if not self.is_gone.is_set():
                self._on_lost(self, f"process {self.process_id} has ended ({error.strerror})")

    def take(self) -> bytes | None:
        """Waits for the next thing said; None after the farewell."""
        return self._inbox.get()

    def _read(self) -> None:
        trouble = self._take_all()
        self.is_gone.set()
        if trouble is not None:
            self._on_lost(self, trouble)
        self._inbox.put(None)

    def _take_all(self) -> str | None:
        """Takes what comes until the farewell; what went wrong, if anything."""
        name = f"process {self.process_id}"
        try:
            while (data := wire.read_frame(self._sock)) is not None:
                message = _CODEC.decode(data)
                if isinstance(message, Said):
                    self._inbox.put(message.body)
                elif isinstance(message, Farewell):
                    return message.error
        except TimeoutError:
            return f"nothing was heard of {name} for {self._sock.gettimeout():g} s"
        except (OSError, msgspec.MsgspecError) as error:
            return f"the connection to {name} broke ({error})"
        return f"{name} has ended"

    def hang_up(self) -> None:
        """Closes the connection."""
        # Its reader is asleep in the system and would go on holding the connection.
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


class Group:
    """One process and those it is connected to: process 0 to all others, each of them to 0.

    Attributes:
        process_id: Of this one.
        num_processes: Of all.
        port: Where process 0 is to start jax's own coordinator.
    """

    def __init__(
        self,
        section: ProcessesSection,
        sockets: Mapping[int, socket.socket],
        *,
        port: int,
        timing: Timing,
        leave: Callable[[str], None],
    ) -> None:
        self.process_id, self.num_processes = section.process_id, section.num_processes
        self.port = port
        self._leave, self._timing = leave, timing
        self._is_losing = threading.Lock()
        self._lost, self._left = threading.Event(), threading.Event()
        self._ends = threading.Event()
        for sock in sockets.values():
            sock.settimeout(timing.silence_s)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._peers = [Peer(i, sockets[i], self._on_lost) for i in sorted(sockets)]
        for peer in self._peers:
            peer.start()
        threading.Thread(target=self._beat, daemon=True).start()

    @property
    def is_lead(self) -> bool:
        """Whether this is the process that decides."""
        return self.process_id == LEAD

    def say(self, body: bytes) -> None:
        """Says something to everybody that this process is connected to."""
        for peer in self._peers:
            peer.send(Said(body=body))

    def hear(self) -> bytes | None:
        """Waits, in any process but 0, for what process 0 says next; None after its farewell."""
        (lead,) = self._peers
        return lead.take()

    def least(self, value: int) -> int:
        """The least of the values with which all processes call this."""
        if not self.is_lead:
            self.say(msgspec.msgpack.encode(value))
            return self._number(self.hear())
        least = min([value, *(self._number(peer.take()) for peer in self._peers)])
        self.say(msgspec.msgpack.encode(least))
        return least

    def _number(self, body: bytes | None) -> int:
        if body is None:
            raise console.RunError(
                "a process left while its answer was waited for; start all again"
            )
        return msgspec.msgpack.decode(body, type=int)

    def part(self) -> None:
        """Says farewell to the others and waits for theirs; nobody's end is a failure any more."""
        for peer in self._peers:
            peer.send(Farewell())
        for peer in self._peers:
            peer.is_gone.wait()

    def fail(self, error: str) -> None:
        """Tells the others that this process cannot go on.

        If that is because one of them has ended, the process ends here, with a message that says
        which.
        """
        if self._lost.wait(_GRACE_S):
            self._left.wait()
            return
        self._ends.set()
        self._tell_all(f"process {self.process_id} failed: {error}", self._peers)

    def close(self) -> None:
        """Closes the connections."""
        self._ends.set()
        for peer in self._peers:
            peer.hang_up()

    def _beat(self) -> None:
        while not self._ends.wait(self._timing.beat_s):
            for peer in self._peers:
                if not peer.is_gone.is_set():
                    peer.send(Beat())

    def _on_lost(self, lost: Peer, reason: str) -> None:
        """Ends the process; the first that is lost is what the message is about."""
        if self._ends.is_set() or not self._is_losing.acquire(blocking=False):
            return
        self._lost.set()
        self._tell_all(reason, [peer for peer in self._peers if peer is not lost])
        self._leave(
            f"{reason}; all {self.num_processes} processes end, as none can go on alone: see what "
            "it said, and start them again"
        )
        self._left.set()

    def _tell_all(self, error: str, peers: Sequence[Peer]) -> None:
        """Says why this process ends, and gives others time to read it before it does."""
        for peer in peers:
            peer.send(Farewell(error=error))
        until = time.monotonic() + _GRACE_S
        for peer in peers:
            peer.is_gone.wait(max(0.0, until - time.monotonic()))


def join(
    section: ProcessesSection,
    about: Mapping[str, str],
    *,
    say: Callable[[str], None],
    timing: Timing | None = None,
    leave: Callable[[str], None] = leave,
) -> Group:
    """Waits until all processes are there.

    Args:
        section: The knobs; several processes.
        about: What must be the same for all of them, by name.
        say: Shows a line.
        timing: How long to wait.
        leave: Ends this process when another is gone; called in any thread.

    Raises:
        ValueError: Process 0 cannot listen, or refuses this one.
        RunError: Not all came in time.
    """
    timing = timing or Timing()
    if section.process_id == LEAD:
        with _listen(section) as listener:
            sockets = _gather(listener, section, about, timing=timing, say=say)
        port = _free_port(section.address[0])
        for sock in sockets.values():
            with contextlib.suppress(OSError):  # who is gone again is found out by the group
                sock.sendall(_CODEC.frame(Welcome(port=port)))
    else:
        sock, port = _come(section, about, timing=timing, say=say)
        sockets = {LEAD: sock}
    say(f"{section.num_processes} processes are there")
    return Group(section, sockets, port=port, timing=timing, leave=leave)


def _listen(section: ProcessesSection) -> socket.socket:
    host, port = section.address
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ValueError(
            f"--coordinator={section.coordinator}: process 0 cannot listen there "
            f"({error.strerror}); name an address of its machine and a free port"
        ) from error


def _free_port(host: str) -> int:
    family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
    with socket.create_server((host, 0), family=family) as probe:
        return int(probe.getsockname()[1])


def _gather(
    listener: socket.socket,
    section: ProcessesSection,
    about: Mapping[str, str],
    *,
    timing: Timing,
    say: Callable[[str], None],
) -> dict[int, socket.socket]:
    """The connections of process 0, once all others have made theirs."""
    say(f"process 0 waits for the others at {section.coordinator}")
    until = time.monotonic() + timing.join_s
    found: dict[int, socket.socket] = {}
    while len(found) < section.num_processes - 1:
        listener.settimeout(max(0.01, until - time.monotonic()))
        try:
            sock, _ = listener.accept()
        except TimeoutError:
            missing = [i for i in range(1, section.num_processes) if i not in found]
            for other in found.values():
                _refuse(other, f"processes {missing} did not come; see process 0")
            raise console.RunError(
                f"of --num_processes={section.num_processes} these did not come within "
                f"{timing.join_s:g} s: {missing}; start each with --process_id and the same "
                f"--coordinator={section.coordinator}"
            ) from None
        hello = _try_hello(sock)
        if hello is None:
            continue
        trouble = _why_not(hello, section, about, found)
        if trouble is None:
            found[hello.process_id] = sock
        else:
            say(f"refused a process: {trouble}")
            _refuse(sock, trouble)
    return found


def _try_hello(sock: socket.socket) -> Hello | None:
    """What a process that connects says; None, and no connection, for what is none of ours."""
    sock.settimeout(_HELLO_S)
    try:
        data = wire.read_frame(sock)
        hello = None if data is None else _CODEC.decode(data)
    except (OSError, msgspec.MsgspecError):
        hello = None
    if isinstance(hello, Hello):
        return hello
    sock.close()
    return None


def _refuse(sock: socket.socket, message: str) -> None:
    with sock, contextlib.suppress(OSError):
        sock.sendall(_CODEC.frame(Refused(message=message)))


def _why_not(
    hello: Hello,
    section: ProcessesSection,
    about: Mapping[str, str],
    found: Mapping[int, socket.socket],
) -> str | None:
    """Why a process cannot take part; None if it can."""
    name = f"process {hello.process_id}"
    if hello.num_processes != section.num_processes:
        return (
            f"{name} has --num_processes={hello.num_processes} and process 0 has "
            f"{section.num_processes}; start all with the same"
        )
    if not LEAD < hello.process_id < section.num_processes or hello.process_id in found:
        return f"there is a {name} already; give each process a --process_id of its own"
    names = sorted({*about, *hello.about})
    other = [key for key in names if about.get(key) != hello.about.get(key)]
    if other:
        told = ", ".join(f"{k} is {hello.about.get(k)!r} and not {about.get(k)!r}" for k in other)
        return f"{name} differs from process 0: {told}; start all alike"
    return None


def _come(
    section: ProcessesSection,
    about: Mapping[str, str],
    *,
    timing: Timing,
    say: Callable[[str], None],
) -> tuple[socket.socket, int]:
    """The connection to process 0 and the port of jax's coordinator, once all have come."""
    say(f"process {section.process_id} looks for process 0 at {section.coordinator}")
    sock = _connect(section, timing)
    hello = Hello(
        process_id=section.process_id, num_processes=section.num_processes, about=dict(about)
    )
    try:
        sock.sendall(_CODEC.frame(hello))
        sock.settimeout(timing.join_s + _HELLO_S)  # it waits for others
        data = wire.read_frame(sock)
    except OSError:
        data = None
    answer = None if data is None else _CODEC.decode(data)
    if isinstance(answer, Welcome):
        return sock, answer.port
    sock.close()
    if isinstance(answer, Refused):
        raise ValueError(answer.message)
    raise console.RunError("process 0 ended before all processes had come; see what it said")


def _connect(section: ProcessesSection, timing: Timing) -> socket.socket:
    until = time.monotonic() + timing.join_s
    while True:
        try:
            return socket.create_connection(section.address, timeout=_HELLO_S)
        except OSError as error:
            if time.monotonic() > until:
                raise console.RunError(
                    f"process 0 could not be reached at --coordinator={section.coordinator} within "
                    f"{timing.join_s:g} s ({error}); start it with --process_id=0"
                ) from error
            time.sleep(_RETRY_S)
