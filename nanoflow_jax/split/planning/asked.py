"""What is asked of a planner: a request with its deadlines, and what placements may look like."""

import dataclasses
import enum
import math

from nanoflow_jax.split.planning.costs import Accounting


class Side(enum.IntEnum):
    """Where a node runs."""

    CLIENT = 0
    SERVER = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A request; a deadline that is None is none.

    Attributes:
        prompt_len: Tokens of the prompt.
        output_len: Tokens that it generates, on average: what it is charged follows from them.
        output_len_high: Tokens that it generates at most, or in all but few cases: deadlines and
            memory are kept for so many. None: the average, rounded up.
        ttft_s: Until the client has the first token.
        tpot_s: Between two tokens.
        e2e_s: Until the client has the last one.
    """

    prompt_len: int
    output_len: float
    output_len_high: int | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    def __post_init__(self) -> None:
        if self.prompt_len < 1:
            raise ValueError(f"prompt_len={self.prompt_len} is under 1; a prompt has a token")
        if not 1 <= self.output_len < math.inf:
            raise ValueError(f"output_len={self.output_len:g} is under 1; ask for a token")
        if self.output_len_high is not None and self.output_len_high < self.output_len:
            raise ValueError(
                f"output_len_high={self.output_len_high} is under output_len={self.output_len:g}, "
                "the average"
            )
        for name in ("ttft_s", "tpot_s", "e2e_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value:g} is no deadline; give a positive time, or none")

    @property
    def most_output(self) -> int:
        """Tokens that deadlines and memory are kept for."""
        if self.output_len_high is not None:
            return self.output_len_high
        return math.ceil(self.output_len)

    @property
    def num_steps(self) -> int:
        """Decode steps of the longest output: the prompt gives the first token."""
        return self.most_output - 1

    @property
    def longest_s(self) -> float | None:
        """How long it may last by its deadlines; None if they do not say."""
        if self.e2e_s is not None:
            return self.e2e_s
        if self.ttft_s is None or (self.tpot_s is None and self.num_steps):
            return None
        return self.ttft_s + self.num_steps * (self.tpot_s or 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prices:
    """Shadow prices of `priced` accounting.

    Attributes:
        second: Of a second of the server.
        gigabyte_second: Of a gigabyte of its memory for a second.
    """

    second: float = 1.0
    gigabyte_second: float = 0.0

    def __post_init__(self) -> None:
        for name in ("second", "gigabyte_second"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"the price {name}={value:g} is not zero or a positive number")

    def updated(
        self,
        *,
        busy_fraction: float,
        memory_fraction: float,
        target: float = 0.9,
        rate: float = 0.1,
    ) -> "Prices":
        """Prices after what was used: dearer above the target, cheaper below, never below zero.

        Source: subgradient step of the Lagrangian of two capacities.

        Args:
            busy_fraction: Of the server's time.
            memory_fraction: Of its memory for cached tokens.
            target: What of each should be used.
            rate: How far a price moves for a whole of difference.
        """
        return Prices(
            second=max(0.0, self.second + rate * (busy_fraction - target)),
            gigabyte_second=max(0.0, self.gigabyte_second + rate * (memory_fraction - target)),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """What placements may look like and how they are judged.

    Attributes:
        accounting: What a request is charged.
        prices: Of `priced` accounting.
        guard: Deadlines are kept with this share of their time.
        grid: 0: between any two nodes the machine may change. n: only before each n-th layer, the
            embedding going with the first and the head with the last, as engines of pieces cut.
        borders: Only before these layers, ascending, in place of a grid.
        migrates: Decode may be placed otherwise than prefill; cached tokens are then sent.
        held_layers: Ranges [start, stop) that the client has; the embedding is with layer 0, the
            head with the last. None: it has the model.
        pinned_first: So many layers, and the embedding, run on the client.
        pinned_last: So many layers, and the head, do.
        embedding: Where the embedding must run; None is anywhere.
        head: Where the head must run, and with it sampling.
        activation_bytes: Of a number of a hidden state that is sent.
        least_saving: A split must save this share of the server's charge, or the server does all if
            it may and can; each split costs a round trip for every token.
        best_effort: Answer all_server where no placement meets the deadlines, not reject.
        max_labels: Partial placements kept for each node and side; more are thinned out.
    """

    accounting: Accounting = Accounting.MARGINAL
    prices: Prices = Prices()
    guard: float = 0.9
    grid: int = 0
    borders: tuple[int, ...] | None = None
    migrates: bool = False
    held_layers: tuple[tuple[int, int], ...] | None = None
    pinned_first: int = 0
    pinned_last: int = 0
    embedding: Side | None = None
    head: Side | None = None
    activation_bytes: float = 2.0
    least_saving: float = 0.0
    best_effort: bool = False
    max_labels: int = 1024

    def __post_init__(self) -> None:
        if not 0 < self.guard <= 1:
            raise ValueError(f"guard={self.guard:g} is outside (0, 1]; 0.9 keeps a tenth in hand")
        for name in ("grid", "pinned_first", "pinned_last"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is negative; give 0 or more")
        if not 0 <= self.least_saving < 1:
            raise ValueError(
                f"least_saving={self.least_saving:g} is outside [0, 1); 0.1 is a tenth"
            )
        if not 0 < self.activation_bytes <= 4:
            raise ValueError(f"activation_bytes={self.activation_bytes:g} is outside (0, 4]")
        if self.max_labels < 16:
            raise ValueError(f"max_labels={self.max_labels} is under 16; too few to plan with")
