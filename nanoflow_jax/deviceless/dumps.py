"""Reads what XLA, Mosaic and ptxas leave behind when they compile."""

import dataclasses
import itertools
import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from nanoflow_jax.deviceless import hlo, launch_order
from nanoflow_jax.deviceless.program import (
    Graph,
    Instruction,
    Kernel,
    Launch,
    Memory,
    Program,
)

_THUNK = re.compile(r"^(?P<indent> *)(?P<id>\d+): (?P<kind>k\w+) *\[.*?\] ?(?P<rest>.*)$", re.M)
_SHAPE = re.compile(
    r"^(\S+) grid: \[(\d+), (\d+), (\d+)\] threads: \[(\d+), (\d+), (\d+)\] +"
    r"shared_memory: (\d+) bytes"
)
_NAME = re.compile(r'profile_annotation: "([^"]*)"\s+thunk_id: (\d+)')
_PTXAS = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?\n.*?Function properties.*?\n"
    r".*?(?P<stored>\d+) bytes spill stores, (?P<loaded>\d+) bytes spill loads\n"
    r".*?Used (?P<registers>\d+) registers(?:.*?, (?P<shared>\d+) bytes smem)?"
)
_GRAPH = re.compile(r"Execution graph: .*\n((?:node .*\n)*)")
_NODE = re.compile(r"node (\d+) \(priority=\d+\): in=\[(.*?)\] out=\[")
# A message is cut off after 15000 bytes (absl, log/internal/log_message.cc, kLogMessageBufferSize);
# a node takes a few hundred at most.
_CUT_BYTES = 14_000
_COMMAND_BUFFER, _BEGIN, _END = "kCommandBuffer", "kAsyncStart", "kAsyncDone"
# What they stand around is started, not they.
_AROUND = (_COMMAND_BUFFER, _BEGIN, _END)
_ASYNC = re.compile(r"(?:stream=(\S+), )?async_id=(\d+)")
# A call of which some operands are parts of arrays: it stands alone inside, in a graph of its own.
_SLICED = "kDynamicSliceFusion"


class DumpError(RuntimeError):
    """What the compiler wrote is not as it was in the versions that this was written for."""


@dataclasses.dataclass(frozen=True)
class _Thunk:
    depth: int
    id: int
    kind: str
    rest: str
    is_sliced: bool = False


def read_program(folder: pathlib.Path, log: str) -> Program:
    """All that is known of the program that was compiled in a folder.

    Args:
        folder: Of `compile_worker`.
        log: What its process wrote to standard error.

    Raises:
        DumpError: It cannot be read.
    """
    text = (folder / "hlo.txt").read_text()
    entry = hlo.read_entry(text)
    dump = folder / "dump"
    thunks = _read_thunks(dump)
    names = _names(thunks, dump)
    ours = _mosaic_kernels(dump, _calls(thunks, names, entry))
    known = _Known(
        names=names,
        scopes={one.name: one.scope for one in entry},
        kernels={one.name: ours[one.kernel].name for one in entry if one.kernel in ours},
    )
    launches = [known.launch(one) for one in thunks if one.kind not in _AROUND]
    graphs = tuple(_graphs(thunks, known, log))
    return Program(
        hlo=text,
        instructions=entry,
        kernels=(*_xla_kernels(dump, thunks, log), *ours.values()),
        launches=tuple(launches),
        graphs=graphs,
        order=launch_order.join(_items(thunks, known, graphs)),
        memory=Memory(**json.loads((folder / "memory.json").read_text())),
    )


def _dumped(dump: pathlib.Path, name: str) -> str | None:
    """Text of the file of that name about the one module; None if there is none."""
    paths = list(dump.glob(f"module_*.{name}.txt"))
    assert len(paths) < 2, paths
    return paths[0].read_text() if paths else None


def _read_thunks(dump: pathlib.Path) -> list[_Thunk]:
    # Not written where no pass of thunks changed anything.
    text = _dumped(dump, "thunk_sequence_after_thunk_passes") or _dumped(dump, "thunk_sequence")
    thunks = [
        _Thunk(len(found["indent"]), int(found["id"]), found["kind"], found["rest"])
        for found in _THUNK.finditer(text or "")
    ]
    return list(_calls_in_place_of_slices(thunks))


