"""In which order the nano-operations of all layers are issued."""

from collections.abc import Sequence
from typing import NamedTuple

from nanoflow_jax.nanobatch import operations
from nanoflow_jax.nanobatch.plan import Plan


class Node(NamedTuple):
    """One nano-operation of one layer."""

    layer: int
    place: int  # in the plan's order


def issue_order(plan: Plan, layers: Sequence[operations.LayerGraph]) -> tuple[Node, ...]:
    """All nano-operations of a model in order of issue.

    The first turns lack what would belong to layers before the first, the last turns what would
    belong to layers after the last. What a layer does not have is left out: dense layers of a
    sparse model do not route.

    Args:
        plan: What to run in each turn.
        layers: The graph of each layer.
    """
    return tuple(
        Node(turn + nano.shift, place)
        for turn in range(-plan.max_shift, len(layers))
        for place, nano in enumerate(plan.order)
        if 0 <= turn + nano.shift < len(layers)
        and nano.operation in layers[turn + nano.shift].by_name
    )
