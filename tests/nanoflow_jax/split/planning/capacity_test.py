import math

import hypothesis
import numpy as np
import pytest
import scipy.optimize
from hypothesis import strategies as st

from nanoflow_jax.split.planning import capacity
from nanoflow_jax.split.planning.capacity import Offer


def test_throughput_is_capacity_over_the_mean_charge():
    offers = [Offer(share=3, charge_s=0.1), Offer(share=1, charge_s=0.5)]
    assert capacity.throughput(offers, capacity=2.0) == pytest.approx(2.0 / 0.2)
    assert capacity.throughput([Offer(share=1, charge_s=0.0)]) == math.inf


_OFFERS = st.lists(
    st.builds(Offer, share=st.floats(0, 5), charge_s=st.floats(0.01, 2), worth=st.floats(0, 3)),
    min_size=1,
    max_size=6,
)


@hypothesis.given(offers=_OFFERS, room=st.floats(0, 10))
def test_what_is_admitted_is_worth_most(offers, room):
    taken = np.array(capacity.admitted(offers, capacity_s=room))
    charges, worths, shares = (
        np.array([getattr(one, name) for one in offers]) for name in ("charge_s", "worth", "share")
    )
    best = scipy.optimize.linprog(
        -worths, A_ub=[charges], b_ub=[room], bounds=[(0, one) for one in shares]
    )
    assert (taken >= 0).all() and (taken <= shares).all()
    assert taken @ charges <= room + 1e-9
    assert taken @ worths == pytest.approx(-best.fun, abs=1e-7)


def test_what_charges_nothing_is_always_admitted():
    offers = [Offer(share=2, charge_s=1.0, worth=9.0), Offer(share=4, charge_s=0.0)]
    assert capacity.admitted(offers, capacity_s=0.0) == (0.0, 4)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: Offer(share=-1, charge_s=1), "share=-1 of an offer is not zero or a positive"),
        (lambda: capacity.throughput([]), "no requests are offered; give some a share"),
    ],
)
def test_offers_that_are_none_are_refused(act, message):
    with pytest.raises(ValueError, match=message):
        act()
