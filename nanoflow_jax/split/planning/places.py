"""Where nodes of a model may run, and which of them are placed together."""

from collections.abc import Sequence

from nanoflow_jax.cost.node_work import Node, NodeKind
from nanoflow_jax.split.planning.asked import Policy, Side
from nanoflow_jax.split.planning.costs import Model

_BOTH = frozenset(Side)


def spans(model: Model, policy: Policy) -> list[tuple[int, int]]:
    """Nodes [start, stop) of each unit.

    Raises:
        ValueError: A border is none of the model's.
    """
    num_nodes, num_layers = len(model.nodes), model.config.num_layers
    if policy.borders is not None:
        layers: Sequence[int] = sorted({0, *policy.borders} - {num_layers})
        if not 0 <= layers[0] <= layers[-1] < num_layers:
            raise ValueError(
                f"borders {list(policy.borders)} are not all within 0 to {num_layers}, the layers "
                f"of {model.name}"
            )
    elif policy.grid:
        layers = range(0, num_layers, policy.grid)
    else:
        return [(node, node + 1) for node in range(num_nodes)]
    starts = [0 if layer == 0 else 1 + 2 * layer for layer in layers]
    return list(zip(starts, [*starts[1:], num_nodes], strict=True))


def allowed(model: Model, policy: Policy) -> list[frozenset[Side]]:
    """Where each node may run, for what the client has and what is pinned.

    Raises:
        ValueError: A node may run nowhere, or layers are named that the model does not have.
    """
    num_layers = model.config.num_layers
    if policy.pinned_first + policy.pinned_last > num_layers:
        raise ValueError(
            f"{policy.pinned_first} first and {policy.pinned_last} last layers are pinned to the "
            f"client, but {model.name} has {num_layers}"
        )
    held = _held(model, policy)
    found = [_BOTH if has else frozenset({Side.SERVER}) for has in held]
    last = num_layers - policy.pinned_last
    for index, node in enumerate(model.nodes):
        pins = set()
        if _is_pinned(node, policy, last):
            pins.add(Side.CLIENT)
        if node.kind is NodeKind.EMBEDDING and policy.embedding is not None:
            pins.add(policy.embedding)
        if node.kind is NodeKind.HEAD and policy.head is not None:
            pins.add(policy.head)
        for pin in pins:
            found[index] &= {pin}
        if not found[index]:
            raise ValueError(
                f"{node.name} may run nowhere: it is pinned to both sides, or to a client that "
                "does not have it; change what is pinned or what the client holds"
            )
    return found


def _is_pinned(node: Node, policy: Policy, last: int) -> bool:
    if node.layer is None:
        first = node.kind is NodeKind.EMBEDDING
        return bool(policy.pinned_first if first else policy.pinned_last)
    return node.layer < policy.pinned_first or node.layer >= last


def _held(model: Model, policy: Policy) -> list[bool]:
    """Whether the client has each node."""
    num_layers = model.config.num_layers
    if policy.held_layers is None:
        return [True] * len(model.nodes)
    layers: set[int] = set()
    for start, stop in policy.held_layers:
        if not 0 <= start < stop <= num_layers:
            raise ValueError(
                f"the client cannot hold layers {start}:{stop} of {model.name}, which has "
                f"{num_layers}; give START:STOP within them"
            )
        layers.update(range(start, stop))
    ends = {NodeKind.EMBEDDING: 0, NodeKind.HEAD: num_layers - 1}
    return [(ends[n.kind] if n.layer is None else n.layer) in layers for n in model.nodes]


def common(
    model: Model, allowed: Sequence[frozenset[Side]], start: int, stop: int, policy: Policy
) -> frozenset[Side]:
    """Where all nodes [start, stop) of a unit may run.

    Raises:
        ValueError: Nowhere.
    """
    found = frozenset.intersection(*allowed[start:stop])
    if not found:
        raise ValueError(
            f"{model.nodes[start].name} to {model.nodes[stop - 1].name} are placed together by "
            f"{_grid(policy)}, but some must run on the client and some on the server; take a "
            "finer grid"
        )
    return found


def _grid(policy: Policy) -> str:
    if policy.borders is None:
        return f"grid={policy.grid}"
    return f"borders before layers {', '.join(map(str, policy.borders))}"
