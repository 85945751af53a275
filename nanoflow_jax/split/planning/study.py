"""What planning is worth over many requests, and where it is worth a third of the server's time.

Requests are made up: their lengths, clients and links are drawn, and their deadlines are so many
times what the server alone would take. All ways to place them keep the same deadlines.
"""

import dataclasses
import random
from collections.abc import Mapping, Sequence

from nanoflow_jax.split.planning import baselines, capacity, planner, search
from nanoflow_jax.split.planning import problem as problems
from nanoflow_jax.split.planning.asked import Policy, Prices, Request, Side
from nanoflow_jax.split.planning.capacity import Offer
from nanoflow_jax.split.planning.costs import Accounting, Model
from nanoflow_jax.split.planning.planner import VerdictKind
from nanoflow_jax.split.planning.problem import PER_SECOND, Placement, Problem
from nanoflow_jax.split.planning.profiles import DeviceProfile, LinkProfile

PROMPT_LENS = (64, 256, 1024, 2048)
OUTPUT_LENS = (16, 64, 256)
# Beside their share of the server's own times, so that a short time is not all too short.
MORE_TTFT_S, MORE_TPOT_S = 0.1, 0.02


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What requests are like.

    Attributes:
        server: What serves.
        clients: Classes of clients, each as likely.
        links: The same of links.
        slack: Deadlines are between so many and so many times what the server alone takes.
        has_two: A deadline of the first token and one of each further, each with a little more;
            else one of the whole answer.
        migrates: Decode may be placed otherwise than prefill.
        output_lens: Tokens that are generated, each as likely.
    """

    server: DeviceProfile
    clients: Sequence[DeviceProfile]
    links: Sequence[LinkProfile]
    slack: tuple[float, float]
    has_two: bool = False
    migrates: bool = False
    output_lens: Sequence[int] = OUTPUT_LENS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gains:
    """What came of a setting.

    Attributes:
        load: Charge of the planned over that of all on the server.
        throughput: Requests a second over those with all on the server.
        below: By how much of each greedy way's charge the planned is below it; `best` is the
            least charge of the four for each request.
        verdicts: Share of requests.
    """

    load: float
    throughput: float
    below: Mapping[str, float]
    verdicts: Mapping[VerdictKind, float]


def policy(
    accounting: Accounting, server: DeviceProfile, model: Model, *, migrates: bool = False
) -> Policy:
    """Deadlines to the full, and prices by which all memory left is as dear as all time."""
    weights = sum(node.parameters for node in model.nodes) * server.weight_bits / 8
    left = max(1e9, server.memory_bytes - weights)
    return Policy(
        accounting=accounting,
        prices=Prices(second=1.0, gigabyte_second=1e9 / left),
        guard=1.0,
        migrates=migrates,
    )


def gains(
    model: Model, setting: Setting, accounting: Accounting, *, num_requests: int, seed: int
) -> Gains:
    """Plans requests of a setting in every way.

    Args:
        model: Whose layers.
        setting: What requests are like.
        accounting: What they are charged.
        num_requests: How many.
        seed: The same gives the same requests, whatever the accounting.
    """
    draw = random.Random(seed)
    asked = policy(accounting, setting.server, model, migrates=setting.migrates)
    charges: dict[str, list[int]] = {name: [] for name in ("alone", "planned", *baselines.GREEDY)}
    kinds: list[VerdictKind] = []
    for _ in range(num_requests):
        client, link = draw.choice(setting.clients), draw.choice(setting.links)
        request = Request(
            prompt_len=draw.choice(PROMPT_LENS), output_len=draw.choice(setting.output_lens)
        )
        ends = (model, client, setting.server, link)
        slack = draw.uniform(*setting.slack)
        timed = with_deadlines(ends, request, slack, has_two=setting.has_two)
        problem = problems.build(*ends, timed, asked)
        placed = planned(problem, asked)
        kinds.append(planner.kind_of(placed))
        ways = {"alone": baselines.all_on(problem, Side.SERVER), "planned": placed}
        ways |= {name: way(problem) or ways["alone"] for name, way in baselines.GREEDY.items()}
        for name, one in ways.items():
            charges[name].append(problems.outcome(problem, one).charge)
    return _gains(charges, kinds)


def planned(problem: Problem, asked: Policy) -> Placement:
    """The cheapest: there is one where deadlines are longer than what the server alone takes."""
    placed = search.cheapest(problem, max_labels=asked.max_labels)
    assert placed is not None
    return placed


def _gains(charges: Mapping[str, Sequence[int]], kinds: Sequence[VerdictKind]) -> Gains:
    greedy = {name: charges[name] for name in baselines.GREEDY}
    greedy["best"] = [min(some) for some in zip(*greedy.values(), strict=True)]
    sums = {name: sum(some) for name, some in {**charges, **greedy}.items()}
    with_plans, alone = (
        capacity.throughput([Offer(share=1, charge_s=one / PER_SECOND) for one in charges[name]])
        for name in ("planned", "alone")
    )
    return Gains(
        load=sums["planned"] / sums["alone"],
        throughput=with_plans / alone,
        below={name: 1 - sums["planned"] / sums[name] if sums[name] else 0.0 for name in greedy},
        verdicts={kind: kinds.count(kind) / len(kinds) for kind in VerdictKind},
    )


def with_deadlines(
    ends: tuple[Model, DeviceProfile, DeviceProfile, LinkProfile],
    request: Request,
    slack: float,
    *,
    has_two: bool,
) -> Request:
    """A request whose deadlines are so many times what the server alone takes."""
    problem = problems.build(*ends, request, Policy(guard=1.0))
    alone = planner.as_plan(problem, baselines.all_on(problem, Side.SERVER))
    if not has_two:
        return dataclasses.replace(request, e2e_s=slack * alone.e2e_s)
    return dataclasses.replace(
        request,
        ttft_s=slack * alone.ttft_s + MORE_TTFT_S,
        tpot_s=slack * alone.tpot_s + MORE_TPOT_S,
    )


# Client speeds that are tried, as factors; each is a third to a half more than the one before.
SPEEDS = tuple(2 ** (half / 2) for half in range(-4, 13))
REGION_REQUESTS = tuple(
    Request(prompt_len=prompt, output_len=out)
    for prompt, out in ((64, 256), (256, 128), (1024, 128), (2048, 64))
)


def least_speed(
    model: Model,
    client: DeviceProfile,
    server: DeviceProfile,
    link: LinkProfile,
    accounting: Accounting,
    *,
    slack: float,
    has_two: bool,
    saved: float,
) -> float | None:
    """The least factor on a client's speed with which some of the server's time is saved.

    A faster client never costs more, so that the speeds are searched by halving.

    Args:
        model: Whose layers.
        client: As fast as 1.
        server: What serves.
        link: Between them.
        accounting: What requests are charged.
        slack: Times what the server alone takes.
        has_two: Whether deadlines are of tokens or of the whole answer.
        saved: The share of the server's charge to save over `REGION_REQUESTS`.

    Returns:
        None if the fastest does not save it.
    """
    asked = policy(accounting, server, model)
    low, high = 0, len(SPEEDS)
    while low < high:
        middle = (low + high) // 2
        ends = (model, client.scaled(SPEEDS[middle]), server, link)
        if _saved(ends, asked, slack=slack, has_two=has_two) >= saved:
            high = middle
        else:
            low = middle + 1
    return SPEEDS[low] if low < len(SPEEDS) else None


def _saved(
    ends: tuple[Model, DeviceProfile, DeviceProfile, LinkProfile],
    asked: Policy,
    *,
    slack: float,
    has_two: bool,
) -> float:
    charge = alone = 0
    for request in REGION_REQUESTS:
        timed = with_deadlines(ends, request, slack, has_two=has_two)
        problem = problems.build(*ends, timed, asked)
        charge += problems.outcome(problem, planned(problem, asked)).charge
        alone += problems.outcome(problem, baselines.all_on(problem, Side.SERVER)).charge
    return 1 - charge / alone
