import hypothesis
import pytest
from hypothesis import strategies as st

from nanoflow_jax.scheduler.sharing import Sharing


@hypothesis.given(
    sizes=st.lists(st.integers(1, 50), max_size=12), replicas=st.integers(1, 4), data=st.data()
)
def test_the_replica_with_the_least_to_do_is_chosen_whatever_came_and_went(sizes, replicas, data):
    sharing, left, held = Sharing(replicas), [0] * replicas, {}
    for number, size in enumerate(sizes):
        chosen = sharing.choose()
        assert chosen == left.index(min(left))
        sharing.take(str(number), size, by=chosen)
        left[chosen] += size
        held[str(number)] = (chosen, size)
        sharing.check()
        if data.draw(st.booleans()):
            name = data.draw(st.sampled_from(sorted(held)))
            owner, freed = held.pop(name)
            assert sharing.owner(name) == owner
            sharing.give_back(name)
            assert sharing.owner(name) is None
            left[owner] -= freed


def test_a_name_is_taken_once():
    sharing = Sharing(2)
    sharing.take("a", 3, by=0)
    with pytest.raises(AssertionError, match="request 'a' is taken twice"):
        sharing.take("a", 3, by=1)
