import dataclasses

import pytest

from nanoflow_jax.deviceless.program import Graph, Instruction, Kernel, Launch, Memory, Program


def _launch(name):
    return Launch(name=name, kind="kCopy", scope=f"step/{name}")


# a -> b -> d, and c beside them.
_GRAPH = Graph(
    nodes=tuple(_launch(name) for name in "abcd"),
    parents=((), (0,), (), (1,)),
    num_nodes=4,
)


def test_the_longest_path_counts_nodes_of_dependent_launches():
    assert _GRAPH.critical_path == 3
    assert _GRAPH.num_edges == 2
    assert Graph(nodes=(), parents=(), num_nodes=0).critical_path == 0


def test_nodes_are_ordered_if_a_path_joins_them_either_way():
    assert _GRAPH.are_ordered(0, 3)
    assert _GRAPH.are_ordered(3, 0)
    assert not _GRAPH.are_ordered(2, 3)
    assert not _GRAPH.are_ordered(1, 1)


def test_nodes_are_found_by_their_scope():
    assert _GRAPH.find("/b") == [1]
    assert _GRAPH.find("step") == [0, 1, 2, 3]


def _kernel(name, *, is_mosaic):
    return Kernel(
        name=name,
        is_mosaic=is_mosaic,
        registers=168,
        spill_bytes=0,
        shared_bytes=1024,
        grid=(100, 1, 1),
        num_threads=384,
        ptx=f".visible .entry {name}(",
    )


def _instruction(name, opcode):
    return Instruction(
        name=name, opcode=opcode, shape="f32[4]", num_bytes=16, operands=("x",), scope=""
    )


_PROGRAM = Program(
    hlo="HloModule",
    instructions=(_instruction("a", "copy"), _instruction("b", "fusion")),
    kernels=(_kernel("b", is_mosaic=False), _kernel("entry_0", is_mosaic=True)),
    launches=_GRAPH.nodes,
    graphs=(_GRAPH,),
    order=_GRAPH,
    memory=Memory(argument_bytes=1, output_bytes=2, alias_bytes=3, temp_bytes=4),
)


def test_copies_and_kernels_of_either_maker_are_found():
    assert [one.name for one in _PROGRAM.copies] == ["a"]
    assert [one.name for one in _PROGRAM.mosaic_kernels] == ["entry_0"]
    assert _PROGRAM.kernel("b").ptx == ".visible .entry b("
    assert _PROGRAM.kernel("entry_0").is_mosaic
    with pytest.raises(KeyError, match="entry_1"):
        _PROGRAM.kernel("entry_1")


def test_programs_come_back_from_json_as_they_were():
    assert _PROGRAM.graphs[0].critical_path == 3
    assert Program.from_json(_PROGRAM.to_json()) == _PROGRAM
    other = dataclasses.replace(_PROGRAM, hlo="other")
    assert Program.from_json(other.to_json()) != _PROGRAM
