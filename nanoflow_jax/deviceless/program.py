"""What is known of a program that was compiled for a GPU: kernels, CUDA graphs, copies, memory."""

import dataclasses
import functools
import json
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel, as ptxas made it.

    Attributes:
        name: Of its function.
        is_mosaic: Whether it is ours, or else XLA's.
        registers: Of each thread.
        spill_bytes: Stored and loaded again for want of registers.
        shared_bytes: Shared memory of a CTA.
        grid: CTAs along each axis.
        num_threads: Of a CTA.
        ptx: Its program.
    """

    name: str
    is_mosaic: bool
    registers: int
    spill_bytes: int
    shared_bytes: int
    grid: tuple[int, int, int]
    num_threads: int
    ptx: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """One thing that the program starts on the device.

    Attributes:
        name: Of the instruction in the optimised HLO.
        kind: XLA's word for it: kCustomKernel, kCustomCall, kCopy, kCublasLtMatmul...
        scope: Path of the named scopes and the operation that it stems from; empty if unknown.
        kernel: Function that it runs if it is a kernel, of XLA's or ours; equal ones share one.
    """

    name: str
    kind: str
    scope: str
    kernel: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Graph:
    """What may run at once: of a CUDA graph, or of a program.

    Of a CUDA graph it is as much of the beginning as the compiler tells of: some hundred nodes.

    Attributes:
        nodes: In an order in which they could run; none waits for one that is left out.
        num_nodes: Those left out too.
        parents: Of each node, the nodes that must have ended before; edges implied by others may
            be left out.
    """

    nodes: tuple[Launch, ...]
    parents: tuple[tuple[int, ...], ...]
    num_nodes: int

    @property
    def num_edges(self) -> int:
        """Edges of the graph."""
        return sum(map(len, self.parents))

    @functools.cached_property
    def critical_path(self) -> int:
        """Nodes on the longest path; all of them in a chain."""
        depths: list[int] = []
        for parents in self.parents:
            depths.append(1 + max((depths[parent] for parent in parents), default=0))
        return max(depths, default=0)

    @functools.cached_property
    def _ancestors(self) -> tuple[frozenset[int], ...]:
        found: list[frozenset[int]] = []
        for parents in self.parents:
            found.append(frozenset(parents).union(*(found[parent] for parent in parents)))
        return tuple(found)

    def are_ordered(self, one: int, other: int) -> bool:
        """Whether one of two nodes, by index, must end before the other begins."""
        return one in self._ancestors[other] or other in self._ancestors[one]

    def find(self, scope: str) -> list[int]:
        """Indices of the nodes whose scope contains a text."""
        return [index for index, node in enumerate(self.nodes) if scope in node.scope]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instruction:
    """One instruction of the optimised HLO's entry.

    Attributes:
        name: Without %.
        opcode: Such as fusion, copy, custom-call.
        shape: Of its result, as HLO writes it, without layout.
        num_bytes: Of its result.
        operands: Names of what it reads.
        scope: See `Launch`.
        kernel: What tells the Mosaic kernel that it calls from others; None if it calls none.
    """

    name: str
    opcode: str
    shape: str
    num_bytes: int
    operands: tuple[str, ...]
    scope: str
    kernel: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on each device.

    Attributes:
        argument_bytes: Of all arguments.
        output_bytes: Of all results.
        alias_bytes: Of results that lie where a donated argument lay.
        temp_bytes: What the program needs beside them.
    """

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A program compiled for a GPU.

    Attributes:
        hlo: Optimised HLO.
        instructions: Of its entry, in the order of the schedule.
        kernels: One per function: those of XLA's, then ours in the order in which they first run.
        launches: All that is started, in order, graphs' nodes included.
        graphs: CUDA graphs, in order.
        order: All of it: graphs one after another, and what runs on other streams beside them.
        memory: What it takes.
    """

    hlo: str
    instructions: tuple[Instruction, ...]
    kernels: tuple[Kernel, ...]
    launches: tuple[Launch, ...]
    graphs: tuple[Graph, ...]
    order: Graph
    memory: Memory

    @property
    def mosaic_kernels(self) -> tuple[Kernel, ...]:
        """Those that we wrote."""
        return tuple(kernel for kernel in self.kernels if kernel.is_mosaic)

    @property
    def copies(self) -> tuple[Instruction, ...]:
        """Instructions of the entry that only copy an array."""
        return tuple(one for one in self.instructions if one.opcode in ("copy", "copy-start"))

    def kernel(self, name: str) -> Kernel:
        """The kernel of that name.

        Raises:
            KeyError: There is none.
        """
        return self._by_name[name]

    @functools.cached_property
    def _by_name(self) -> dict[str, Kernel]:
        return {one.name: one for one in self.kernels}

    def to_json(self) -> str:
        """All of it, for `from_json`."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Program":
        """What `to_json` wrote."""
        fields = json.loads(text)
        return cls(
            hlo=fields["hlo"],
            instructions=tuple(_made(Instruction, one) for one in fields["instructions"]),
            kernels=tuple(_made(Kernel, one) for one in fields["kernels"]),
            launches=tuple(_made(Launch, one) for one in fields["launches"]),
            graphs=tuple(map(_graph, fields["graphs"])),
            order=_graph(fields["order"]),
            memory=Memory(**fields["memory"]),
        )


def _graph(fields: dict[str, Any]) -> Graph:
    return Graph(
        nodes=tuple(_made(Launch, one) for one in fields["nodes"]),
        parents=tuple(map(tuple, fields["parents"])),
        num_nodes=fields["num_nodes"],
    )


def _made(kind: type[Any], fields: dict[str, Any]) -> Any:
    """An object from fields of JSON, which knows lists where it has tuples."""
    return kind(
        **{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in fields.items()
        }
    )
