"""Throughput and latency of a running server: a request mix from a fixed number of clients."""

import asyncio
import dataclasses
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any

import httptools

from nanoflow_jax.bench import throughput
from nanoflow_jax.workload import file as workload_file


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """Which server, and how it is asked.

    Attributes:
        url: Its root, such as http://127.0.0.1:8000.
        concurrency: Clients; each sends its next request when its last was answered.
        stream: Whether tokens are wanted as they come.
        api_key: Sent along unless empty.
    """

    url: str
    concurrency: int
    stream: bool
    api_key: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serving:
    """One run of a mix.

    Attributes:
        result: Tokens and times; without streaming the first token comes with the last.
        cpu_s: Processor time by process: engine, front and client; empty for a server that does
            not tell.
    """

    result: throughput.Throughput
    cpu_s: dict[str, float]


def run(target: Target, mix: Sequence[workload_file.WorkRequest]) -> Serving:
    """Runs a mix once.

    Args:
        target: A server that is ready.
        mix: What to ask.

    Raises:
        ValueError: The server refused a request; the message is its own.
        OSError: It cannot be reached.
    """
    before, client_cpu = _stats(target), time.process_time()
    start = time.perf_counter()
    answers = asyncio.run(_run_all(target, mix))
    seconds = time.perf_counter() - start
    client_cpu = time.process_time() - client_cpu
    after = _stats(target)
    cpu = {name: after["cpu_s"][name] - before["cpu_s"][name] for name in after.get("cpu_s", {})}
    result = throughput.Throughput(
        requests=len(mix),
        input_tokens=sum(len(work.prompt_ids) for work in mix),
        output_tokens=sum(answer.num_tokens for answer in answers),
        seconds=seconds,
        steps=after["totals"]["steps"] - before["totals"]["steps"] if after else 0,
        first_token_s=tuple(answer.first_s for answer in answers),
        per_token_s=tuple(
            (answer.last_s - answer.first_s) / (answer.num_tokens - 1)
            for answer in answers
            if answer.num_tokens > 1
        ),
    )
    return Serving(result=result, cpu_s={**cpu, "client": client_cpu} if cpu else {})


def _stats(target: Target) -> dict[str, Any]:
    """The server's own figures; nothing from one of another make."""
    request = urllib.request.Request(f"{target.url}/page/stats", headers=_headers(target))
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            found: dict[str, Any] = json.load(answer)
    except (urllib.error.HTTPError, ValueError):
        return {}
    return found


def _headers(target: Target) -> dict[str, str]:
    return {"authorization": f"Bearer {target.api_key}"} if target.api_key else {}


async def _run_all(target: Target, mix: Sequence[workload_file.WorkRequest]) -> list["_Answer"]:
    left: Iterator[workload_file.WorkRequest] = iter(mix)
    clients = [_ask_in_turn(target, left) for _ in range(min(target.concurrency, len(mix)))]
    return [answer for answers in await asyncio.gather(*clients) for answer in answers]


async def _ask_in_turn(
    target: Target, left: Iterator[workload_file.WorkRequest]
) -> list["_Answer"]:
    place = urllib.parse.urlsplit(target.url)
    loop = asyncio.get_running_loop()
    transport, connection = await loop.create_connection(
        _Connection, place.hostname or "127.0.0.1", place.port or 80
    )
    try:
        return [
            await connection.ask(_message(target, place.netloc, work), stream=target.stream)
            for work in left
        ]
    finally:
        transport.close()


def _message(target: Target, host: str, work: workload_file.WorkRequest) -> bytes:
    body: dict[str, Any] = {
        "prompt": list(work.prompt_ids),
        "max_tokens": work.output_len,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": target.stream,
    }
    if target.stream:
        body["stream_options"] = {"include_usage": True}
    data = json.dumps(body).encode()
    headers = {
        "host": host,
        "content-type": "application/json",
        "content-length": str(len(data)),
        **_headers(target),
    }
    lines = [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join(["POST /v1/completions HTTP/1.1", *lines, "", ""]).encode() + data


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Answer:
    """One request: seconds from its sending, and how many tokens came."""

    first_s: float
    last_s: float
    num_tokens: int


class _Connection(asyncio.Protocol):
    """One connection that is asked one thing after another."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[None] | None = None
        self._body = bytearray()
        self._first_at: float | None = None

    def connection_made(self, transport: Any) -> None:
        """Keeps the transport."""
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        """Fails what is being asked."""
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionResetError("the server closed the connection"))

    async def ask(self, message: bytes, *, stream: bool) -> _Answer:
        """Sends a request and waits for all of its answer."""
        assert self._transport is not None
        self._body.clear()
        self._first_at = None
        self._parser = httptools.HttpResponseParser(self)
        self._answer = asyncio.get_running_loop().create_future()
        start = time.perf_counter()
        self._transport.write(message)
        await self._answer
        end = time.perf_counter()
        if self._parser.get_status_code() != 200:
            raise ValueError(f"the server answered {self._body.decode(errors='replace')[:500]}")
        assert self._first_at is not None
        return _Answer(
            first_s=self._first_at - start,
            last_s=end - start,
            num_tokens=_num_tokens(bytes(self._body), stream=stream),
        )

    def data_received(self, data: bytes) -> None:
        """Feeds the parser."""
        self._parser.feed_data(data)

    def on_body(self, data: bytes) -> None:
        """Takes a part of the body; called by the parser."""
        if self._first_at is None:
            self._first_at = time.perf_counter()
        self._body += data

    def on_message_complete(self) -> None:
        """Ends the answer; called by the parser."""
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(None)


def _num_tokens(body: bytes, *, stream: bool) -> int:
    """Generated tokens, as the server counts them."""
    if not stream:
        return int(json.loads(body)["usage"]["completion_tokens"])
    events = [event for event in body.split(b"\n\n") if event.startswith(b"data: {")]
    last = json.loads(events[-1].removeprefix(b"data: "))
    if "error" in last:
        raise ValueError(f"the server answered {last['error']['message']}")
    return int(last["usage"]["completion_tokens"])