def _calls_in_place_of_slices(thunks: list[_Thunk]) -> Iterator[_Thunk]:
    """The thunks, of each sliced call one: what it calls, where the slicing stands."""
    called = None
    for thunk, after in itertools.zip_longest(thunks, thunks[1:]):
        if thunk is called:
            continue
        if thunk.kind == _SLICED:
            called = after
            thunk = dataclasses.replace(thunk, kind=after.kind, is_sliced=True)
        yield thunk


def _names(thunks: Sequence[_Thunk], dump: pathlib.Path) -> dict[int, str]:
    """Instructions of the entry by thunk; what runs on another stream has the name of its begin."""
    text = _dumped(dump, "thunk_metadata") or ""
    found = {int(number): name for name, number in _NAME.findall(text)}
    for index, thunk in enumerate(thunks):
        if thunk.kind == _BEGIN and thunk.id in found:
            found |= {one.id: found[thunk.id] for one in _inside(thunks, index)}
    return found


def _calls(
    thunks: Iterable[_Thunk], names: Mapping[int, str], entry: Iterable[Instruction]
) -> list[str]:
    """What tells Mosaic kernels apart, each once, in the order in which they first run."""
    kernels = {one.name: one.kernel for one in entry}
    found = (kernels.get(names.get(thunk.id, "")) for thunk in thunks)
    return list(dict.fromkeys(one for one in found if one is not None))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Known:
    """Names of instructions by thunk; scopes and kernels of ours by instruction."""

    names: Mapping[int, str]
    scopes: Mapping[str, str]
    kernels: Mapping[str, str]

    def launch(self, thunk: _Thunk) -> Launch:
        name = self.names.get(thunk.id, "")
        kernel = _SHAPE.match(thunk.rest)
        return Launch(
            name=name,
            kind=thunk.kind,
            scope=self.scopes.get(name, ""),
            kernel=kernel[1] if kernel else self.kernels.get(name),
        )


def _graphs(thunks: Sequence[_Thunk], known: _Known, log: str) -> Iterator[Graph]:
    messages = _GRAPH.findall(log)
    edges = [_NODE.findall(nodes) for nodes in messages]
    buffers = list(_command_buffers(thunks))
    found, wanted = [len(one) for one in edges], list(_graph_sizes(buffers))
    is_cut = [len(message) > _CUT_BYTES for message in messages]
    if len(found) != len(wanted) or any(
        size > full or (size < full and not cut)
        for size, full, cut in zip(found, wanted, is_cut, strict=True)
    ):
        raise DumpError(
            f"the compiler's log tells of graphs of {found} nodes, its list of launches of {wanted}"
        )
    ends = itertools.accumulate(1 + _num_sliced(buffer) for buffer in buffers)
    for nodes, buffer in zip([edges[end - 1] for end in ends], buffers, strict=True):
        yield Graph(
            nodes=tuple(map(known.launch, buffer[: len(nodes)])),
            num_nodes=len(buffer),
            parents=tuple(
                tuple(int(number) for number in re.findall(r"id: (\d+)", parents))
                for _, parents in nodes
            ),
        )


def _items(
    thunks: Sequence[_Thunk], known: _Known, graphs: Iterable[Graph]
) -> Iterator[Graph | Launch | launch_order.Begin | launch_order.End]:
    """What the host comes to: graphs and what begins and ends on other streams as one item each."""
    remaining = iter(graphs)
    index = 0
    while index < len(thunks):
        thunk = thunks[index]
        inside = _inside(thunks, index)
        index += 1
        if thunk.kind == _COMMAND_BUFFER:
            yield next(remaining)
        elif thunk.kind == _BEGIN:
            found = _ASYNC.search(thunk.rest)
            assert found, thunk
            launches = tuple(map(known.launch, inside))
            yield launch_order.Begin(number=int(found[2]), stream=found[1] or "", launches=launches)
        elif thunk.kind == _END:
            found = _ASYNC.search(thunk.rest)
            assert found, thunk
            yield launch_order.End(number=int(found[2]))
        else:
            yield known.launch(thunk)
            continue
        index += len(inside)


def _inside(thunks: Sequence[_Thunk], index: int) -> list[_Thunk]:
    """The thunks behind one that stand further to the right."""
    depth = thunks[index].depth
    return list(itertools.takewhile(lambda one: one.depth > depth, thunks[index + 1 :]))


