from nanoflow_jax.deviceless.launch_order import Begin, End, join
from nanoflow_jax.deviceless.program import Graph, Launch


def _launch(name):
    return Launch(name=name, kind="kCustomKernel", scope=name)


def _graph(*names, parents, num_nodes=None):
    nodes = tuple(map(_launch, names))
    return Graph(nodes=nodes, parents=parents, num_nodes=num_nodes or len(nodes))


def _unordered(graph):
    names = [node.name for node in graph.nodes]
    return {
        one + other
        for i, one in enumerate(names)
        for j, other in enumerate(names[:i])
        if not graph.are_ordered(i, j)
    }


def test_launches_and_graphs_of_the_main_stream_run_one_after_another():
    order = join(
        [
            _launch("a"),
            _graph("b", "c", "d", parents=((), (), (1,))),
            _graph("e", parents=((),)),
            _launch("f"),
        ]
    )
    assert _unordered(order) == {"cb", "db"}
    assert order.parents == ((), (0,), (0,), (2,), (1, 3), (4,))
    assert order.num_nodes == 6


def test_another_stream_runs_beside_the_main_one_until_that_waits_for_it():
    first = Begin(number=1, stream="x", launches=(_launch("s"),))
    order = join([_launch("a"), first, _launch("b"), End(number=1), _launch("c")])
    assert _unordered(order) == {"bs"}


def test_what_one_stream_is_given_runs_in_order_and_streams_do_not_wait_for_each_other():
    beginnings = [
        Begin(number=1, stream="x", launches=(_launch("s"), _launch("t"))),
        Begin(number=2, stream="x", launches=(_launch("u"),)),
        Begin(number=3, stream="y", launches=(_launch("v"),)),
    ]
    order = join([_launch("a"), *beginnings, End(number=1), _launch("b"), End(number=2)])
    assert _unordered(order) == {"vs", "vt", "vu", "bu", "bv"}


def test_a_graph_of_which_a_part_is_known_counts_whole():
    order = join([_graph("a", parents=((),), num_nodes=7), _launch("b")])
    assert order.num_nodes == 8
    assert order.are_ordered(0, 1)
