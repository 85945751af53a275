"""Plays a planned request message by message, to see when each token reaches the client.

It shares no sums with the search: two machines and two directions of a link each do one thing at a
time, in the order in which things become ready, and contexts grow from step to step.
"""

import dataclasses
import enum
import heapq
from collections.abc import Callable, Sequence

from nanoflow_jax.cost.node_work import NodeKind
from nanoflow_jax.split.planning.asked import Request, Side
from nanoflow_jax.split.planning.costs import Model, NodeCosts
from nanoflow_jax.split.planning.planner import Plan, Stretch
from nanoflow_jax.split.planning.profiles import DeviceProfile, LinkProfile

_TOKEN_BYTES = 4


class _Resource(enum.Enum):
    CLIENT = enum.auto()
    SERVER = enum.auto()
    UP = enum.auto()
    DOWN = enum.auto()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weather:
    """What a link is like for one message.

    Attributes:
        rtt_s: A round trip.
        bytes_per_s: In the message's direction.
    """

    rtt_s: float
    bytes_per_s: float


def worst(link: LinkProfile) -> Callable[[Side], Weather]:
    """The link as deadlines count it, for messages to a side."""

    def at(to: Side) -> Weather:
        rate = link.up_p10_bytes_per_s if to is Side.SERVER else link.down_p10_bytes_per_s
        return Weather(rtt_s=link.rtt_p95_s, bytes_per_s=rate)

    return at


def usual(link: LinkProfile) -> Callable[[Side], Weather]:
    """The link as it is on average."""

    def at(to: Side) -> Weather:
        rate = link.up_bytes_per_s if to is Side.SERVER else link.down_bytes_per_s
        return Weather(rtt_s=link.rtt_p50_s, bytes_per_s=rate)

    return at


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trip:
    """What came of a request.

    Attributes:
        token_s: When each token reached the client, from the request's start.
        up_bytes: From the client.
        down_bytes: To it.
    """

    token_s: tuple[float, ...]
    up_bytes: float
    down_bytes: float


def play(
    model: Model,
    client: DeviceProfile,
    server: DeviceProfile,
    link: LinkProfile,
    request: Request,
    plan: Plan,
    *,
    weather: Callable[[Side], Weather],
    activation_bytes: float = 2.0,
) -> Trip:
    """Plays one request to the longest output that its deadlines are for.

    Args:
        model: Whose nodes.
        client: One machine.
        server: The other.
        link: Gives what a message takes beside the weather.
        request: Its lengths.
        plan: Where its nodes run.
        weather: The link when a message to a side is sent.
        activation_bytes: Of a number of a hidden state.
    """
    costs = (NodeCosts(model, client), NodeCosts(model, server))
    script = _Script(costs, link, weather)
    hidden = model.config.hidden_size * activation_bytes
    prefill, decode = _sides(plan.prefill), _sides(plan.decode)
    prompt = request.prompt_len

    moved: list[int | None] = []
    at, done = Side.CLIENT, None
    for node, side, then in zip(model.nodes, prefill, decode, strict=True):
        if side is not at:
            rows = {NodeKind.EMBEDDING: prompt * _TOKEN_BYTES, NodeKind.HEAD: hidden}
            done = script.send(side, rows.get(node.kind, prompt * hidden), done)
        done = script.run(side, costs[side].prefill_s(node, prompt), done)
        moved.append(
            script.migrate(then, costs[side].kv_bytes(node, prompt), done)
            if then is not side and node.kv_width
            else None
        )
        at = side
    arrivals = [done]
    if at is Side.SERVER:
        arrivals = [script.send(Side.CLIENT, _TOKEN_BYTES, done)]
    for step in range(1, request.num_steps + 1):
        if decode[0] is Side.CLIENT:
            at, done = Side.CLIENT, arrivals[-1]
        for node, side, kept in zip(model.nodes, decode, moved, strict=True):
            if side is not at:
                token = node.kind is NodeKind.EMBEDDING
                done = script.send(side, _TOKEN_BYTES if token else hidden, done)
            done = script.run(side, costs[side].decode_s(node, prompt + step), done, kept)
            at = side
        arrivals.append(done if at is Side.CLIENT else script.send(Side.CLIENT, _TOKEN_BYTES, done))
    ends = script.play()
    return Trip(
        token_s=tuple(ends[task] for task in arrivals if task is not None),
        up_bytes=script.sent[Side.SERVER],
        down_bytes=script.sent[Side.CLIENT],
    )


def _sides(stretches: Sequence[Stretch]) -> list[Side]:
    return [one.side for one in stretches for _ in range(one.start, one.stop)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Task:
    """What keeps a resource busy, is over some time later, and waits for others."""

    resource: _Resource
    busy_s: float
    later_s: float
    needs: tuple[int, ...]


class _Script:
    """All that happens to a request; tasks are known by their numbers."""

    def __init__(
        self,
        costs: tuple[NodeCosts, NodeCosts],
        link: LinkProfile,
        weather: Callable[[Side], Weather],
    ) -> None:
        self._costs, self._link, self._weather = costs, link, weather
        self._tasks: list[_Task] = []
        self.sent = {Side.CLIENT: 0.0, Side.SERVER: 0.0}

    def run(self, side: Side, seconds: float, *needs: int | None) -> int:
        """A node on a machine."""
        resource = _Resource.SERVER if side is Side.SERVER else _Resource.CLIENT
        return self._add(resource, seconds, 0.0, needs)

    def send(self, to: Side, num_bytes: float, *needs: int | None) -> int:
        """A message."""
        weather = self._weather(to)
        busy_s = self._link.serialisation_s + num_bytes / weather.bytes_per_s
        self.sent[to] += num_bytes
        return self._add(_link_to(to), busy_s, weather.rtt_s / 2, needs)

    def migrate(self, to: Side, num_bytes: float, *needs: int | None) -> int:
        """A part of the stream of cached tokens, which is written while others travel."""
        weather = self._weather(to)
        later_s = self._link.serialisation_s + weather.rtt_s / 2
        self.sent[to] += num_bytes
        return self._add(_link_to(to), num_bytes / weather.bytes_per_s, later_s, needs)

    def play(self) -> list[float]:
        """When each task is over."""
        waits = [len(task.needs) for task in self._tasks]
        followers: list[list[int]] = [[] for _ in self._tasks]
        for number, task in enumerate(self._tasks):
            for need in task.needs:
                followers[need].append(number)
        ready = [(0.0, number) for number, count in enumerate(waits) if not count]
        heapq.heapify(ready)
        free_s = dict.fromkeys(_Resource, 0.0)
        since = [0.0] * len(self._tasks)
        ends = [0.0] * len(self._tasks)
        while ready:
            time_s, number = heapq.heappop(ready)
            task = self._tasks[number]
            free_s[task.resource] = max(time_s, free_s[task.resource]) + task.busy_s
            ends[number] = free_s[task.resource] + task.later_s
            for follower in followers[number]:
                since[follower] = max(since[follower], ends[number])
                waits[follower] -= 1
                if not waits[follower]:
                    heapq.heappush(ready, (since[follower], follower))
        return ends

    def _add(
        self, resource: _Resource, busy_s: float, later_s: float, needs: Sequence[int | None]
    ) -> int:
        known = tuple(need for need in needs if need is not None)
        self._tasks.append(_Task(resource=resource, busy_s=busy_s, later_s=later_s, needs=known))
        return len(self._tasks) - 1


def _link_to(side: Side) -> _Resource:
    return _Resource.UP if side is Side.SERVER else _Resource.DOWN
