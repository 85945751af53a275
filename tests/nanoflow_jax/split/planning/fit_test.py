import hypothesis
import numpy as np
import pytest
import scipy.optimize
from hypothesis import strategies as st

from nanoflow_jax.split.planning import fit


def test_times_that_follow_the_form_give_its_coefficients():
    lengths = (16, 64, 256, 1024)
    found = fit.fit_prefill([(n, 2e-3 + 3e-6 * n + 5e-10 * n**2) for n in lengths])
    assert found == pytest.approx((2e-3, 3e-6, 5e-10), rel=1e-6)
    assert fit.fit_decode([(n, 1e-3 + 2e-7 * n) for n in lengths]) == pytest.approx((1e-3, 2e-7))


_TIMES = st.lists(st.floats(0, 1), min_size=4, max_size=8)


@hypothesis.given(_TIMES)
def test_the_fit_is_the_best_of_those_without_a_negative_coefficient(times):
    lengths = np.arange(1.0, len(times) + 1)
    found = fit.fit_prefill(list(zip(lengths, times, strict=True)))
    powers = np.stack([lengths**i for i in range(3)], axis=1)
    _, least = scipy.optimize.nnls(powers, np.array(times))
    assert min(found) >= 0
    assert np.linalg.norm(powers @ found - times) == pytest.approx(least, abs=1e-9)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: fit.fit_prefill([(1, 1.0), (2, 1.0)] * 2), "2 lengths do not tell 3 coefficients"),
        (lambda: fit.fit_decode([(5, 1.0)]), "1 lengths do not tell 2 coefficients; measure at 2"),
        (lambda: fit.fit_decode([(5, 1.0), (6, -1.0)]), "6 tokens in -1 s is no measurement"),
        (lambda: fit.fit_decode([(5, 1.0), (6, float("nan"))]), "6 tokens in nan s is no measur"),
    ],
)
def test_measurements_that_tell_nothing_are_refused(act, message):
    with pytest.raises(ValueError, match=message):
        act()
