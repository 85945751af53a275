"""What splitting and overlap cost operations, worked by hand."""

import pytest

from nanoflow_jax.results import ablation_operations

_TIMES = {
    "sequential": {"norm_kqv": 2.0, "decode_attention": 3.0, "o": 1.0, "down": 4.0},
    "split": {"norm_kqv": 2.5, "decode_attention": 3.0, "o": 1.0, "down": 4.5},
    "graph": {"norm_kqv": 3.0, "decode_attention": 6.0, "o": 1.5, "down": 4.5},
}


def _slowdowns(times, **how):
    modes = {"best": "sequential", "split": ["split"], "overlapped": ["graph"], **how}
    found = ablation_operations.slowdowns("512/512", times, **modes)
    return {one.name.removeprefix("512/512: "): one.median for one in found}


def test_operations_are_compared_with_the_best_mode_and_with_splitting_alone():
    found = _slowdowns(_TIMES)
    assert found["norm_kqv of split, times as long as of sequential"] == 1.25
    assert found["decode_attention of graph, times as long as of sequential"] == 2.0
    assert found["decode_attention of graph, times as long as of split"] == 2.0
    assert found["down of graph, times as long as of split"] == 1.0
    assert "down of split, times as long as of split" not in found


def test_what_split_products_take_longer_is_a_share_of_the_sequential_operations():
    cost = _slowdowns(_TIMES)["products of split, longer by this share of sequential"]
    assert cost == pytest.approx(1.0 / 10.0)


def test_an_operation_that_shares_a_kernel_is_compared_with_nothing():
    graph = {"norm_kqv": 3.0, "decode_attention+o": 6.0, "o": 0.5, "down": 4.5}
    found = _slowdowns(_TIMES | {"graph": graph})
    assert {name.split()[0] for name in found if " of graph, " in name} == {"norm_kqv", "down"}


def test_modes_without_a_trace_have_no_slowdowns():
    assert _slowdowns({"sequential": _TIMES["sequential"]}) == {}
    assert _slowdowns({"graph": _TIMES["graph"]}) == {}
