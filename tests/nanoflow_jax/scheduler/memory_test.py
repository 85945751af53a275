import hypothesis
import pytest
from hypothesis import strategies as st

from nanoflow_jax.scheduler import memory

_REQUESTS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 40)), max_size=8)


def _simulated_peak(requests, page_size):
    """Steps one token at a time and counts pages; a request leaves after its last token."""
    peak = step = 0
    while any(remaining >= step for _, remaining in requests):
        alive = [context + step for context, remaining in requests if remaining >= step]
        peak = max(peak, sum(-(-grown // page_size) for grown in alive))
        step += 1
    return peak


@hypothesis.given(requests=_REQUESTS, page_size=st.integers(1, 20))
@hypothesis.settings(max_examples=300)
def test_the_peak_is_that_of_a_step_by_step_simulation(requests, page_size):
    contexts = [context for context, _ in requests]
    remaining = [left for _, left in requests]
    found = memory.peak_pages(contexts, remaining, page_size=page_size)
    assert found == _simulated_peak(requests, page_size)


def test_the_peak_worked_by_hand():
    # Pages of 4. After 2 steps: 10 and 3 tokens, 3 + 1 pages; the first leaves. After 9: 10, 3.
    assert memory.peak_pages([8, 1], [2, 9], page_size=4) == 4
    # The short one leaves before the long one needs its fourth page.
    assert memory.peak_pages([8, 1], [2, 13], page_size=4) == 4
    assert memory.peak_pages([8, 1], [13, 13], page_size=4) == 6 + 4


def test_nothing_needs_no_pages():
    assert memory.peak_pages([], [], page_size=4) == 0


def test_the_limit_is_the_guess_until_sixteen_requests_have_ended():
    lengths = memory.OutputLengths()
    for _ in range(15):
        lengths.add(2)
    assert lengths.remaining(generated=0, most=100) == 100
    lengths.add(2)
    assert lengths.remaining(generated=0, most=100) == 2


def test_a_request_past_the_mean_is_expected_to_run_as_long_again():
    lengths = memory.OutputLengths()
    for length in [8, 11] * 8:  # mean 9.5, rounded up
        lengths.add(length)
    assert lengths.remaining(generated=0, most=100) == 10
    assert lengths.remaining(generated=7, most=100) == 3
    assert lengths.remaining(generated=10, most=100) == 10
    assert lengths.remaining(generated=40, most=100) == 40


@pytest.mark.parametrize(("generated", "most", "wanted"), [(0, 3, 3), (9, 1, 1), (50, 7, 7)])
def test_no_request_is_expected_to_pass_its_limit(generated, most, wanted):
    lengths = memory.OutputLengths()
    for _ in range(16):
        lengths.add(10)
    assert lengths.remaining(generated=generated, most=most) == wanted


@hypothesis.given(
    seen=st.lists(st.integers(1, 50), min_size=16, max_size=20),
    generated=st.integers(0, 200),
    most=st.integers(1, 300),
)
def test_a_running_request_always_has_a_token_to_go(seen, generated, most):
    lengths = memory.OutputLengths()
    for length in seen:
        lengths.add(length)
    assert 1 <= lengths.remaining(generated=generated, most=most) <= most
