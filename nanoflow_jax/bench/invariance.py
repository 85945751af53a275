"""What --batch_invariant costs: an engine with it and one without, in turn, in one process.

Whether it holds is looked at as well, where it is measured: some requests run alone and among all
of their mix, and tokens and logprobs must be the same to the last bit.
"""

import dataclasses
import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence

from nanoflow_jax import config as config_lib
from nanoflow_jax import request as request_lib
from nanoflow_jax.bench import clock, throughput
from nanoflow_jax.engine import interface
from nanoflow_jax.results.invariance import INVARIANT, MODES, PLAIN
from nanoflow_jax.workload.file import WorkRequest

# Of the memory that a cache would take: two models and two caches lie beside each other.
_CACHE_SHARE = 1 / 3
# Requests of a mix whose bits are compared.
_MOST_COMPARED = 4
_NUM_LOGPROBS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a mix by one engine.

    Attributes:
        mode: Of `results.invariance.MODES`.
        round: Which run of that mode.
        result: What it came to.
    """

    mode: str
    round: int
    result: throughput.Throughput


def configs(asked: config_lib.EngineConfig) -> dict[str, config_lib.EngineConfig]:
    """The knobs of each mode's engine, which differ in nothing but the setting.

    Args:
        asked: Knobs of the command line.

    Raises:
        ValueError: They choose buckets.
    """
    if asked.batch.buckets:
        raise ValueError(
            f"--buckets={asked.batch.buckets}: the setting has one bucket and the engine without "
            "it several; leave the flag out"
        )
    fraction = asked.cache.memory_fraction * _CACHE_SHARE
    cache = dataclasses.replace(asked.cache, memory_fraction=fraction)
    return {
        mode: dataclasses.replace(
            asked,
            cache=cache,
            batch=dataclasses.replace(asked.batch, batch_invariant=mode == INVARIANT),
        )
        for mode in MODES
    }


def rounds(
    engines: Mapping[str, interface.TokenEngine],
    mix: Sequence[WorkRequest],
    *,
    name: str,
    count: int,
) -> Iterator[Run]:
    """Runs a mix with each engine in turn, to and fro.

    Args:
        engines: Idle, one for each mode.
        mix: What to run.
        name: Of the mix.
        count: Runs of each.
    """
    for mode in MODES:
        throughput.run(engines[mode], mix[:2], name="warm-up")
    for number in range(count):
        for mode in clock.abba(MODES, number):
            result = throughput.run(engines[mode], mix, name=f"{name}-{number}")
            yield Run(mode=mode, round=number, result=result)


def hashes(engine: interface.TokenEngine, mix: Sequence[WorkRequest]) -> dict[str, str]:
    """SHA-256 of what some requests give, alone and among all: equal where the setting holds.

    Args:
        engine: With the setting; idle.
        mix: All requests.
    """
    chosen = range(0, len(mix), -(-len(mix) // _MOST_COMPARED))
    alone = [_bits(engine, {i: mix[i]})[i] for i in chosen]
    together = _bits(engine, dict(enumerate(mix)))
    return {
        "alone": _digest(alone),
        "in its mix": _digest([together[i] for i in chosen]),
    }


def differing(found: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Mixes in which the setting did not hold, by their `hashes`."""
    return [name for name, by_way in found.items() if len(set(by_way.values())) > 1]


def _bits(engine: interface.TokenEngine, mix: Mapping[int, WorkRequest]) -> dict[int, bytes]:
    """Tokens and logprobs of each request, as bytes."""
    for i, work in mix.items():
        params = request_lib.SamplingParams(
            max_tokens=work.output_len,
            temperature=0.0,
            ignore_eos=True,
            logprobs=_NUM_LOGPROBS,
            prompt_logprobs=_NUM_LOGPROBS,
        )
        engine.add(
            request_lib.Request(request_id=f"{i}", prompt_ids=work.prompt_ids, params=params)
        )
    found = dict.fromkeys(mix, b"")
    while engine.has_work:
        for update in engine.step():
            for entry in (*update.prompt_logprobs, *update.logprobs):
                found[int(update.request_id)] += _entry_bits(entry)
    return found


def _entry_bits(entry: request_lib.TokenLogprobs) -> bytes:
    top = b"".join(struct.pack("<id", token, value) for token, value in entry.top)
    return struct.pack("<id", entry.token_id, entry.logprob) + top


def _digest(parts: Sequence[bytes]) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


def report(found: Sequence[Run]) -> str:
    """What the rounds of a mix came to, for people."""
    lines = []
    for number in range(len(found) // len(MODES)):
        speeds = {run.mode: run.result.output_per_s for run in found if run.round == number}
        lines.append(
            f"round {number + 1}: plain {speeds[PLAIN]:.1f}, invariant {speeds[INVARIANT]:.1f} "
            f"tokens/s: {speeds[INVARIANT] / speeds[PLAIN] - 1:+.1%}"
        )
    return "\n".join(lines)