def _num_sliced(buffer: list[_Thunk]) -> int:
    return sum(thunk.is_sliced for thunk in buffer)


def _graph_sizes(buffers: Iterable[list[_Thunk]]) -> Iterator[int]:
    """Nodes of the graphs that the log should tell of: those of sliced calls before their own."""
    for buffer in buffers:
        yield from [1] * _num_sliced(buffer)
        yield len(buffer)


def _command_buffers(thunks: Sequence[_Thunk]) -> Iterator[list[_Thunk]]:
    """What is in each."""
    for index, thunk in enumerate(thunks):
        if thunk.kind == _COMMAND_BUFFER:
            yield [one for one in _inside(thunks, index) if one.kind not in _AROUND]


def _xla_kernels(dump: pathlib.Path, thunks: Iterable[_Thunk], log: str) -> Iterator[Kernel]:
    reports = {found["name"]: found for found in _PTXAS.finditer(log)}
    programs = _entries(path.read_text() for path in dump.glob("module_*.ptx"))
    shapes = {found[1]: found for one in thunks if (found := _SHAPE.match(one.rest))}
    for name, shape in shapes.items():
        report = reports[name]
        x, y, z, *threads, dynamic = (int(number) for number in shape.groups()[1:])
        yield Kernel(
            name=name,
            is_mosaic=False,
            registers=int(report["registers"]),
            spill_bytes=int(report["stored"]) + int(report["loaded"]),
            shared_bytes=dynamic + int(report["shared"] or 0),
            grid=(x, y, z),
            num_threads=threads[0] * threads[1] * threads[2],
            ptx=programs[name],
        )


def _entries(programs: Iterable[str]) -> dict[str, str]:
    """PTX by the function that is in it."""
    return {
        name: text for text in programs for name in re.findall(r"\.visible \.entry (\w+)\(", text)
    }


def _mosaic_kernels(dump: pathlib.Path, calls: Sequence[str]) -> dict[str, Kernel]:
    """Our kernels by what the program's calls tell them apart by, in the order of the calls.

    That is the name of the dump or, on jax 0.10, a digest: there dumps are numbered as kernels are
    compiled, which is when their first call is.
    """
    found = {path.stem: path for path in sorted(dump.glob("*.ptxas"), key=_number)}
    unnamed = [path for name, path in found.items() if name not in calls]
    without = [call for call in calls if call not in found]
    if len(without) > len(unnamed):
        raise DumpError(f"{len(without)} kernels are called and {len(unnamed)} were dumped")
    found |= dict(zip(without, unnamed, strict=False))
    return {call: _mosaic_kernel(found[call]) for call in calls}


def _mosaic_kernel(path: pathlib.Path) -> Kernel:
    report = _PTXAS.search(path.read_text())
    assert report
    launch = _MosaicLaunch(path.with_suffix(".mlir-passes.log"))
    return Kernel(
        name=path.stem,
        is_mosaic=True,
        registers=int(report["registers"]),
        spill_bytes=int(report["stored"]) + int(report["loaded"]),
        shared_bytes=launch.shared_bytes,
        grid=launch.grid,
        num_threads=launch.num_threads,
        ptx=path.with_suffix(".ptx").read_text(),
    )


def _number(path: pathlib.Path) -> tuple[int, str]:
    """In the order in which they were compiled, if they are numbered: entry_9 before entry_10."""
    return len(path.stem), path.stem


class _MosaicLaunch:
    """How a kernel is launched, from its first form in the log of passes."""

    def __init__(self, passes: pathlib.Path) -> None:
        constants: dict[str, int] = {}
        with passes.open() as lines:
            for line in lines:
                if found := re.search(r"(%\w+) = arith\.constant (\d+)", line):
                    constants[found[1]] = int(found[2])
                if "gpu.launch " in line:
                    break
        sizes = re.search(
            r"blocks\(.*?\) in \((.*?)\) threads\(.*?\) in \((.*?)\).*"
            r"dynamic_shared_memory_size (%\w+)",
            line,
        )
        assert sizes, passes
        x, y, z = (constants[name] for name in re.findall(r"= (%\w+)", sizes[1]))
        threads = [constants[name] for name in re.findall(r"= (%\w+)", sizes[2])]
        self.grid = (x, y, z)
        self.num_threads = threads[0] * threads[1] * threads[2]
        self.shared_bytes = constants[sizes[3]]
