"""Random legal plans: any split, any order that dependencies allow, pipelined over layers."""

import dataclasses
import random
from collections.abc import Mapping

from hypothesis import strategies as st

from nanoflow_jax.nanobatch import dependencies, operations
from nanoflow_jax.nanobatch.operations import Resource
from nanoflow_jax.nanobatch.plan import NanoOperation, Plan, TokenRange, cut_at, find_cells

SHAPES = tuple(
    operations.LayerShape(is_sparse=is_sparse, num_devices=n)
    for n in (1, 4)
    for is_sparse in (False, True)
)


@st.composite
def plans(
    draw: st.DrawFn,
    *,
    shapes: tuple[operations.LayerShape, ...] = SHAPES,
    num_tokens: int | None = None,
    max_cells: int = 4,
    ways: Mapping[str, str] | None = None,
) -> Plan:
    """Legal plans of small dense batches; `ways` says which way all tokens of a product take."""
    shape = draw(st.sampled_from(shapes))
    num_tokens = num_tokens or draw(st.integers(1, 24))
    granule = draw(st.integers(1, 3))
    inner = list(range(granule, num_tokens, granule))
    most = min(max_cells - 1, len(inner))
    borders = draw(st.lists(st.sampled_from(inner), max_size=most, unique=True)) if most else []
    chance = draw(st.randoms(use_true_random=False))
    graph = operations.layer_graph(shape)
    split = _split_all(graph, sorted(borders), num_tokens, chance, ways or {})
    cells = find_cells([nano.tokens for nano in split], num_tokens=num_tokens)
    weights = draw(
        st.lists(st.integers(0, 5), min_size=len(cells), max_size=len(cells)).filter(any)
    )
    plan = Plan(
        name="random",
        shape=shape,
        num_tokens=num_tokens,
        granule=granule,
        num_sms=132,
        decode_weights=tuple(weights),
        order=tuple(split),
    )
    order = _pipelined(plan, _shuffled(plan, chance), chance)
    return _with(plan, _in_lanes(_with(plan, order), chance))


def _with(plan: Plan, order: list[NanoOperation]) -> Plan:

    return dataclasses.replace(plan, order=tuple(order))


def _some(borders: list[int], chance: random.Random) -> list[int]:
    return [border for border in borders if chance.random() < 0.6]


def _split_all(
    graph: operations.LayerGraph,
    borders: list[int],
    num_tokens: int,
    chance: random.Random,
    given: Mapping[str, str],
) -> list[NanoOperation]:
    def cut(within: TokenRange) -> tuple[TokenRange, ...]:
        some = [b for b in _some(borders, chance) if within.start < b < within.stop]
        return cut_at([within.start, *some, within.stop])

    whole = TokenRange(0, num_tokens)
    grouped = cut(whole)
    found: dict[str, tuple[TokenRange, ...]] = {}
    for product, ways in graph.choices.items():
        for part in cut(whole):
            way = given.get(product) or chance.choice(sorted(ways))
            for op in graph.choices[product][way]:
                found[op.name] = (*found.get(op.name, ()), *cut(part))
    for op in graph.operations:
        values = (*op.reads, op.writes)
        if any(value.rows is operations.Rows.GROUPED for value in values):
            found[op.name] = grouped
        elif op.choice is None:
            found[op.name] = cut(whole)
    return [NanoOperation(operation=name, tokens=r) for name, rs in found.items() for r in rs]


def _links(plan: Plan) -> set[tuple[int, int, int]]:
    """(writer, reader, layers from one to the other) of an unordered plan, by place."""
    pairs = dependencies.value_dependencies(plan, [plan.graph] * 2)
    return {(a.place, b.place, b.layer - a.layer) for a, b in pairs}


def _shuffled(plan: Plan, chance: random.Random) -> list[int]:
    """Any order of one layer in which writers come before readers."""
    links = [(a, b) for a, b, distance in _links(plan) if distance == 0]
    left, order = set(range(len(plan.order))), []
    while left:
        free = sorted(i for i in left if not any(b == i and a in left for a, b in links))
        order.append(chance.choice(free))
        left.remove(order[-1])
    return order


def _pipelined(plan: Plan, order: list[int], chance: random.Random) -> list[NanoOperation]:
    """Moves parts of a turn to the turn before, then swaps neighbours that may be swapped."""
    links, turn = _links(plan), [(place, 0) for place in order]
    for _ in range(chance.randrange(3)):
        moved = chance.randrange(len(turn))
        turn = turn[moved:] + [(place, shift + 1) for place, shift in turn[:moved]]
        for _ in range(3 * len(turn)):
            i = chance.randrange(len(turn))
            if i + 1 < len(turn):
                (a, shift_a), (b, shift_b) = turn[i : i + 2]
                if (a, b, shift_b - shift_a) not in links:
                    turn[i : i + 2] = turn[i + 1], turn[i]
    least = min(shift for _, shift in turn)
    return [
        NanoOperation(
            operation=plan.order[place].operation,
            tokens=plan.order[place].tokens,
            shift=shift - least,
        )
        for place, shift in turn
    ]


def _in_lanes(plan: Plan, chance: random.Random) -> list[NanoOperation]:
    """Lanes by operation, with caps that fit together, and some more to wait for."""
    low, high = sorted(chance.sample(range(1, plan.num_sms), 2))
    caps = dict(zip(Resource, (low, high - low, plan.num_sms - high), strict=True))
    lanes = {name: chance.choice([None, *Resource]) for name in plan.graph.by_name}
    order = []
    for nano in plan.order:
        lane = lanes[nano.operation]
        order.append(
            NanoOperation(
                operation=nano.operation,
                tokens=nano.tokens,
                shift=nano.shift,
                lane=lane,
                num_ctas=None if lane is None else chance.randint(1, caps[lane]),
                after=(chance.choice(plan.keys),) if chance.random() < 0.1 else (),
            )
        )
    return order
