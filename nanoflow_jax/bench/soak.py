"""Load with clients as they are: some leave in mid-stream, some read slowly, all are many.

Every stream that is read to its end must be what `LLM.generate` gives for its prompt, `/health`
must answer all the time, and afterwards the engine must hold no page.
"""

import asyncio
import dataclasses
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np

from nanoflow_jax import llm
from nanoflow_jax import request as request_lib
from nanoflow_jax.bench import http_client, near_ties, serving, throughput
from nanoflow_jax.workload import file as workload_file

# Of all requests.
_LEAVING_FRACTION = 1 / 3
_SLOW_FRACTION = 1 / 10
# A slow reader has large pieces, little room for them, and sleeps after each.
_SLOW_LOGPROBS = 20
_SLOW_BYTES = 4096
_PAUSE_S = 0.05
_SAMPLE_S = 1.0
_HEALTH_S = 0.5
_IDLE_S = 60.0
# After a failure, so that a server that is gone is not asked as fast as it can be.
_RETRY_S = 0.5
# Memory is judged after caches and buffers have filled.
_WARM_UP_FRACTION = 0.25


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expected:
    """What an answer must be.

    Attributes:
        work: What is asked.
        token_ids: The tokens that any right run gives; all of them unless there is a near tie.
        text: The whole text; None where a near tie lets it vary.
    """

    work: workload_file.WorkRequest
    token_ids: tuple[int, ...]
    text: str | None


@dataclasses.dataclass(kw_only=True)
class Soak:
    """What became of a run; bytes and page counts are samples over time, as (seconds, value).

    Attributes:
        seconds: From the first request to the last answer.
        compared: Streams read to their end and compared, slow ones included.
        slow: Those that were read slowly.
        left: Streams that their client left.
        near_ties: Compared ones with a near tie, equal up to there.
        output_tokens: Of compared ones.
        mismatches: What was wrong with an answer, one line each.
        failures: Requests that ended without an answer.
        first_token_s: Of compared ones that were not slow.
        per_token_s: Of the same.
        health_s: How long /health took, each time.
        health_failures: When it, or the server's figures, could not be had.
        memory: Resident bytes by process.
        pages_before: Pages held at the start.
        pages_after: At the end, once idle; None if the server is gone by then.
    """

    seconds: float = 0.0
    compared: int = 0
    slow: int = 0
    left: int = 0
    near_ties: int = 0
    output_tokens: int = 0
    mismatches: list[str] = dataclasses.field(default_factory=list)
    failures: list[str] = dataclasses.field(default_factory=list)
    first_token_s: list[float] = dataclasses.field(default_factory=list)
    per_token_s: list[float] = dataclasses.field(default_factory=list)
    health_s: list[float] = dataclasses.field(default_factory=list)
    health_failures: list[str] = dataclasses.field(default_factory=list)
    memory: dict[str, list[tuple[float, float]]] = dataclasses.field(default_factory=dict)
    pages_before: int = 0
    pages_after: int | None = 0

    @property
    def complaints(self) -> list[str]:
        """What must not be, one line each."""
        found = [*self.mismatches, *self.failures, *self.health_failures]
        if self.pages_after is None:
            found.append("the server is gone at the end")
        elif self.pages_after != self.pages_before:
            found.append(
                f"{self.pages_after} pages are held at the end, {self.pages_before} were at first"
            )
        return found


def expect(model: llm.LLM, mix: Sequence[workload_file.WorkRequest]) -> list[Expected]:
    """Runs a mix offline.

    Raises:
        ValueError: A request does not fit the model.
    """
    params = [
        request_lib.SamplingParams(
            max_tokens=work.output_len, temperature=0.0, ignore_eos=True, logprobs=2
        )
        for work in mix
    ]
    results = model.generate([work.prompt_ids for work in mix], params)
    return [_expected(work, result) for work, result in zip(mix, results, strict=True)]


def _expected(work: workload_file.WorkRequest, result: llm.Result) -> Expected:
    assert result.logprobs is not None
    margins = [entry.top[0][1] - entry.top[1][1] for entry in result.logprobs]
    certain = near_ties.num_certain(margins)
    return Expected(
        work=work,
        token_ids=result.token_ids[:certain],
        text=result.text if certain == len(result.token_ids) else None,
    )


