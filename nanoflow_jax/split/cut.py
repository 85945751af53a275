"""Which layers of a model the server runs, and which its client."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """The server runs layers [start, stop), the client those before and after.

    Attributes:
        start: The server's first layer; at 0 it embeds tokens.
        stop: The layer after its last; at `num_layers` it has the head and draws.
        num_layers: L.
    """

    start: int
    stop: int
    num_layers: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop <= self.num_layers:
            raise ValueError(
                f"[{self.start}, {self.stop}) is no range of layers of a model with "
                f"{self.num_layers} layers"
            )

    @property
    def server_draws(self) -> bool:
        """Whether tokens are drawn at the server."""
        return self.stop == self.num_layers

    @property
    def is_all_server(self) -> bool:
        """Whether the client has no layer at all."""
        return self.start == 0 and self.server_draws

    @property
    def front(self) -> tuple[int, int] | None:
        """The client's layers before the server's."""
        return (0, self.start) if self.start else None

    @property
    def back(self) -> tuple[int, int] | None:
        """The client's layers after the server's."""
        return None if self.server_draws else (self.stop, self.num_layers)

    @property
    def client_layers(self) -> tuple[tuple[int, int], ...]:
        """All that the client runs."""
        return tuple(part for part in (self.front, self.back) if part is not None)

    def __str__(self) -> str:
        parts = [("client", self.front), ("server", (self.start, self.stop)), ("client", self.back)]
        return ", ".join(f"{who} [{p[0]}, {p[1]})" for who, p in parts if p is not None)


def try_range(text: str) -> tuple[int, int] | None:
    """The layers that START:STOP names; None if it names none."""
    start, colon, stop = text.partition(":")
    if not (colon and start.isdecimal() and stop.isdecimal()):
        return None
    return int(start), int(stop)
