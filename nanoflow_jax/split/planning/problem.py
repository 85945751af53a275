"""A request's placement as numbers: what each unit takes on each side, and what crossings take.

A unit is one node, or all nodes between two places where the machine may change. Times are whole
picoseconds, rounded up, and deadlines are rounded down, so that sums are exact and a placement that
fits here fits.

    TTFT = prefill of all units + crossings from the client + delivery if a head is on the server
    TPOT = a decode step of all units + crossings, where the token returns from head to embedding
    E2E  = TTFT + (tokens - 1) TPOT
"""

import dataclasses
import math
from collections.abc import Sequence

from nanoflow_jax.cost.node_work import Node, NodeKind
from nanoflow_jax.split.planning import places
from nanoflow_jax.split.planning.asked import Policy, Request, Side
from nanoflow_jax.split.planning.costs import Accounting, Model, NodeCosts
from nanoflow_jax.split.planning.profiles import DeviceProfile, LinkProfile

PER_SECOND = 10**12
_TOKEN_BYTES = 4
_GIGA = 1e9

Pair = tuple[int, int]  # of the client, of the server; or to the client, to the server


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
    """What is placed as a whole. Times in picoseconds; pairs are by `Side`.

    Attributes:
        start: Its first node.
        stop: The node after its last.
        allowed: Where it may run.
        prefill: The prompt, on either side.
        decode: A step, at the longest context.
        prefill_charge: Of the prompt on the server.
        decode_charge: Of all steps of an average output on the server, cached tokens included
            where they are charged.
        enter_prefill: For its input to come to a side from the other.
        enter_decode: The same of one step.
        migrate: For the prompt's cached tokens to come to a side, without the link's latency.
        memory: Bytes on the client.
    """

    start: int
    stop: int
    allowed: frozenset[Side]
    prefill: Pair
    decode: Pair
    prefill_charge: int
    decode_charge: int
    enter_prefill: Pair
    enter_decode: Pair
    migrate: Pair
    memory: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Most of each, in picoseconds and bytes; None is no limit."""

    ttft: int | None
    tpot: int | None
    e2e: int | None
    memory: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A chain of units to place.

    Attributes:
        units: In the order in which a token meets them.
        num_steps: Decode steps that deadlines count with.
        deliver: Of a token from a head on the server, in picoseconds: once, for later tokens travel
            while the next is made.
        latency: One way, paid once where cached tokens migrate.
        limits: What placements must keep.
        migrates: Whether prefill and decode may be placed differently.
    """

    units: tuple[Unit, ...]
    num_steps: int
    deliver: int
    latency: int
    limits: Limits
    migrates: bool = False


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where each unit prefills and decodes."""

    prefill: tuple[Side, ...]
    decode: tuple[Side, ...]

    @property
    def migrates(self) -> bool:
        return self.prefill != self.decode


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a placement comes to; picoseconds, and bytes of memory on the client."""

    ttft: int
    tpot: int
    e2e: int
    charge: int
    crossings: int
    server_units: int
    memory: int

    def meets(self, limits: Limits) -> bool:
        return (
            (limits.ttft is None or self.ttft <= limits.ttft)
            and (limits.tpot is None or self.tpot <= limits.tpot)
            and (limits.e2e is None or self.e2e <= limits.e2e)
            and self.memory <= limits.memory
        )

    @property
    def rank(self) -> tuple[int, int, int]:
        """The least is best: charge, then crossings, then units on the server."""
        return self.charge, self.crossings, self.server_units


def outcome(problem: Problem, placement: Placement) -> Outcome:
    """What a placement comes to, added up unit by unit."""
    ttft = problem.latency if placement.migrates else 0
    tpot = charge = crossings = memory = 0
    before, came_from = Side.CLIENT, placement.decode[-1]
    for unit, at, then in zip(problem.units, placement.prefill, placement.decode, strict=True):
        ttft += unit.prefill[at]
        tpot += unit.decode[then]
        if at is not before:
            ttft += unit.enter_prefill[at]
        if then is not came_from:
            tpot += unit.enter_decode[then]
        crossings += (at is not before) + (then is not came_from)
        if at is not then:
            ttft += unit.migrate[then]
        charge += (unit.prefill_charge if at else 0) + (unit.decode_charge if then else 0)
        memory += unit.memory if Side.CLIENT in (at, then) else 0
        before, came_from = at, then
    if Side.SERVER in (before, came_from):
        ttft += problem.deliver
    return Outcome(
        ttft=ttft,
        tpot=tpot,
        e2e=ttft + problem.num_steps * tpot,
        charge=charge,
        crossings=crossings,
        server_units=sum(placement.prefill) + sum(placement.decode),
        memory=memory,
    )


