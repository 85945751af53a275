"""What the scheduler knows of a request, and what it decides for one step."""

import dataclasses

from nanoflow_jax.scheduler import buckets


@dataclasses.dataclass(eq=False, kw_only=True)
class Entry:
    """One request as the scheduler counts it.

    Attributes:
        request_id: Unique.
        prompt_len: Tokens of the prompt.
        limit: Tokens at which the request ends, prompt included.
        priority: Lower runs first.
        arrival: Order of arrival.
        uses_penalties: Takes one of the few rows of the penalty table.
        ends_at_limit: No earlier end is possible, so its length is certain.
        is_fed: Its tokens come from outside, in pieces, and could not be had again: it holds all
            pages that it may need as soon as it runs, and is never preempted.
        draws: Whether a step that reaches the last token known samples the next one.
        known: Prompt and sampled tokens, those in flight included; of a fed one those that came.
        computed: Tokens cached, or being cached by a launched step.
        in_flight: Sampled tokens whose value the host does not have yet.
        pages: Pages held, in context order.
        slot: Row of per-request device state while running.
        penalty_slot: Row of the penalty table while running, if it uses one.
    """

    request_id: str
    prompt_len: int
    limit: int
    priority: int
    arrival: int
    uses_penalties: bool
    ends_at_limit: bool
    known: int
    is_fed: bool = False
    draws: bool = True
    computed: int = 0
    in_flight: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    slot: int | None = None
    penalty_slot: int | None = None

    @property
    def to_do(self) -> int:
        """Tokens known and not computed."""
        return self.known - self.computed

    @property
    def is_complete(self) -> bool:
        """Whether every token it may have is known; a fed one is ended from outside."""
        return not self.is_fed and self.known >= self.limit

    @property
    def samples_next(self) -> bool:
        """Whether a step that has computed so much samples the next token."""
        return self.draws and self.computed == self.known >= self.prompt_len

    @property
    def rank(self) -> tuple[int, int]:
        """Lower goes first."""
        return (self.priority, self.arrival)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """Tokens [start, start + length) of one request, to run in a step.

    Attributes:
        request_id: Whose tokens.
        start: Position of the first.
        length: How many.
        slot: Row of per-request device state.
        penalty_slot: Row of the penalty table, if it uses one.
        pages: Pages of the request's context, these tokens included.
        samples: Whether the step samples this request's next token.
        is_first: Whether the request has run nothing since it was admitted.
    """

    request_id: str
    start: int
    length: int
    slot: int
    penalty_slot: int | None
    pages: tuple[int, ...]
    samples: bool
    is_first: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What one step runs; decode rows come first in the flat batch."""

    decode: tuple[Row, ...]
    chunks: tuple[Row, ...]
    bucket: buckets.Bucket

    @property
    def num_tokens(self) -> int:
        """Tokens in the step, padding left out."""
        return len(self.decode) + sum(row.length for row in self.chunks)

    @property
    def rows(self) -> tuple[Row, ...]:
        """All rows in the order of the flat batch."""
        return self.decode + self.chunks
