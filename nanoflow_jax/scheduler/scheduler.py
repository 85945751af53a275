"""Forms the dense batch of each step: unfinished decodes first, then chunks that fill it exactly.

The scheduler counts tokens and never sees their values. Of one request:
`[0, computed)` cached or being cached, `[computed, known)` to do. A step that reaches `known`
samples one more token, which is known at once by number although its value is still on the
device, so the next step can be planned while this one runs.
"""

import collections
import dataclasses
from collections.abc import Collection, Sequence

from nanoflow_jax.kv_cache import pages
from nanoflow_jax.scheduler import buckets as bucket_list
from nanoflow_jax.scheduler import memory
from nanoflow_jax.scheduler.step_plan import Entry, Row, StepPlan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What one step may hold.

    Attributes:
        max_requests: Most requests that run at once.
        dense_batch: Tokens in a full step.
        page_size: Tokens in one page.
        penalty_requests: Most running requests that use penalties.
        fixed_ways: Whether tokens of prompts always run in chunks and all others as decode rows,
            one a step, also when they are computed again. Otherwise what is left of a chunk may be
            a decode row, and a preempted request comes back in chunks.
    """

    max_requests: int
    dense_batch: int
    page_size: int
    penalty_requests: int
    fixed_ways: bool = False


class Scheduler:
    """Decides which tokens of which requests run in the next step.

    Invariant: each page, slot and penalty slot is free or held by exactly one running request;
    a running request holds the pages of its computed tokens, and a fed one those of its limit;
    waiting ones hold nothing.
    """

    def __init__(
        self,
        limits: Limits,
        buckets: Sequence[bucket_list.Bucket],
        allocator: pages.PageAllocator,
    ) -> None:
        self._limits = limits
        self._buckets = tuple(buckets)
        self._pages = allocator
        self._entries: dict[str, Entry] = {}
        self._running: list[Entry] = []
        self._waiting: collections.deque[Entry] = collections.deque()
        self._slots = list(range(limits.max_requests - 1, -1, -1))
        self._penalty_slots = list(range(limits.penalty_requests - 1, -1, -1))
        self._lengths = memory.OutputLengths()
        self._in_this_step: set[str] = set()
        self._only: Collection[str] | None = None
        self._most_running = limits.max_requests
        self._arrivals = 0
        self._num_preemptions = 0

    @property
    def limits(self) -> Limits:
        """What one step may hold."""
        return self._limits

    @property
    def num_running(self) -> int:
        """Requests that hold a slot."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests not yet admitted, or preempted."""
        return len(self._waiting)

    @property
    def num_preemptions(self) -> int:
        """How often a request lost its pages and had to start over."""
        return self._num_preemptions

    @property
    def num_pages_used(self) -> int:
        """Pages held by running requests."""
        return self._pages.num_pages - self._pages.num_free

    @property
    def has_work(self) -> bool:
        """Whether any request has tokens to run, or will have; a fed one waits for its next."""
        return any(not e.is_fed or e.to_do for e in self._entries.values())

    def add(
        self,
        request_id: str,
        *,
        prompt_len: int,
        limit: int,
        priority: int,
        uses_penalties: bool,
        ends_at_limit: bool,
        is_fed: bool = False,
        draws: bool = True,
    ) -> None:
        """Takes a request in.

        Args:
            request_id: Unique among those held.
            prompt_len: Tokens of the prompt.
            limit: Tokens at which it ends, prompt included.
            priority: Lower runs first.
            uses_penalties: Whether it needs a row of the penalty table.
            ends_at_limit: Whether it can end no earlier.
            is_fed: Whether its tokens come with `feed`, all that it will have being cached.
            draws: Whether its next tokens are sampled here.

        Raises:
            ValueError: The id is taken, or all pages together could not hold the request.
        """
        if request_id in self._entries:
            raise ValueError(f"request id {request_id!r} is already in use")
        most = self._pages.num_pages * self._limits.page_size
        # The last token that is drawn is never cached: nothing comes after it.
        if limit - (not is_fed) > most:
            raise ValueError(
                f"no memory for this request: it may grow to {limit} tokens and the cache holds "
                f"{most}; lower max_tokens, or raise --cache_num_pages or --cache_memory_fraction"
            )
        entry = Entry(
            request_id=request_id,
            prompt_len=prompt_len,
            limit=limit,
            priority=priority,
            arrival=self._arrivals,
            uses_penalties=uses_penalties,
            ends_at_limit=ends_at_limit,
            known=0 if is_fed else prompt_len,
            is_fed=is_fed,
            draws=draws,
        )
        self._arrivals += 1
        self._entries[request_id] = entry
        self._enqueue(entry)

    def _enqueue(self, entry: Entry) -> None:
        """Puts a request in line by rank; nearly always at one of the ends."""
        line = self._waiting
        if not line or line[-1].rank < entry.rank:
            line.append(entry)
        elif entry.rank < line[0].rank:
            line.appendleft(entry)
        else:
            place = sum(1 for other in line if other.rank < entry.rank)
            line.insert(place, entry)

    def feed(self, request_id: str, count: int) -> None:
        """Counts tokens of a fed request as known.

        Args:
            request_id: Which.
            count: Tokens that came; with them there are at most as many as its limit.
        """
        entry = self._entries[request_id]
        assert entry.is_fed and entry.known + count <= entry.limit, "fed what nobody waits for"
        entry.known += count

    def truncate(self, request_id: str, known: int) -> None:
        """Forgets tokens of a fed request, of which none is in flight; its pages stay.

        Args:
            request_id: Which.
            known: Tokens that are left.
        """
        entry = self._entries[request_id]
        assert entry.is_fed and not entry.in_flight and known <= entry.known
        entry.known, entry.computed = known, min(known, entry.computed)

    def plan(self) -> StepPlan | None:
        """The next step, or None if nothing can run now.

        The plan counts as launched: its tokens are computed and its samples known.
        """
        self._release_complete()
        self._in_this_step.clear()
        decode = self._plan_decodes()
        budget = self._limits.dense_batch - len(decode)
        chunks = self._plan_chunks(budget)
        if not decode and not chunks:
            return None
        tokens = len(decode) + sum(row.length for row in chunks)
        bucket = bucket_list.pick_bucket(
            self._buckets, tokens=tokens, decode_rows=len(decode), prefill_rows=len(chunks)
        )
        return StepPlan(decode=tuple(decode), chunks=tuple(chunks), bucket=bucket)

    def _release_complete(self) -> None:
        """Takes pages back from requests whose last token was already launched.

        Steps run in order on the device, so a later step may overwrite these pages.
        """
        for entry in [e for e in self._running if e.is_complete]:
            self._leave(entry)

    def _plan_decodes(self) -> list[Row]:
        rows = []
        for entry in sorted(self._running, key=lambda e: e.rank):
            if entry.slot is None or self._chunk_left(entry) > 0 or not entry.to_do:
                continue  # lost its pages to one before it, has a chunk to do, or is not fed
            if self._grow(entry, 1):
                rows.append(self._launch(entry, 1))
        return rows

    def _plan_chunks(self, budget: int) -> list[Row]:
        most_rows = self._buckets[-1].prefill_rows
        rows: list[Row] = []
        unfinished = sorted((e for e in self._running if self._chunk_left(e)), key=lambda e: e.rank)
        for entry in unfinished:
            if budget == 0 or len(rows) == most_rows:
                return rows
            length = min(budget, self._chunk_left(entry))
            if entry.slot is not None and self._grow(entry, length):
                rows.append(self._launch(entry, length))
                budget -= length
        while budget and len(rows) < most_rows:
            admitted = self._try_admit()
            if admitted is None:
                break
            length = min(budget, self._chunk_left(admitted) or admitted.to_do)
            if not length:
                continue  # it has its pages, and its first tokens are to come
            if not self._grow(admitted, length, preempt=False):
                self._preempt(admitted, count=False)
                break
            rows.append(self._launch(admitted, length))
            budget -= length
        return rows

    def _chunk_left(self, entry: Entry) -> int:
        """Tokens of a request that are to run in chunks; 0 where a decode row is next."""
        if self._limits.fixed_ways:
            return max(entry.prompt_len - entry.computed, 0)
        return entry.to_do if entry.to_do > 1 else 0

    def _try_admit(self) -> Entry | None:
        """Moves the first waiting request to the running ones if there is room for its life."""
        if not self._slots or len(self._running) >= self._most_running:
            return None
        allowed = (e for e in self._waiting if self._only is None or e.request_id in self._only)
        entry = next(allowed, None)
        if entry is None:
            return None
        if entry.in_flight or (entry.uses_penalties and not self._penalty_slots):
            return None  # its last token is still on the device, or the penalty table is full
        if self._running and self._predicted_peak(entry) > self._pages.num_pages:
            return None
        if entry.is_fed:
            taken = self._pages.try_take(self._reserved(entry))
            if taken is None:
                return None
            entry.pages = taken
        self._waiting.remove(entry)
        entry.slot = self._slots.pop()
        if entry.uses_penalties:
            entry.penalty_slot = self._penalty_slots.pop()
        self._running.append(entry)
        return entry

    def _predicted_peak(self, candidate: Entry) -> int:
        alive = [*self._running, candidate]
        growing = [e for e in alive if not e.is_fed]
        peak = memory.peak_pages(
            [e.known for e in growing],
            [self._remaining(e) for e in growing],
            page_size=self._limits.page_size,
        )
        return peak + sum(self._reserved(e) for e in alive if e.is_fed)

    def _reserved(self, entry: Entry) -> int:
        """Pages that a fed request holds while it runs."""
        return -(-entry.limit // self._limits.page_size)

    def _remaining(self, entry: Entry) -> int:
        most = entry.limit - entry.known
        if entry.ends_at_limit:
            return most
        return self._lengths.remaining(generated=entry.known - entry.prompt_len, most=most)

    def _grow(self, entry: Entry, length: int, *, preempt: bool = True) -> bool:
        """Gets pages for `length` more tokens, from requests of lower rank if need be."""
        needed = -(-(entry.computed + length) // self._limits.page_size) - len(entry.pages)
        while needed > 0:
            taken = self._pages.try_take(needed)
            if taken is not None:
                entry.pages.extend(taken)
                return True
            victim = self._find_victim() if preempt else None
            if victim is None or victim is entry:
                return False  # keeps what it has and waits: others of higher rank are running
            self._preempt(victim)
        return True

    def _find_victim(self) -> Entry | None:
        """The request of lowest rank that has no row in the step being planned, and is not fed."""
        mine = (e for e in self._running if not e.is_fed)
        idle = (e for e in mine if e.request_id not in self._in_this_step)
        return max(idle, key=lambda e: e.rank, default=None)

    def _preempt(self, entry: Entry, *, count: bool = True) -> None:
        """Takes everything from a running request; it computes its known tokens again later."""
        self._leave(entry)
        entry.computed = 0
        self._enqueue(entry)
        self._num_preemptions += count

    def _leave(self, entry: Entry) -> None:
        assert entry.slot is not None
        self._pages.give_back(entry.pages)
        self._slots.append(entry.slot)
        if entry.penalty_slot is not None:
            self._penalty_slots.append(entry.penalty_slot)
        entry.pages, entry.slot, entry.penalty_slot = [], None, None
        self._running.remove(entry)

    def _launch(self, entry: Entry, length: int) -> Row:
        assert entry.slot is not None
        start = entry.computed
        entry.computed += length
        self._in_this_step.add(entry.request_id)
        samples = entry.samples_next
        if samples:
            entry.known += not entry.is_fed
            entry.in_flight += 1
        return Row(
            request_id=entry.request_id,
            start=start,
            length=length,
            slot=entry.slot,
            penalty_slot=entry.penalty_slot,
            pages=tuple(entry.pages),
            samples=samples,
            is_first=start == 0,
        )

    def commit(self, plan: StepPlan) -> None:
        """Counts a step's samples as arrived on the host.

        A request that reached its limit is forgotten; ended ones were by `finish`.
        """
        for row in plan.rows:
            entry = self._entries.get(row.request_id)
            if entry is None or not row.samples:
                continue
            entry.in_flight -= 1
            if entry.is_complete and not entry.in_flight:
                if not entry.ends_at_limit:
                    self._lengths.add(entry.limit - entry.prompt_len)
                self._forget(entry)

    def restart(self) -> list[str]:
        """Takes back all that was launched and not committed; every request waits, with no pages.

        Returns:
            The requests that this changed, in order of rank: what was launched holds no others
            but ended and preempted ones.
        """
        busy = (e for e in self._entries.values() if e.slot is not None or e.in_flight)
        changed = sorted(busy, key=lambda e: e.rank)
        for entry in changed:
            if entry.slot is not None:
                self._leave(entry)
            entry.known -= entry.in_flight
            entry.in_flight = entry.computed = 0
            if entry not in self._waiting:
                self._enqueue(entry)
        return [entry.request_id for entry in changed]

    def restrict(self, only: Collection[str] | None, *, most: int) -> None:
        """Chooses who may begin to run from now on.

        Args:
            only: These requests; None for all.
            most: So many run at once.
        """
        self._only, self._most_running = only, most

    def finish(self, request_id: str, *, output_len: int | None = None) -> None:
        """Ends a request early: end of text, a stop string, an abort or a failure.

        Args:
            request_id: Which; unknown ids are ignored, since an abort may come late.
            output_len: Its length, if it ended by itself: the scheduler learns from it.
        """
        entry = self._entries.get(request_id)
        if entry is None:
            return
        if output_len is not None:
            self._lengths.add(output_len)
        self._forget(entry)

    def _forget(self, entry: Entry) -> None:
        if entry.slot is not None:
            self._leave(entry)
        elif entry in self._waiting:
            self._waiting.remove(entry)
        del self._entries[entry.request_id]

    def check(self) -> None:
        """Raises AssertionError if the class invariant is broken."""
        self._pages.check()
        held = [page for entry in self._running for page in entry.pages]
        assert len(held) == len(set(held)), "two requests hold one page"
        assert len(held) + self._pages.num_free == self._pages.num_pages, "a page is lost"
        slots = [e.slot for e in self._running] + self._slots
        assert sorted(s for s in slots if s is not None) == list(range(len(slots))), "slots"
        assert len(slots) == self._limits.max_requests, "a slot is lost"
        for entry in self._running:
            assert len(entry.pages) * self._limits.page_size >= entry.computed, "too few pages"
            held_all = len(entry.pages) == self._reserved(entry)
            assert held_all or not entry.is_fed, "a fed request was robbed"
        for entry in self._waiting:
            assert not entry.pages and entry.slot is None and entry.computed == 0, "waiting holds"
