"""A server in a process of its own, a client here, and requests that they run together."""

import asyncio
import contextlib
import dataclasses
import hashlib
import itertools
import json
import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence

from nanoflow_jax import console, line_worker, request
from nanoflow_jax.bench import split_ends, split_link, split_server
from nanoflow_jax.engine import build, interface
from nanoflow_jax.split import client as client_lib
from nanoflow_jax.split import codecs, driver, identity, transport
from nanoflow_jax.split import cut as cut_lib
from nanoflow_jax.split import engine as engine_lib

_START_S = 300.0
_ANSWER_S = 60.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask:
    """A request and where it runs.

    Attributes:
        prompt_ids: Token ids.
        output_len: Tokens to generate, whatever they are.
        cut: Who runs which layers.
    """

    prompt_ids: tuple[int, ...]
    output_len: int
    cut: cut_lib.Cut

    @property
    def params(self) -> request.SamplingParams:
        """Greedy, so that all ways of running give the same tokens."""
        return request.SamplingParams(
            max_tokens=self.output_len, temperature=0.0, seed=0, ignore_eos=True
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timed:
    """A request that has run alone.

    Attributes:
        step_s: Median time from one token to the next.
        token_ids: Generated.
    """

    step_s: float
    token_ids: tuple[int, ...]

    @classmethod
    def of(cls, token_ids: Sequence[int], times_s: Sequence[float]) -> "Timed":
        """From the tokens and when each came; the first gaps still hold the prompt's end."""
        gaps = [after - before for before, after in itertools.pairwise(times_s)]
        return cls(step_s=statistics.median(gaps[2:]), token_ids=tuple(token_ids))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Crowd:
    """Many requests that have run at once; fields as of `results.split.Load`."""

    seconds: float
    busy_s: float
    cpu_s: float
    client_cpu_s: float
    steps: int
    done: tuple[driver.Generation, ...]

    @property
    def first_token_s(self) -> tuple[float, ...]:
        """Per request."""
        return tuple(one.report.ttft_s or 0.0 for one in self.done)

    @property
    def per_token_s(self) -> tuple[float, ...]:
        """Per request."""
        return tuple(one.report.tpot_s or 0.0 for one in self.done)


class Stage:
    """Both ends, ready.

    Attributes:
        engine: The client's.
        client: Asks the gateway.
        num_layers: L.
    """

    def __init__(
        self,
        server: line_worker.LineWorker,
        engine: split_ends.MeteredEngine,
        client: client_lib.SplitClient,
        *,
        num_layers: int,
    ) -> None:
        self._server = server
        self.engine, self.client, self.num_layers = engine, client, num_layers

    def cut(self, start: int, stop: int) -> cut_lib.Cut:
        """The server runs layers [start, stop)."""
        return cut_lib.Cut(start=start, stop=stop, num_layers=self.num_layers)

    async def rtt_s(self) -> float:
        """The link's median round trip now."""
        return (await self.client.probe(num_bytes=1)).rtt_p50_s

    async def alone(self, ask: Ask) -> Timed:
        """Runs one request."""
        times_s: list[float] = []

        def came(token_ids: Sequence[int]) -> None:
            times_s.extend([time.perf_counter()] * len(token_ids))

        done = await self.client.generate(ask.prompt_ids, ask.params, ask.cut, on_tokens=came)
        return Timed.of(done.token_ids, times_s)

    async def crowd(self, asks: Sequence[Ask]) -> Crowd:
        """Runs requests that all begin at once."""
        before, client_cpu_s = self._counts(), time.process_time()
        begun_s = time.perf_counter()
        done = await asyncio.gather(
            *(self.client.generate(ask.prompt_ids, ask.params, ask.cut) for ask in asks)
        )
        seconds = time.perf_counter() - begun_s
        client_cpu_s = time.process_time() - client_cpu_s
        after = self._counts()
        return Crowd(
            seconds=seconds,
            busy_s=after["busy_s"] - before["busy_s"],
            cpu_s=after["cpu_s"] - before["cpu_s"],
            client_cpu_s=client_cpu_s,
            steps=int(after["steps"] - before["steps"]),
            done=tuple(done),
        )

    def _counts(self) -> dict[str, float]:
        return dict(_answer(self._server, b"\n", seconds=_ANSWER_S))


def _answer(server: line_worker.LineWorker, line: bytes, *, seconds: float) -> dict[str, float]:
    try:
        return dict(server.ask(line, seconds=seconds))
    except line_worker.WorkerDiedError as error:
        raise console.RunError(
            f"the server ended with code {server.wait()}; to see why: echo "
            f"'{line.decode().strip()}' | {server.command}"
        ) from error
    except line_worker.WorkerLateError as error:
        raise console.RunError(
            f"the server said nothing for {seconds:g} s; is the machine busy with other things?"
        ) from error


@contextlib.asynccontextmanager
async def stage(
    config: split_ends.EndConfig,
    *,
    rtt_s: float = 0.0,
    look: Callable[[engine_lib.SplitEngine], None] = lambda engine: None,
) -> AsyncIterator[Stage]:
    """Starts both ends, each with all layers in segments of the grid.

    Args:
        config: Of each.
        rtt_s: That the link's round trip is made longer by.
        look: Called with the client's engine, idle, while the server does nothing.
    """
    server, stack = line_worker.LineWorker(split_server.SCRIPT, []), contextlib.AsyncExitStack()
    try:
        line = json.dumps(dataclasses.asdict(config)).encode() + b"\n"
        port = int(_answer(server, line, seconds=_START_S)["port"])
        source, engine_config = split_ends.source_of(config.model), config.engine_config()
        built = engine_lib.build_split_engine(engine_config, source, grid=config.grid)
        try:
            look(built)
            metered = split_ends.MeteredEngine(built)
            num_layers = source.config.num_layers
            if rtt_s:
                delayed = split_link.delayed(port, one_way_s=rtt_s / 2)
                port = await stack.enter_async_context(delayed)
            client = client_lib.SplitClient(
                transport.Endpoint(host="127.0.0.1", port=port),
                identity.of(engine_config.model, source, built.held.dtype),
                engine=metered,
                held_layers=((0, num_layers),),
                codecs=(codecs.Codec.F32,),  # as the model runs: all ways give the same tokens
            )
            async with client:
                yield Stage(server, metered, client, num_layers=num_layers)
        finally:
            await stack.aclose()
            built.close()
    finally:
        server.close()


def single(config: split_ends.EndConfig) -> interface.TokenEngine:
    """One process that runs whole models."""
    return build.build_engine(config.engine_config(), split_ends.source_of(config.model))


def alone(engine: interface.TokenEngine, ask: Ask, *, name: str) -> Timed:
    """Runs one request in one process."""
    engine.add(request.Request(request_id=name, prompt_ids=ask.prompt_ids, params=ask.params))
    times_s: list[float] = []
    token_ids: list[int] = []
    while engine.has_work:
        for update in engine.step():
            token_ids.extend(update.token_ids)
            times_s.extend([time.perf_counter()] * len(update.token_ids))
    return Timed.of(token_ids, times_s)


def digest(tokens: Sequence[Sequence[int]]) -> str:
    """SHA-256 of tokens, request by request."""
    return hashlib.sha256(json.dumps([list(one) for one in tokens]).encode()).hexdigest()
