"""How many requests of many kinds of clients a server takes, and which when there are too many.

Source: requests of class k come with share p_k and are charged R_k, so that a capacity of Q seconds
a second serves X = Q / sum p_k R_k of them. Taking those of most worth per charge first is the best
choice where a part of a request counts: the fractional knapsack (Dantzig, Discrete-variable
extremum problems, Operations Research 5(2), 1957).
"""

import dataclasses
import math
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Offer:
    """Requests of one kind.

    Attributes:
        share: Of all requests, or how many of them there are.
        charge_s: Of one.
        worth: Of one.
    """

    share: float
    charge_s: float
    worth: float = 1.0

    def __post_init__(self) -> None:
        for name in ("share", "charge_s", "worth"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value:g} of an offer is not zero or a positive number")


def throughput(offers: Sequence[Offer], *, capacity: float = 1.0) -> float:
    """Requests a second that a server can take; infinite if it is charged for none.

    Args:
        offers: What comes; shares need not add up to 1.
        capacity: Seconds of the server in a second.

    Raises:
        ValueError: Nothing comes.
    """
    shares = sum(one.share for one in offers)
    if not shares:
        raise ValueError("no requests are offered; give some a share")
    load = sum(one.share * one.charge_s for one in offers) / shares
    return capacity / load if load else math.inf


def admitted(offers: Sequence[Offer], *, capacity_s: float) -> tuple[float, ...]:
    """How many of each offer are taken, so that what is taken is worth most.

    Args:
        offers: What is there; of equal worth per charge the first goes first.
        capacity_s: Seconds of the server that may be charged.
    """
    taken = [0.0] * len(offers)
    left = capacity_s

    def worth_per_charge(number: int) -> float:
        one = offers[number]
        return one.worth / one.charge_s if one.charge_s else math.inf

    for number in sorted(range(len(offers)), key=worth_per_charge, reverse=True):
        one = offers[number]
        most = left / one.charge_s if one.charge_s else math.inf
        taken[number] = min(one.share, most)
        left -= taken[number] * one.charge_s
    return tuple(taken)
