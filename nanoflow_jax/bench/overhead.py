"""What a server costs beside `LLM.generate`: the two asked in turn, since machines drift."""

import asyncio
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence

from nanoflow_jax import llm
from nanoflow_jax import request as request_lib
from nanoflow_jax.bench import http_client, serving, throughput
from nanoflow_jax.workload import file as workload_file

Mix = Sequence[workload_file.WorkRequest]
OFFLINE = "offline"
# Enough to see a first token come by itself.
_FIRST_TOKENS = 4


def rounds(
    model: llm.LLM,
    server: http_client.Server,
    mix: Mix,
    *,
    concurrency: int,
    count: int,
) -> list[dict[str, serving.Serving]]:
    """Runs a mix offline, over the server and over the server streaming, in turn.

    Each round begins with another of the three, so that none always has the same place.

    Args:
        model: Built with the knobs of the server.
        server: Ready.
        mix: What to run.
        concurrency: Clients of the server.
        count: Rounds.

    Returns:
        Of each round, the three runs by name.

    Raises:
        ValueError: A request cannot be served.
        OSError: The server cannot be reached.
    """
    whole = serving.Target(server=server, concurrency=concurrency, stream=False)
    streamed = dataclasses.replace(whole, stream=True)
    ways: dict[str, Callable[[Mix], serving.Serving]] = {
        OFFLINE: functools.partial(_offline, model),
        "server": functools.partial(serving.run, whole),
        "server, streaming": functools.partial(serving.run, streamed),
    }
    for way in ways.values():
        way(mix[:2])  # warms up
    found = []
    for number in range(count):
        first = number % len(ways)
        turns = [*ways][first:] + [*ways][:first]
        done = {name: ways[name](mix) for name in turns}
        found.append({name: done[name] for name in ways})
    return found


def _offline(model: llm.LLM, mix: Mix) -> serving.Serving:
    params = [_params(work.output_len) for work in mix]
    first_steps, cpu = model.engine.counters.steps, time.process_time()
    start = time.perf_counter()
    results = model.generate([work.prompt_ids for work in mix], params)
    seconds = time.perf_counter() - start
    return serving.Serving(
        result=throughput.Throughput(
            requests=len(mix),
            input_tokens=sum(len(work.prompt_ids) for work in mix),
            output_tokens=sum(len(result.token_ids) for result in results),
            seconds=seconds,
            steps=model.engine.counters.steps - first_steps,
            first_token_s=(),
            per_token_s=(),
        ),
        cpu_s={"engine": time.process_time() - cpu},
    )


def _params(output_len: int) -> request_lib.SamplingParams:
    return request_lib.SamplingParams(
        max_tokens=output_len, temperature=0.0, ignore_eos=True, seed=0
    )


def report_rounds(found: Sequence[dict[str, serving.Serving]]) -> str:
    """Medians of rounds, and of the ratios within a round, for people."""
    lines = []
    for name in found[0]:
        runs = [done[name] for done in found]
        speeds = [run.result.output_per_s for run in runs]
        ratios = [
            done[name].result.output_per_s / done[OFFLINE].result.output_per_s for done in found
        ]
        cpu_s = {who: statistics.median(run.cpu_s[who] for run in runs) for who in runs[0].cpu_s}
        lines.append(
            f"{name}: median {statistics.median(speeds):.1f} tokens/s "
            f"({', '.join(f'{speed:.1f}' for speed in speeds)}); of offline in its round: median "
            f"{statistics.median(ratios):.3f} ({', '.join(f'{ratio:.3f}' for ratio in ratios)}); "
            f"processor time: {serving.cpu_text(cpu_s)}"
        )
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstToken:
    """Seconds to the first token of one request, asked for twice in turn."""

    offline_s: float
    server_s: float


def first_tokens(
    model: llm.LLM, server: http_client.Server, work: workload_file.WorkRequest, *, pairs: int
) -> list[FirstToken]:
    """Asks offline and over the server, streaming, in turn; nothing else runs.

    Args:
        model: Built with the knobs of the server.
        server: Ready.
        work: Its prompt is asked with.
        pairs: How often.

    Raises:
        ValueError: The request cannot be served.
        OSError: The server cannot be reached.
    """
    return asyncio.run(_first_tokens(model, server, work, pairs))


async def _first_tokens(
    model: llm.LLM, server: http_client.Server, work: workload_file.WorkRequest, pairs: int
) -> list[FirstToken]:
    short = dataclasses.replace(work, output_len=_FIRST_TOKENS)
    message = server.message(serving.PATH, serving.body(short, stream=True))
    found = []
    async with server.connected() as connection:
        for number in range(pairs + 1):
            offline_s = 0.0
            if number % 2:
                offline_s = _first_token_s(model, short)
            answer = await connection.ask(message)
            answer.events()
            if not number % 2:
                offline_s = _first_token_s(model, short)
            found.append(FirstToken(offline_s=offline_s, server_s=answer.first_s))
    return found[1:]  # the first warms up


def _first_token_s(model: llm.LLM, work: workload_file.WorkRequest) -> float:
    name = "first-token"
    first_s = None
    start = time.perf_counter()
    model.submit(name, work.prompt_ids, _params(work.output_len))
    while model.generator.num_pending:
        result = model.generator.step()
        if first_s is None and result.deltas:
            first_s = time.perf_counter() - start
    assert first_s is not None
    return first_s


def report_first_tokens(found: Sequence[FirstToken]) -> str:
    """Medians, and the median of the differences within a pair, for people."""
    added = [pair.server_s - pair.offline_s for pair in found]
    return "\n".join(
        [
            f"time to first token, one client, {len(found)} pairs",
            f"offline: {throughput.percentiles([pair.offline_s for pair in found])}",
            f"server: {throughput.percentiles([pair.server_s for pair in found])}",
            f"added by the server, of each pair: {throughput.percentiles(added)}",
        ]
    )
