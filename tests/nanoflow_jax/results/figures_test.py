import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoflow_jax.results import figures

_POSITIVE = st.floats(min_value=1e-9, max_value=1e18)


@given(st.lists(_POSITIVE, min_size=1, max_size=20))
def test_a_median_has_half_of_the_samples_on_either_side(values: list[float]) -> None:
    found = figures.summarise("speed", "FLOP/s", values)
    assert found.low == min(values) <= found.median <= max(values) == found.high
    assert sum(value <= found.median for value in values) * 2 >= len(values)
    assert sum(value >= found.median for value in values) * 2 >= len(values)
    assert found.count == len(values)


def test_a_share_is_of_the_larger_ceiling() -> None:
    ceilings = figures.Ceilings(before={"copy": 100.0}, after={"copy": 104.0})
    found = figures.summarise("read", "B/s", [78.0], ceiling="copy", ceilings=ceilings)
    assert (found.ceiling, found.fraction) == ("copy", 0.75)


def test_a_spread_is_a_share_of_the_median() -> None:
    assert figures.summarise("time", "s", [2.0, 4.0, 5.0]).spread == 0.75


def test_a_ratio_spans_what_its_samples_could_give() -> None:
    ours = figures.summarise("ours", "FLOP/s", [6.0, 8.0, 9.0])
    theirs = figures.summarise("theirs", "FLOP/s", [3.0, 4.0])
    found = figures.ratio("ours to theirs", ours, theirs)
    assert (found.median, found.low, found.high) == (8 / 3.5, 1.5, 3.0)
    assert (found.unit, found.count) == ("x", 2)


@pytest.mark.parametrize(
    ("values", "ceilings", "message"),
    [
        ([], figures.Ceilings(before={}, after={}), "there are no samples of read"),
        ([1.0], None, "read is a share of copy, and no ceilings were measured"),
        (
            [1.0],
            figures.Ceilings(before={"copy": 1.0}, after={}),
            "the ceiling copy was not measured before and after",
        ),
    ],
)
def test_a_figure_without_what_it_needs_is_refused(
    values: list[float], ceilings: figures.Ceilings | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        figures.summarise("read", "B/s", values, ceiling="copy", ceilings=ceilings)


@given(_POSITIVE, _POSITIVE)
def test_agreement_does_not_depend_on_who_is_asked(one: float, other: float) -> None:
    agree = figures.do_agree(one, other, within=0.05)
    assert agree == figures.do_agree(other, one, within=0.05)
    assert agree == (max(one, other) - min(one, other) <= 0.05 * min(one, other))


def test_figures_are_the_same_but_for_their_last_bits() -> None:
    one = figures.summarise("time", "s", [0.1 + 0.2])
    assert figures.is_same(one, figures.summarise("time", "s", [0.3]))
    assert not figures.is_same(one, figures.summarise("time", "s", [0.3000001]))
    assert not figures.is_same(one, figures.summarise("time", "ms", [0.3]))
    ceilings = figures.Ceilings(before={"t": 1.0}, after={"t": 1.0})
    share = figures.summarise("time", "s", [0.3], ceiling="t", ceilings=ceilings)
    assert not figures.is_same(one, share)
    assert not figures.is_same(share, one)