def run(
    server: http_client.Server,
    expected: Sequence[Expected],
    *,
    concurrency: int,
    seconds: float,
    seed: int = 0,
) -> Soak:
    """Keeps a server busy for a while.

    Args:
        server: Ready, idle, and one of ours.
        expected: What to ask for, and the answers.
        concurrency: Clients.
        seconds: After this, no client begins another request.
        seed: Of who asks what, who leaves and who is slow.

    Raises:
        OSError: The server cannot be reached.
        ValueError: It is not one of ours.
    """
    stats = server.stats()
    if not stats:
        raise ValueError(f"--url={server.url} is no server of this project: it has no /page/stats")
    run = _Run(server, expected, seconds)
    run.soak.pages_before = stats["pages_used"]
    asyncio.run(run.all(concurrency, seed))
    run.soak.pages_after = _pages_once_idle(server)
    return run.soak


def _pages_once_idle(server: http_client.Server) -> int | None:
    deadline = time.monotonic() + _IDLE_S
    while True:
        try:
            stats = server.stats()
        except OSError:
            return None
        if not stats:
            return None
        if time.monotonic() > deadline or not stats["running"] + stats["waiting"]:
            return int(stats["pages_used"])
        time.sleep(_RETRY_S)


class _Run:
    """One run while it lasts."""

    def __init__(
        self, server: http_client.Server, expected: Sequence[Expected], seconds: float
    ) -> None:
        self._server = server
        self._expected = expected
        self._began = time.monotonic()
        self._seconds = seconds
        self.soak = Soak()

    @property
    def _age_s(self) -> float:
        return time.monotonic() - self._began

    async def all(self, concurrency: int, seed: int) -> None:
        """Runs the clients, and watches the server as long as they last."""
        watchers = [
            asyncio.create_task(self._again(self._watch_health)),
            asyncio.create_task(self._again(self._sample)),
        ]
        try:
            await asyncio.gather(
                *(self._client(random.Random(f"{seed}/{i}")) for i in range(concurrency))
            )
            self.soak.seconds = self._age_s
        finally:
            for watcher in watchers:
                watcher.cancel()
            results = await asyncio.gather(*watchers, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def _client(self, draws: random.Random) -> None:
        """One client: a new connection for each request, as one that leaves needs anyway."""
        while True:
            expected = draws.choice(self._expected)
            kind = draws.random()
            try:
                if kind < _LEAVING_FRACTION:
                    await self._leave(expected, draws)
                elif kind < _LEAVING_FRACTION + _SLOW_FRACTION:
                    await self._read_slowly(expected)
                else:
                    await self._read(expected)
            except (OSError, ValueError) as error:
                self.soak.failures.append(f"after {self._age_s:.1f} s: {error!r:.300}")
                await asyncio.sleep(_RETRY_S)
            if self._age_s >= self._seconds:
                return

    async def _leave(self, expected: Expected, draws: random.Random) -> None:
        parts = draws.randint(1, max(1, expected.work.output_len - 1))
        async with self._server.connected() as connection:
            answer = await connection.ask(self._message(expected), leave_after=parts)
        if answer.status == 200 and not answer.is_whole_stream:
            self.soak.left += 1
        else:  # refused, or merged into fewer parts
            self._compare(expected, answer.events())

    async def _read_slowly(self, expected: Expected) -> None:
        async with self._server.connected(receive_bytes=_SLOW_BYTES) as connection:
            message = self._message(expected, logprobs=_SLOW_LOGPROBS)
            answer = await connection.ask(message, pause_s=_PAUSE_S)
        self._compare(expected, answer.events())
        self.soak.slow += 1

    async def _read(self, expected: Expected) -> None:
        async with self._server.connected() as connection:
            answer = await connection.ask(self._message(expected))
        count = self._compare(expected, answer.events())
        self.soak.first_token_s.append(answer.first_s)
        if count > 1:
            self.soak.per_token_s.append((answer.last_s - answer.first_s) / (count - 1))

    def _message(self, expected: Expected, **more: Any) -> bytes:
        body = serving.body(expected.work, stream=True)
        return self._server.message(serving.PATH, {**body, "return_token_ids": True, **more})

    def _compare(self, expected: Expected, events: Sequence[dict[str, Any]]) -> int:
        choices = [choice for event in events for choice in event["choices"]]
        token_ids = tuple(token for choice in choices for token in choice["token_ids"])
        text = "".join(choice["text"] for choice in choices)
        wrong = difference(expected, token_ids, text)
        if wrong is not None:
            self.soak.mismatches.append(f"after {self._age_s:.1f} s: {wrong}")
        self.soak.compared += 1
        self.soak.near_ties += expected.text is None
        self.soak.output_tokens += len(token_ids)
        return len(token_ids)

    async def _again(self, watch: Callable[[http_client.Connection], Awaitable[None]]) -> None:
        """Watches over one connection, and over another one after a failure."""
        while True:
            try:
                async with self._server.connected() as connection:
                    await watch(connection)
            except (OSError, ValueError) as error:
                said = f"after {self._age_s:.1f} s, while watching: {error!r:.300}"
                self.soak.health_failures.append(said)
                await asyncio.sleep(_RETRY_S)

    async def _watch_health(self, connection: http_client.Connection) -> None:
        while True:
            answer = await connection.ask(self._server.message("/health"))
            self.soak.health_s.append(answer.last_s)
            answer.json()
            await asyncio.sleep(_HEALTH_S)

    async def _sample(self, connection: http_client.Connection) -> None:
        while True:
            stats = (await connection.ask(self._server.message("/page/stats"))).json()
            for name, value in stats["memory_bytes"].items():
                self.soak.memory.setdefault(name, []).append((self._age_s, value))
            await asyncio.sleep(_SAMPLE_S)


def difference(expected: Expected, token_ids: Sequence[int], text: str) -> str | None:
    """What is wrong with an answer; None if it is right."""
    prompt = f"prompt {list(expected.work.prompt_ids[:8])}..."
    if len(token_ids) != expected.work.output_len:
        return f"{prompt}: {len(token_ids)} tokens instead of {expected.work.output_len}"
    for place, (token, wanted) in enumerate(zip(token_ids, expected.token_ids, strict=False)):
        if token != wanted:
            return f"{prompt}, token {place}: {token} instead of {wanted}"
    if expected.text is not None and text != expected.text:
        return f"{prompt}: the tokens are right and the text is not: {text!r:.200}"
    return None


def slope_per_minute(samples: Sequence[tuple[float, float]]) -> float:
    """Growth per minute of a straight line through samples; 0 where there are too few."""
    if len(samples) < 3:
        return 0.0
    seconds, values = zip(*samples, strict=True)
    return float(np.polyfit(np.asarray(seconds) / 60, np.asarray(values), 1)[0])


def report(soak: Soak) -> str:
    """The run as lines for people."""
    lines = [
        f"{soak.compared} streams compared in {soak.seconds:.1f} s ({soak.slow} read slowly, "
        f"{soak.near_ties} up to a near tie), {soak.left} left in mid-stream",
        f"mismatches: {len(soak.mismatches)}, failures: {len(soak.failures)}",
        f"output of compared streams: {soak.output_tokens / max(soak.seconds, 1e-9):.1f} tokens/s",
        f"time to first token: {throughput.percentiles(soak.first_token_s)}",
        f"time per output token: {throughput.percentiles(soak.per_token_s)}",
        f"/health: asked {len(soak.health_s)} times, failed {len(soak.health_failures)} times, "
        f"{throughput.percentiles(soak.health_s)}, slowest "
        f"{max(soak.health_s, default=0.0) * 1e3:.1f} ms",
        f"pages held: {soak.pages_before} before, {soak.pages_after} after",
    ]
    for name, samples in soak.memory.items():
        warm = [(at, value) for at, value in samples if at >= _WARM_UP_FRACTION * soak.seconds]
        values = [value / 2**20 for _, value in warm or samples]
        lines.append(
            f"memory of the {name} after warm-up: {min(values):.1f} to {max(values):.1f} MiB, "
            f"{slope_per_minute(warm) / 2**20:+.2f} MiB a minute"
        )
    return "\n".join(lines)
