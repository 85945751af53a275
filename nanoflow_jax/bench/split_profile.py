"""Times of a model's nodes on this machine, and the plan that they give for a slower client."""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence

import numpy as np

from nanoflow_jax import request as request_lib
from nanoflow_jax.split import engine as engine_lib
from nanoflow_jax.split import interface, link
from nanoflow_jax.split.planning import baselines, planner
from nanoflow_jax.split.planning import problem as problems
from nanoflow_jax.split.planning.asked import Policy, Request, Side
from nanoflow_jax.split.planning.costs import Accounting, Model
from nanoflow_jax.split.planning.profiles import DeviceProfile, LinkProfile, NodeTimes

_ROUNDS = 3
_DECODE_STEPS = 8
_OUTPUT_LEN = 96  # pieces of all layers go on while others' prompts are computed
_TOKEN = 5
# How many times as long as the server's engine a client takes; the slowest that will do is taken.
SLOWNESSES = (6.0, 5.0, 4.0, 3.0, 2.5, 2.0, 1.6, 1.3, 1.0)
LEAST_SAVED = 1 / 3
_MEMORY_BYTES = 1e12  # no bound: models of this benchmark are small
_MESSAGE_S = 0.5e-3  # of processor time, at both ends together


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """A client and a plan with which a third of the server's time is to be saved.

    Attributes:
        slowness: Times as long as the server's engine takes.
        start: The server's first layer.
        stop: The layer after its last.
        load: What the server is charged, of what it would be for all layers.
        ttft_s: Predicted time to the first token.
        tpot_s: Predicted time of each further one.
    """

    slowness: float
    start: int
    stop: int
    load: float
    ttft_s: float
    tpot_s: float


def measure(
    engine: engine_lib.SplitEngine, name: str, *, grid: Sequence[int], batch: int, prompt_len: int
) -> DeviceProfile:
    """A profile of an engine: what layers take is the difference between pieces of some of them.

    Args:
        engine: Idle, of all layers.
        name: Of the model.
        grid: Borders between layers, of which the first and the second are measured.
        batch: Requests in a step.
        prompt_len: Tokens of a prompt, the only length for which prefill is measured.
    """
    count = engine.held.config.num_layers
    few, more = grid[0], grid[1]
    stops = (few, more, count)
    # In turn, since machines drift; the first round warms up, and the least is least disturbed.
    rounds = [
        [_times(engine, stop, batch, prompt_len) for stop in stops] for _ in range(1 + _ROUNDS)
    ]
    least = [
        float(min(column)) for column in zip(*(np.ravel(one) for one in rounds[1:]), strict=True)
    ]
    times = {stop: (least[2 * i], least[2 * i + 1]) for i, stop in enumerate(stops)}
    per_layer = _per_layer(times, few, more)
    half = (per_layer[0] / 2, per_layer[1] / 2)  # attention and feed-forward are not told apart
    # What a step takes beside its layers stays where the head is.
    head = _less(times[count], (count * per_layer[0], count * per_layer[1]))
    nodes = {"embedding": (0.0, 0.0), "attention": half, "mlp": half, "head": head}
    return DeviceProfile(
        name="this machine",
        source="measured: steps of pieces of few, more and all layers",
        memory_bytes=_MEMORY_BYTES,
        weight_bits=32,
        kv_bits=32,
        batch=batch,
        model=name,
        times={
            kind: NodeTimes(prefill_s=(prefill_s, 0.0, 0.0), decode_s=(decode_s, 0.0))
            for kind, (prefill_s, decode_s) in nodes.items()
        },
    )


Times = tuple[float, float]  # of a prompt, of a decode step; seconds


def _per_layer(times: dict[int, Times], few: int, more: int) -> Times:
    prefill_s, decode_s = _less(times[more], times[few])
    return prefill_s / (more - few), decode_s / (more - few)


def _less(one: Times, other: Times) -> Times:
    return max(0.0, one[0] - other[0]), max(0.0, one[1] - other[1])