@dataclasses.dataclass(frozen=True)
class Network:
    """Seconds that messages take, as deadlines count them or as they are on average."""

    link: LinkProfile
    is_careful: bool = True

    @property
    def latency_s(self) -> float:
        """One way, without the message's bytes."""
        rtt_s = self.link.rtt_p95_s if self.is_careful else self.link.rtt_p50_s
        return rtt_s / 2 + self.link.serialisation_s

    def bytes_s(self, num_bytes: float, to: Side) -> float:
        """What the bytes of a message add."""
        link = self.link
        if to is Side.SERVER:
            rate = link.up_p10_bytes_per_s if self.is_careful else link.up_bytes_per_s
        else:
            rate = link.down_p10_bytes_per_s if self.is_careful else link.down_bytes_per_s
        return num_bytes / rate

    def message_s(self, num_bytes: float, to: Side) -> float:
        return self.latency_s + self.bytes_s(num_bytes, to)


def build(
    model: Model,
    client: DeviceProfile,
    server: DeviceProfile,
    link: LinkProfile,
    request: Request,
    policy: Policy,
    *,
    is_careful: bool = True,
) -> Problem:
    """The problem of placing a request.

    Args:
        model: Whose nodes.
        client: One machine.
        server: The other.
        link: Between them.
        request: With its deadlines.
        policy: What placements may look like.
        is_careful: Count messages as deadlines do; else as they are on average.

    Raises:
        ValueError: The policy contradicts itself or the model, or a profile lacks what is needed.
    """
    return _Builder(model, client, server, Network(link, is_careful), request, policy).problem()


