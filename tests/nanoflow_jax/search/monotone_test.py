import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoflow_jax.search import monotone

_TIMES = st.floats(1e-6, 1e3)
_VALUES = st.dictionaries(st.integers(1, 4096), _TIMES, min_size=1, max_size=12)


@given(_VALUES, st.data())
def test_time_never_falls_as_tokens_grow_and_stays_within_what_was_measured(measured, data):
    curve = monotone.fit(measured, measured)
    places = sorted(data.draw(st.lists(st.floats(0, curve.end), min_size=2, max_size=9)))
    values = [curve(place) for place in places]
    slack = 1e-9 * max(values)
    assert all(a <= b + slack for a, b in itertools.pairwise(values))
    assert min(measured.values()) - slack <= values[0]
    assert values[-1] <= max(measured.values()) + slack


@given(st.lists(_TIMES, min_size=1, max_size=12), st.data())
def test_no_other_never_falling_values_are_nearer(values, data):
    found = monotone.rising(values)
    other = sorted(data.draw(st.lists(_TIMES, min_size=len(values), max_size=len(values))))

    def distance(one):
        return sum((a - b) ** 2 for a, b in zip(one, values, strict=True))

    assert found == sorted(found)
    assert distance(found) <= distance(other) * (1 + 1e-9) + 1e-12
    if values == sorted(values):
        assert found == values


def test_a_curve_by_hand():
    curve = monotone.fit(
        {100: 1.0, 200: 4.0, 300: 2.0, 400: 7.0}, {100: 2.0, 200: 0.0, 300: 1.0, 400: 0.0}
    )
    assert curve.values == (1.0, 3.0, 3.0, 7.0)  # 4 and 2 are taken together
    assert [curve(place) for place in (0, 100, 150, 250, 400)] == [1.0, 1.0, 2.0, 3.0, 7.0]
    assert [curve.spread(place) for place in (0, 100, 150, 200)] == [2.0, 2.0, 1.0, 0.0]
    with pytest.raises(ValueError, match="401 is beyond 400, the most that was measured"):
        curve(401)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=20))
def test_kept_points_beat_each_other_in_one_way_only_and_all_others_are_beaten(points):
    found = monotone.unbeaten(points)
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise(found))
    assert set(found) <= set(points)
    for cost, gain in points:
        assert any(kept[0] <= cost and kept[1] >= gain for kept in found)
