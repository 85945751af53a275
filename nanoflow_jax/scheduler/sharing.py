"""Which of several replicas takes the next request."""


class Sharing:
    """Gives each request to the replica with the fewest tokens to do.

    Invariant: `_owners` and `_sizes` have every request that was taken and not given back, and
    `_tokens_left` is the sum of the sizes of those of each replica.
    """

    def __init__(self, num_replicas: int) -> None:
        self._tokens_left = [0] * num_replicas
        self._owners: dict[str, int] = {}
        self._sizes: dict[str, int] = {}

    def choose(self) -> int:
        """The replica with the least to do; of several, the first."""
        return min(range(len(self._tokens_left)), key=lambda i: self._tokens_left[i])

    def owner(self, name: str) -> int | None:
        """Who has a request; None if nobody has it."""
        return self._owners.get(name)

    def take(self, name: str, num_tokens: int, *, by: int) -> None:
        """Counts a request that a replica took.

        Args:
            name: Of the request; nobody has one of that name.
            num_tokens: That it may grow to.
            by: The replica.
        """
        assert name not in self._owners, f"request {name!r} is taken twice"
        self._owners[name], self._sizes[name] = by, num_tokens
        self._tokens_left[by] += num_tokens

    def give_back(self, name: str) -> None:
        """Forgets a request, which ended."""
        self._tokens_left[self._owners.pop(name)] -= self._sizes.pop(name)

    def check(self) -> None:
        """Raises AssertionError if the class invariant is broken."""
        assert self._owners.keys() == self._sizes.keys()
        for i, left in enumerate(self._tokens_left):
            own = [self._sizes[name] for name, owner in self._owners.items() if owner == i]
            assert left == sum(own), f"replica {i} is thought to have {left} tokens to do"