def _times(engine: engine_lib.SplitEngine, stop: int, batch: int, prompt_len: int) -> Times:
    """What a prompt takes of steps that share it with others, and what a decode step takes."""
    # Pieces of all layers would go on while others' prompts are computed, so they draw once.
    with _pieces(engine, stop, batch, prompt_len=prompt_len, output_len=1) as names:
        begun_s = time.perf_counter()
        _until(engine, names, prompt_len)
        prefill_s = (time.perf_counter() - begun_s) / batch
    is_whole = stop == engine.held.config.num_layers
    steps = []
    with _pieces(engine, stop, batch, prompt_len=prompt_len, output_len=_OUTPUT_LEN) as names:
        _until(engine, names, prompt_len)
        for step in range(_DECODE_STEPS):
            begun_s = time.perf_counter()
            for name in names if not is_whole else ():
                engine.feed(name, prompt_len + step, token_ids=(_TOKEN,))
            _until(engine, names, 1)
            steps.append(time.perf_counter() - begun_s)
    return prefill_s, statistics.median(steps)


@contextlib.contextmanager
def _pieces(
    engine: engine_lib.SplitEngine, stop: int, batch: int, *, prompt_len: int, output_len: int
) -> Iterator[list[str]]:
    """Pieces of layers [0, stop) that have their prompts; their names."""
    names = [f"profile {i}" for i in range(batch)]
    params = request_lib.SamplingParams(
        max_tokens=output_len, temperature=0.0, seed=0, ignore_eos=True
    )
    for name in names:
        engine.open(
            interface.Piece(
                piece_id=name,
                start=0,
                stop=stop,
                params=params,
                prompt_len=prompt_len,
                max_len=prompt_len + output_len,
            )
        )
        engine.feed(name, 0, token_ids=(_TOKEN,) * prompt_len)
    yield names
    for name in names:
        engine.close_piece(name)
    while engine.has_work:
        engine.step()


def _until(engine: engine_lib.SplitEngine, names: Sequence[str], rows: int) -> None:
    """Steps until each piece has given so many rows, or a token."""
    left = dict.fromkeys(names, rows)
    while left:
        for output in engine.step():
            if output.piece_id in left:
                left[output.piece_id] -= rows if output.hidden is None else len(output.hidden)
        left = {name: count for name, count in left.items() if count > 0}


def link_profile(measured: link.Link, *, batch: int) -> LinkProfile:
    """A measured link as a planner knows it.

    Args:
        measured: With one message under way.
        batch: Messages of a step, which wait for each other.
    """
    return LinkProfile(
        name="loopback",
        source="measured",
        rtt_p50_s=measured.rtt_p50_s,
        rtt_p95_s=measured.rtt_p95_s,
        up_bytes_per_s=measured.up_bytes_per_s,
        up_p10_bytes_per_s=measured.up_bytes_per_s,
        down_bytes_per_s=measured.down_bytes_per_s,
        down_p10_bytes_per_s=measured.down_bytes_per_s,
        serialisation_s=batch * _MESSAGE_S,
    )


def find(
    model: Model, server: DeviceProfile, between: LinkProfile, asked: Request, *, grid: int
) -> Point | None:
    """The slowest client with which a third of the server's time is saved; None if none will do.

    The client embeds tokens and the server keeps the head; it is charged its average time.

    Args:
        model: Whose layers.
        server: As measured.
        between: The link.
        asked: A request with its deadlines.
        grid: Layers between borders.
    """
    policy = Policy(
        accounting=Accounting.AVERAGE,
        grid=grid,
        embedding=Side.CLIENT,
        head=Side.SERVER,
        activation_bytes=4.0,
    )
    unpinned = Policy(accounting=Accounting.AVERAGE, activation_bytes=4.0)
    problem = problems.build(model, server, server, between, asked, unpinned)
    alone = problems.outcome(problem, baselines.all_on(problem, Side.SERVER))
    for slowness in SLOWNESSES:
        client = server.scaled(1 / slowness)
        verdict = planner.plan(model, client, server, between, asked, policy)
        if verdict.plan is None or verdict.kind is not planner.VerdictKind.SPLIT:
            continue
        stretches = [one for one in verdict.plan.decode if one.side is Side.SERVER]
        load = verdict.plan.charge_s * problems.PER_SECOND / alone.charge
        if len(stretches) == 1 and 1 - load >= LEAST_SAVED:
            start, stop = planner.layers_of(model, stretches[0])
            return Point(
                slowness=slowness,
                start=start,
                stop=stop,
                load=load,
                ttft_s=verdict.plan.ttft_s,
                tpot_s=verdict.plan.tpot_s,
            )
    return None
