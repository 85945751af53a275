"""What each launch of a program waits for: graphs one after another, and what runs beside them."""

import dataclasses
from collections.abc import Iterable

from nanoflow_jax.deviceless.program import Graph, Launch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Begin:
    """From here on launches run on another stream, one after another.

    Attributes:
        number: Tells which `End` belongs to it.
        stream: XLA's name.
        launches: In order.
    """

    number: int
    stream: str
    launches: tuple[Launch, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class End:
    """Here the main stream waits for the launches of `Begin`."""

    number: int


def join(items: Iterable[Graph | Launch | Begin | End]) -> Graph:
    """The order of a whole program.

    The main stream runs launches and graphs one after another. Another stream begins when what the
    main stream had then been given has ended, and after what it was given itself.

    Args:
        items: In the order in which the host comes to them.
    """
    nodes: list[Launch] = []
    parents: list[tuple[int, ...]] = []
    main: tuple[int, ...] = ()  # what the next launch of the main stream waits for
    last: dict[str, int] = {}
    begun: dict[int, int] = {}
    left_out = 0

    def add(launch: Launch, after: Iterable[int]) -> int:
        nodes.append(launch)
        parents.append(tuple(dict.fromkeys(after)))
        return len(nodes) - 1

    for item in items:
        if isinstance(item, Launch):
            main = (add(item, main),)
        elif isinstance(item, Begin):
            after = main
            for launch in item.launches:
                own = (last[item.stream],) if item.stream in last else ()
                last[item.stream] = begun[item.number] = add(launch, (*after, *own))
                after = ()
        elif isinstance(item, End):
            main = (*main, begun[item.number])
        else:
            first = len(nodes)
            for launch, before in zip(item.nodes, item.parents, strict=True):
                add(launch, [first + i for i in before] or main)
            left_out += item.num_nodes - len(item.nodes)
            inner = {parent for before in parents[first:] for parent in before}
            main = tuple(i for i in range(first, len(nodes)) if i not in inner) or main
    return Graph(nodes=tuple(nodes), parents=tuple(parents), num_nodes=len(nodes) + left_out)
