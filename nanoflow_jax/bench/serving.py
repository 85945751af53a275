"""Throughput and latency of a running server: a request mix from a fixed number of clients."""

import asyncio
import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

from nanoflow_jax.bench import http_client, throughput
from nanoflow_jax.workload import file as workload_file

PATH = "/v1/completions"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """Which server, and how it is asked.

    Attributes:
        server: Where it is.
        concurrency: Clients; each sends its next request when its last was answered.
        stream: Whether tokens are wanted as they come.
    """

    server: http_client.Server
    concurrency: int
    stream: bool


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
    before, client_cpu = target.server.stats(), time.process_time()
    start = time.perf_counter()
    answers = asyncio.run(_run_all(target, mix))
    seconds = time.perf_counter() - start
    client_cpu = time.process_time() - client_cpu
    after = target.server.stats()
    cpu = {name: after["cpu_s"][name] - before["cpu_s"][name] for name in after.get("cpu_s", {})}
    counts = [num_tokens(answer, stream=target.stream) for answer in answers]
    result = throughput.Throughput(
        requests=len(mix),
        input_tokens=sum(len(work.prompt_ids) for work in mix),
        output_tokens=sum(counts),
        seconds=seconds,
        steps=after["totals"]["steps"] - before["totals"]["steps"] if after else 0,
        first_token_s=tuple(answer.first_s for answer in answers),
        per_token_s=tuple(
            (answer.last_s - answer.first_s) / (count - 1)
            for answer, count in zip(answers, counts, strict=True)
            if count > 1
        ),
    )
    return Serving(result=result, cpu_s={**cpu, "client": client_cpu} if cpu else {})


async def _run_all(
    target: Target, mix: Sequence[workload_file.WorkRequest]
) -> list[http_client.Answer]:
    left: Iterator[workload_file.WorkRequest] = iter(mix)
    clients = [_ask_in_turn(target, left) for _ in range(min(target.concurrency, len(mix)))]
    return [answer for answers in await asyncio.gather(*clients) for answer in answers]


async def _ask_in_turn(
    target: Target, left: Iterator[workload_file.WorkRequest]
) -> list[http_client.Answer]:
    async with target.server.connected() as connection:
        return [
            await connection.ask(target.server.message(PATH, body(work, stream=target.stream)))
            for work in left
        ]


def body(work: workload_file.WorkRequest, *, stream: bool) -> dict[str, Any]:
    """A request of a workload as the server takes it."""
    made: dict[str, Any] = {
        "prompt": list(work.prompt_ids),
        "max_tokens": work.output_len,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": stream,
    }
    if stream:
        made["stream_options"] = {"include_usage": True}
    return made


def cpu_text(cpu_s: dict[str, float]) -> str:
    """Processor times for people."""
    shown = ", ".join(f"{who} {seconds:.2f} s" for who, seconds in cpu_s.items())
    return shown or "the server does not tell"


def num_tokens(answer: http_client.Answer, *, stream: bool) -> int:
    """Generated tokens, as the server counts them.

    Raises:
        ValueError: The server refused the request or broke the stream off.
    """
    last = answer.events()[-1] if stream else answer.json()
    return int(last["usage"]["completion_tokens"])
