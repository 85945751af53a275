"""Reads what XLA, Mosaic and ptxas leave behind when they compile."""

import dataclasses
import itertools
import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping

from nanoflow_jax.deviceless import hlo
from nanoflow_jax.deviceless.program import Aside, Graph, Kernel, Launch, Memory, Program

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
_COMMAND_BUFFER = "kCommandBuffer"
_ASYNC_START, _ASYNC_DONE = "kAsyncStart", "kAsyncDone"
# What they stand around is started, not they.
_AROUND = (_COMMAND_BUFFER, _ASYNC_START, _ASYNC_DONE)
_STREAM = re.compile(r"stream=(\S+), async_id=(\d+)")
_JOINED = re.compile(r"async_id=(\d+)")
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
    names = _read_names(dump)
    scopes = hlo.read_scopes(text) | {one.name: one.scope for one in entry if one.scope}
    launches = [
        _launch(one, names.get(one.id, ""), scopes) for one in thunks if one.kind not in _AROUND
    ]
    return Program(
        hlo=text,
        instructions=entry,
        kernels=(*_xla_kernels(dump, thunks, log), *_mosaic_kernels(dump)),
        launches=tuple(launches),
        graphs=tuple(_graphs(thunks, names, scopes, log)),
        memory=Memory(**json.loads((folder / "memory.json").read_text())),
        asides=tuple(_asides(thunks)),
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


def _read_names(dump: pathlib.Path) -> dict[int, str]:
    text = _dumped(dump, "thunk_metadata") or ""
    return {int(number): name for name, number in _NAME.findall(text)}


def _launch(thunk: _Thunk, name: str, scopes: Mapping[str, str]) -> Launch:
    kernel = _SHAPE.match(thunk.rest)
    return Launch(
        name=name,
        kind=thunk.kind,
        scope=scopes.get(name, ""),
        kernel=kernel[1] if kernel else None,
    )


def _asides(thunks: list[_Thunk]) -> Iterator[Aside]:
    """What is started on other streams."""
    begun: dict[str, tuple[str, int, int]] = {}
    count = 0
    for i, thunk in enumerate(thunks):
        if thunk.kind == _ASYNC_START and (found := _STREAM.search(thunk.rest)):
            begun[found[2]] = (found[1], count, count + len(_inside(thunks, i)))
        elif thunk.kind == _ASYNC_DONE and (ended := _JOINED.search(thunk.rest)):
            stream, first, end = begun.pop(ended[1])
            yield Aside(stream=stream, first=first, end=end, joined=count)
        count += thunk.kind not in _AROUND


def _graphs(
    thunks: Iterable[_Thunk], names: Mapping[int, str], scopes: Mapping[str, str], log: str
) -> Iterator[Graph]:
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
            nodes=tuple(
                _launch(one, names.get(one.id, ""), scopes) for one in buffer[: len(nodes)]
            ),
            num_nodes=len(buffer),
            parents=tuple(
                tuple(int(number) for number in re.findall(r"id: (\d+)", parents))
                for _, parents in nodes
            ),
        )


def _num_sliced(buffer: list[_Thunk]) -> int:
    return sum(thunk.is_sliced for thunk in buffer)


def _graph_sizes(buffers: Iterable[list[_Thunk]]) -> Iterator[int]:
    """Nodes of the graphs that the log should tell of: those of sliced calls before their own."""
    for buffer in buffers:
        yield from [1] * _num_sliced(buffer)
        yield len(buffer)


def _command_buffers(thunks: Iterable[_Thunk]) -> Iterator[list[_Thunk]]:
    """What is in each."""
    remaining = list(thunks)
    for index, thunk in enumerate(remaining):
        if thunk.kind == _COMMAND_BUFFER:
            yield _inside(remaining, index)


def _inside(thunks: list[_Thunk], index: int) -> list[_Thunk]:
    """What one thunk holds: those behind it that stand further to the right."""
    depth = thunks[index].depth
    held = itertools.takewhile(lambda one: one.depth > depth, thunks[index + 1 :])
    return [one for one in held if one.kind not in _AROUND]


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


def _mosaic_kernels(dump: pathlib.Path) -> Iterator[Kernel]:
    for path in sorted(dump.glob("*.ptxas"), key=_number):
        report = _PTXAS.search(path.read_text())
        assert report
        launch = _MosaicLaunch(path.with_suffix(".mlir-passes.log"))
        yield Kernel(
            name=path.stem,
            is_mosaic=True,
            registers=int(report["registers"]),
            spill_bytes=int(report["stored"]) + int(report["loaded"]),
            shared_bytes=launch.shared_bytes,
            grid=launch.grid,
            num_threads=launch.num_threads,
            ptx=path.with_suffix(".ptx").read_text(),
        )


def _number(path: pathlib.Path) -> int:
    """In the order in which they were lowered: entry_9 before entry_10."""
    return int(re.findall(r"\d+", path.stem)[-1])


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