class _Builder:
    def __init__(
        self,
        model: Model,
        client: DeviceProfile,
        server: DeviceProfile,
        network: Network,
        request: Request,
        policy: Policy,
    ) -> None:
        self._model, self._network = model, network
        self._request, self._policy = request, policy
        self._costs = (NodeCosts(model, client), NodeCosts(model, server))
        self._charged = self._costs[Side.SERVER]
        self._hidden = model.config.hidden_size * policy.activation_bytes
        self._residence_s = _residence_s(request, policy)

    def problem(self) -> Problem:
        request, policy = self._request, self._policy
        most = request.prompt_len + request.most_output
        if most > self._model.config.max_context_len:
            raise ValueError(
                f"{request.prompt_len} tokens in and {request.most_output} out are more than the "
                f"{self._model.config.max_context_len} that {self._model.name} sees; ask for fewer"
            )
        allowed = places.allowed(self._model, policy)
        self._check_server(allowed)
        units = tuple(
            self._unit(start, stop, places.common(self._model, allowed, start, stop, policy))
            for start, stop in places.spans(self._model, policy)
        )
        keep = policy.guard
        return Problem(
            units=units,
            num_steps=request.num_steps,
            deliver=_up(self._network.message_s(_TOKEN_BYTES, Side.CLIENT)),
            latency=_up(self._network.latency_s),
            limits=Limits(
                ttft=_down(request.ttft_s, keep),
                tpot=_down(request.tpot_s, keep) if request.num_steps else None,
                e2e=_down(request.e2e_s, keep),
                memory=int(self._costs[Side.CLIENT].device.memory_bytes),
            ),
            migrates=policy.migrates,
        )

    def _check_server(self, allowed: Sequence[frozenset[Side]]) -> None:
        """It holds the weights of all that it may run, for all requests together."""
        pairs = zip(self._model.nodes, allowed, strict=True)
        held = sum(self._charged.weight_bytes(n) for n, sides in pairs if Side.SERVER in sides)
        room = self._charged.device.memory_bytes
        if held > room:
            raise ValueError(
                f"the server's {room / 1e9:g} GB do not hold {held / 1e9:,.1f} GB of weights of "
                f"{self._model.name}; describe more devices, or leave it fewer layers"
            )

    def _unit(self, start: int, stop: int, allowed: frozenset[Side]) -> Unit:
        nodes = self._model.nodes[start:stop]
        request = self._request
        longest = request.prompt_len + request.num_steps
        held = request.prompt_len + request.most_output
        client = self._costs[Side.CLIENT]

        def both(seconds: str, tokens: int) -> Pair:
            on = [
                sum(_up(getattr(c, seconds)(node, tokens)) for node in nodes) for c in self._costs
            ]
            return on[0], on[1]

        prefill_input, decode_input = self._input_bytes(nodes[0])
        return Unit(
            start=start,
            stop=stop,
            allowed=allowed,
            prefill=both("prefill_s", request.prompt_len),
            decode=both("decode_s", longest),
            prefill_charge=sum(map(self._prefill_charge, nodes)),
            decode_charge=sum(map(self._decode_charge, nodes)),
            enter_prefill=self._messages(prefill_input),
            enter_decode=self._messages(decode_input),
            migrate=self._migration(nodes),
            memory=math.ceil(
                sum(client.weight_bytes(node) + client.kv_bytes(node, held) for node in nodes)
            ),
        )

    def _input_bytes(self, node: Node) -> tuple[float, float]:
        """Of the prompt and of one step, entering a node."""
        if node.kind is NodeKind.EMBEDDING:
            return self._request.prompt_len * _TOKEN_BYTES, _TOKEN_BYTES
        if node.kind is NodeKind.HEAD:
            return self._hidden, self._hidden
        return self._request.prompt_len * self._hidden, self._hidden

    def _messages(self, num_bytes: float) -> Pair:
        to_client, to_server = (_up(self._network.message_s(num_bytes, side)) for side in Side)
        return to_client, to_server

    def _migration(self, nodes: Sequence[Node]) -> Pair:
        """Cached tokens leave as the machine that made them keeps them; so does a drawn token."""
        made = [
            sum(c.kv_bytes(node, self._request.prompt_len) for node in nodes) for c in self._costs
        ]
        drawn = _TOKEN_BYTES if nodes[-1].kind is NodeKind.HEAD else 0
        return (
            _up(self._network.bytes_s(made[Side.SERVER], Side.CLIENT)),
            _up(self._network.bytes_s(made[Side.CLIENT] + drawn, Side.SERVER)),
        )

    def _prefill_charge(self, node: Node) -> int:
        accounting = self._policy.accounting
        charge = self._charged.prefill_charge_s(node, self._request.prompt_len, accounting)
        return round(charge * self._price() * PER_SECOND)

    def _decode_charge(self, node: Node) -> int:
        request, accounting = self._request, self._policy.accounting
        steps = request.output_len - 1
        context_len = request.prompt_len + steps / 2
        charge = steps * self._charged.decode_charge_s(node, context_len, accounting)
        charge *= self._price()
        if accounting is Accounting.PRICED:
            held = self._charged.kv_bytes(node, context_len) / _GIGA
            charge += held * self._residence_s * self._policy.prices.gigabyte_second
        return round(charge * PER_SECOND)

    def _price(self) -> float:
        priced = self._policy.accounting is Accounting.PRICED
        return self._policy.prices.second if priced else 1.0


def _residence_s(request: Request, policy: Policy) -> float:
    """How long cached tokens are charged: as long as the request may last."""
    if policy.accounting is not Accounting.PRICED:
        return 0.0
    if request.longest_s is None:
        raise ValueError(
            "priced accounting charges memory for as long as a request may last; give an "
            "end-to-end deadline, or one for the first token and one between tokens"
        )
    return request.longest_s


def _up(seconds: float) -> int:
    return math.ceil(seconds * PER_SECOND)


def _down(seconds: float | None, guard: float) -> int | None:
    return None if seconds is None else math.floor(seconds * guard * PER_SECOND)
