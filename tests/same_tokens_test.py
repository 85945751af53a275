import pytest
from hypothesis import given
from hypothesis import strategies as st
from same_tokens import MIN_MARGIN, check_same_tokens

_TOKENS = [[3, 1, 4, 1], [5, 9, 2]]
_WIDE = [[0.5, 0.2, 0.1, 0.3], [1.0, 0.4, 0.6]]


def test_equal_tokens_pass_and_end_no_request():
    assert check_same_tokens([[3, 1, 4, 1], [5, 9, 2]], _TOKENS, _WIDE) == 0


def test_a_different_token_fails_and_says_where():
    with pytest.raises(AssertionError, match=r"request 1, token 2: 7 instead of 2"):
        check_same_tokens([[3, 1, 4, 1], [5, 9, 7]], _TOKENS, _WIDE)


@pytest.mark.parametrize("generated", [[5, 9], [5, 9, 2, 6], []])
def test_a_different_number_of_tokens_fails(generated):
    with pytest.raises(AssertionError, match=f"request 1 has {len(generated)} tokens instead of 3"):
        check_same_tokens([[3, 1, 4, 1], generated], _TOKENS, _WIDE)


def _hundred(last, margins):
    """A hundred requests of which the last is compared as said."""
    plain = [[3, 1, 4, 1]] * 99
    return [*plain, last], [[3, 1, 4, 1]] * 100, [[0.5] * 4] * 99 + [margins]


@pytest.mark.parametrize("last", [[3, 1, 4, 1], [3, 1, 8, 8], [3, 1, 8], [3, 1]])
def test_a_request_is_compared_only_before_a_margin_below_rounding(last):
    assert check_same_tokens(*_hundred(last, [0.5, 0.5, 0.9 * MIN_MARGIN, 0.5])) == 1


@pytest.mark.parametrize("last", [[3, 7, 4, 1], [3]])
def test_what_stands_before_the_small_margin_still_counts(last):
    with pytest.raises(AssertionError, match="request 99"):
        check_same_tokens(*_hundred(last, [0.5, 0.5, 0.9 * MIN_MARGIN, 0.5]))


def test_a_margin_of_just_the_limit_is_wide_enough_to_compare():
    with pytest.raises(AssertionError, match=r"request 99, token 2"):
        check_same_tokens(*_hundred([3, 1, 8, 1], [0.5, 0.5, MIN_MARGIN, 0.5]))


def test_a_margin_that_is_not_a_number_is_refused():
    with pytest.raises(ValueError, match="request 99 has a reference margin that is not a number"):
        check_same_tokens(*_hundred([3, 1, 4, 1], [0.5, 0.5, float("nan"), 0.5]))


def test_two_of_a_hundred_requests_ended_early_fail_even_with_equal_tokens():
    small = [[0.5] * 4] * 98 + [[0.0] * 4] * 2
    with pytest.raises(AssertionError, match=r"2 of 100 requests .* more than 1%"):
        check_same_tokens([[3, 1, 4, 1]] * 100, [[3, 1, 4, 1]] * 100, small)


def test_a_missing_request_is_refused():
    with pytest.raises(ValueError, match="1 generated requests, 2 of the reference"):
        check_same_tokens(_TOKENS[:1], _TOKENS, _WIDE)


def test_margins_of_another_length_are_refused():
    with pytest.raises(ValueError, match="request 1 has 3 reference tokens but 4 margins"):
        check_same_tokens(_TOKENS, _TOKENS, [_WIDE[0], [0.1] * 4])


@given(st.lists(st.lists(st.integers(0, 9), max_size=6), max_size=8), st.data())
def test_changing_any_one_token_is_noticed(tokens, data):
    margins = [[0.1] * len(row) for row in tokens]
    assert check_same_tokens(tokens, tokens, margins) == 0
    places = [(row, column) for row in range(len(tokens)) for column in range(len(tokens[row]))]
    if not places:
        return
    row, column = data.draw(st.sampled_from(places))
    changed = [list(one) for one in tokens]
    changed[row][column] += 1
    with pytest.raises(AssertionError, match=f"request {row}, token {column}:"):
        check_same_tokens(changed, tokens, margins)
