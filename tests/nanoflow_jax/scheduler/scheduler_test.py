import collections
import dataclasses
import re

import hypothesis
import pytest
from hypothesis import strategies as st

from nanoflow_jax.kv_cache import pages
from nanoflow_jax.scheduler import buckets, scheduler


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Job:
    """A request of a random workload.

    Attributes:
        stops_at: Tokens after which it ends by itself; its limit if None.
        arrives: Step at which it is added.
        aborts: Step at which it is aborted, if it is.
    """

    prompt_len: int
    output_len: int
    stops_at: int | None = None
    priority: int = 0
    uses_penalties: bool = False
    arrives: int = 0
    aborts: int | None = None

    @property
    def limit(self):
        return self.prompt_len + self.output_len


@dataclasses.dataclass
class _Track:
    """What the host would know of a request, counted apart from the scheduler."""

    job: _Job
    computed: int = 0
    sampled: int = 0
    arrived: int = 0
    ended: bool = False

    @property
    def known(self):
        return self.job.prompt_len + self.sampled


class _Host:
    """Plays the engine to a scheduler, one step ahead or not, and checks all that it answers."""

    def __init__(
        self,
        *,
        num_pages=400,
        page_size=4,
        max_requests=4,
        dense_batch=16,
        prefill_rows=4,
        penalty_requests=2,
        run_ahead=True,
        fixed_ways=False,
    ):
        self.limits = scheduler.Limits(
            max_requests=max_requests,
            dense_batch=dense_batch,
            page_size=page_size,
            penalty_requests=penalty_requests,
            fixed_ways=fixed_ways,
        )
        few = buckets.Bucket(tokens=max_requests, decode_rows=max_requests, prefill_rows=0)
        full = buckets.Bucket(
            tokens=dense_batch, decode_rows=max_requests, prefill_rows=prefill_rows
        )
        self.scheduler = scheduler.Scheduler(
            self.limits, [few, full], pages.PageAllocator(num_pages)
        )
        self.tracks = {}
        self.plans = []
        self._run_ahead = run_ahead
        self._in_flight = None

    def add(self, name, job):
        self.scheduler.add(
            name,
            prompt_len=job.prompt_len,
            limit=job.limit,
            priority=job.priority,
            uses_penalties=job.uses_penalties,
            ends_at_limit=job.stops_at is None,
        )
        self.tracks[name] = _Track(job=job)
        self.scheduler.check()

    def end(self, name, *, output_len=None):
        self.tracks[name].ended = True
        self.scheduler.finish(name, output_len=output_len)
        self.scheduler.check()

    def step(self):
        plan = self.scheduler.plan()
        self.scheduler.check()
        self.plans.append(plan)
        if plan is not None:
            self._check_plan(plan)
        before, self._in_flight = self._in_flight, plan
        self._commit(before)
        if not self._run_ahead:
            self._commit(self._in_flight)
            self._in_flight = None
        return plan

    def _check_plan(self, plan):
        limits, size = self.limits, self.limits.page_size
        assert 1 <= plan.num_tokens <= limits.dense_batch
        assert plan.bucket.holds(
            tokens=plan.num_tokens, decode_rows=len(plan.decode), prefill_rows=len(plan.chunks)
        )
        assert plan.rows == plan.decode + plan.chunks
        assert all(row.length == 1 for row in plan.decode)
        self._check_ways(plan)
        names = [row.request_id for row in plan.rows]
        assert len(names) == len(set(names)), "a request has two rows"
        held = [page for row in plan.rows for page in row.pages]
        assert len(held) == len(set(held)), "two rows share a page"
        for kind in ("slot", "penalty_slot"):
            taken = [s for row in plan.rows if (s := getattr(row, kind)) is not None]
            assert len(taken) == len(set(taken)), f"two rows share a {kind}"
        for row in plan.rows:
            track = self.tracks[row.request_id]
            assert not track.ended
            assert row.is_first == (row.start == 0)
            assert row.start in (0, track.computed), "a row skips tokens or repeats some"
            assert row.start + row.length <= track.known
            assert len(row.pages) == -(-(row.start + row.length) // size)
            assert (row.penalty_slot is not None) == track.job.uses_penalties
            track.computed = row.start + row.length
            assert row.samples == (track.computed == track.known)
            track.sampled += row.samples
            assert track.known <= track.job.limit, "a token past the limit"

    def _check_ways(self, plan):
        if not self.limits.fixed_ways:
            assert all(row.samples for row in plan.decode)
            return
        prompts = {name: track.job.prompt_len for name, track in self.tracks.items()}
        assert all(row.start >= prompts[row.request_id] for row in plan.decode)
        assert all(row.start + row.length <= prompts[row.request_id] for row in plan.chunks)

    def _commit(self, plan):
        if plan is None:
            return
        self.scheduler.commit(plan)
        self.scheduler.check()
        for row in plan.rows:
            track = self.tracks[row.request_id]
            if not row.samples or track.ended:
                continue  # nothing sampled, or a surplus token
            track.arrived += 1
            if track.arrived == track.job.stops_at:
                self.end(row.request_id, output_len=track.arrived)
            elif track.arrived == track.job.output_len:
                track.ended = True

    def fail(self):
        """Loses the step in flight and all that is cached."""
        lost, self._in_flight = self._in_flight, None
        changed = self.scheduler.restart()
        self.scheduler.check()
        assert self.scheduler.num_running == 0
        alive = {name for name, track in self.tracks.items() if not track.ended}
        assert set(changed) <= alive
        if lost is not None:
            assert {row.request_id for row in lost.rows if row.samples} & alive <= set(changed)
        for track in self.tracks.values():
            if not track.ended:
                track.computed, track.sampled = 0, track.arrived

    @property
    def is_idle(self):
        return not self.scheduler.has_work and self._in_flight is None

    def run(self, jobs, *, most_steps=3000, failures=()):
        """Runs jobs, named by their number, to the end; some steps fail."""
        queue = collections.deque(sorted(enumerate(jobs), key=lambda pair: pair[1].arrives))
        step = 0
        while queue or not self.is_idle:
            while queue and queue[0][1].arrives <= step:
                name, job = queue.popleft()
                self.add(str(name), job)
            for name, track in self.tracks.items():
                if track.job.aborts == step:
                    self.end(name)
            self.step()
            if step in failures:
                self.fail()
            step += 1
            assert step < most_steps, "the scheduler makes no progress"
        return step


_JOBS = st.lists(
    st.builds(
        _Job,
        prompt_len=st.integers(1, 40),
        output_len=st.integers(1, 24),
        stops_at=st.none() | st.integers(1, 24),
        priority=st.integers(-1, 1),
        uses_penalties=st.booleans(),
        arrives=st.integers(0, 30),
        aborts=st.none() | st.integers(0, 60),
    ),
    min_size=1,
    max_size=14,
)


def _check_tokens(host, jobs):
    for name, job in enumerate(jobs):
        wanted = min(job.output_len, job.stops_at or job.output_len)
        arrived = host.tracks[str(name)].arrived
        assert arrived == wanted or (job.aborts is not None and arrived < wanted)
    assert host.scheduler.num_running == host.scheduler.num_waiting == 0


@hypothesis.given(
    jobs=_JOBS,
    run_ahead=st.booleans(),
    num_pages=st.integers(16, 40),
    dense_batch=st.integers(4, 20),
    prefill_rows=st.integers(1, 4),
    failures=st.sets(st.integers(0, 60), max_size=4),
    fixed_ways=st.booleans(),
)
@hypothesis.settings(max_examples=200)
def test_every_request_gets_exactly_its_tokens_whatever_steps_fail(
    jobs, run_ahead, num_pages, dense_batch, prefill_rows, failures, fixed_ways
):
    host = _Host(
        num_pages=num_pages,
        run_ahead=run_ahead,
        dense_batch=dense_batch,
        prefill_rows=prefill_rows,
        fixed_ways=fixed_ways,
    )
    host.run(jobs, failures=failures)
    _check_tokens(host, jobs)


def _teach_short_outputs(host):
    """Sixteen requests that end after one token, though they might run long."""
    host.run([_Job(prompt_len=1, output_len=60, stops_at=1)] * 16)
    host.tracks.clear()


@hypothesis.given(
    jobs=st.lists(
        st.builds(
            _Job,
            prompt_len=st.integers(1, 24),
            output_len=st.just(40),
            stops_at=st.integers(20, 40),
            priority=st.integers(-1, 1),
            uses_penalties=st.booleans(),
            arrives=st.integers(0, 10),
        ),
        min_size=5,
        max_size=8,
    ),
    run_ahead=st.booleans(),
    fixed_ways=st.booleans(),
)
@hypothesis.settings(max_examples=100)
def test_preempted_requests_get_exactly_their_tokens_too(jobs, run_ahead, fixed_ways):
    host = _Host(num_pages=17, run_ahead=run_ahead, fixed_ways=fixed_ways)
    _teach_short_outputs(host)
    host.run(jobs)
    _check_tokens(host, jobs)
    hypothesis.event(f"preemptions: {min(host.scheduler.num_preemptions, 3)}")


def test_a_request_that_loses_its_pages_starts_over_and_samples_nothing_twice():
    host = _Host(num_pages=17, max_requests=3)
    _teach_short_outputs(host)
    host.plans.clear()
    jobs = [_Job(prompt_len=8, output_len=40, stops_at=40)] * 3
    host.run(jobs)
    _check_tokens(host, jobs)
    assert host.scheduler.num_preemptions > 0
    starts = collections.Counter(
        row.request_id for plan in host.plans if plan for row in plan.rows if row.is_first
    )
    assert starts["0"] == 1  # the first to arrive keeps its pages
    assert starts.total() == 3 + host.scheduler.num_preemptions


@pytest.mark.parametrize(
    ("fixed_ways", "first_chunk", "num_before"), [(False, 16, 1), (True, 8, 9)]
)
def test_what_was_generated_comes_back_in_chunks_or_one_by_one(fixed_ways, first_chunk, num_before):
    host = _Host(dense_batch=16, fixed_ways=fixed_ways)
    host.add("a", _Job(prompt_len=8, output_len=40))
    for _ in range(10):
        host.step()
    host.fail()  # nine tokens had arrived
    plans = [host.step() for _ in range(num_before + 1)]
    assert [row.length for row in plans[0].chunks] == [first_chunk]
    assert all(len(plan.decode) == 1 for plan in plans[1:])
    assert [plan.rows[0].samples for plan in plans] == [False] * num_before + [True]


def test_the_last_token_of_a_prompt_is_a_chunk_of_its_own_if_it_must_come_in_chunks():
    for fixed_ways in (False, True):
        host = _Host(dense_batch=16, fixed_ways=fixed_ways)
        host.add("a", _Job(prompt_len=17, output_len=3))
        plans = [host.step() for _ in range(2)]
        assert [len(plan.chunks) for plan in plans] == [1, int(fixed_ways)]
        assert plans[1].rows[0].samples


def test_certain_lengths_are_admitted_only_if_all_fit_to_the_end():
    # 8 + 25 tokens, all but the last one cached: 8 pages each. In 15 pages the second must begin
    # so much later that the first is gone before the second needs its last page.
    jobs = [_Job(prompt_len=8, output_len=25)] * 2
    host = _Host(num_pages=15)
    host.run(jobs)
    assert host.scheduler.num_preemptions == 0
    assert len(host.plans[0].rows) == 1
    assert max(len(plan.rows) for plan in host.plans if plan) == 2
    host = _Host(num_pages=17)
    host.run(jobs)
    assert host.scheduler.num_preemptions == 0
    assert len(host.plans[0].rows) == 2


def test_who_may_begin_and_how_many_run_can_be_restricted():
    host = _Host()
    for name in "abcd":
        host.add(name, _Job(prompt_len=2, output_len=9))
    host.scheduler.restrict({"b", "c", "d", "gone"}, most=2)
    assert [row.request_id for row in host.step().rows] == ["b", "c"]
    host.scheduler.restrict(None, most=4)
    assert {row.request_id for row in host.step().rows} == {"a", "b", "c", "d"}


def _work_at_hand(host):
    """Tokens that a step could take were it as large as wanted, by our own count."""
    alive = [t for t in host.tracks.values() if not t.ended and t.sampled < t.job.output_len]
    running = [t for t in alive if t.computed]
    waiting = [t for t in alive if not t.computed]
    free = host.limits.max_requests - len(running)
    return sum(t.known - t.computed for t in running + waiting[:free])


@hypothesis.given(
    jobs=st.lists(
        st.builds(_Job, prompt_len=st.integers(1, 60), output_len=st.integers(1, 12)),
        min_size=1,
        max_size=14,
    ),
    dense_batch=st.integers(4, 40),
    run_ahead=st.booleans(),
)
def test_steps_fill_the_dense_batch_exactly_when_there_is_work_enough(jobs, dense_batch, run_ahead):
    host = _Host(dense_batch=dense_batch, run_ahead=run_ahead)
    for name, job in enumerate(jobs):
        host.add(str(name), job)
    filled = 0
    while not host.is_idle:
        wanted = min(dense_batch, _work_at_hand(host))
        plan = host.step()
        assert (plan.num_tokens if plan else 0) == wanted
        filled += wanted == dense_batch
    hypothesis.event(f"full steps: {min(filled, 2)}")


def test_decodes_come_first_and_chunks_fill_the_rest():
    host = _Host(dense_batch=10)
    host.add("a", _Job(prompt_len=4, output_len=9))
    host.add("b", _Job(prompt_len=30, output_len=9))
    found = []
    for _ in range(5):
        plan = host.step()
        found.append([(row.request_id, row.start, row.length) for row in plan.rows])
    assert found == [
        [("a", 0, 4), ("b", 0, 6)],
        [("a", 4, 1), ("b", 6, 9)],
        [("a", 5, 1), ("b", 15, 9)],
        [("a", 6, 1), ("b", 24, 6)],
        [("a", 7, 1), ("b", 30, 1)],
    ]
    assert [len(plan.decode) for plan in host.plans] == [0, 1, 1, 1, 2]
    assert [str(plan.bucket) for plan in host.plans] == ["10:4:4"] * 4 + ["4:4:0"]


def test_the_last_token_of_a_prompt_alone_runs_as_a_decode_row():
    host = _Host(dense_batch=4)
    host.add("a", _Job(prompt_len=5, output_len=1))
    assert [row.length for row in host.step().chunks] == [4]
    plan = host.step()
    assert [(row.start, row.samples) for row in plan.decode] == [(4, True)]
    assert str(plan.bucket) == "4:4:0"


def test_lower_priority_numbers_run_first_and_equal_ones_by_arrival():
    host = _Host(max_requests=1, dense_batch=50)
    for name, priority in (("a", 1), ("b", 0), ("c", 1), ("d", -1), ("e", 0)):
        host.add(name, _Job(prompt_len=3, output_len=2, priority=priority))
    order = []
    while not host.is_idle:
        plan = host.step()
        order += [row.request_id for row in plan.chunks] if plan else []
    assert order == ["d", "b", "e", "a", "c"]


def test_pages_are_taken_from_the_lowest_rank_first():
    host = _Host(num_pages=17, max_requests=3)
    _teach_short_outputs(host)
    for name, priority in (("low", 5), ("high", 0), ("middle", 1)):
        host.add(name, _Job(prompt_len=12, output_len=30, stops_at=30, priority=priority))
    while not host.scheduler.num_preemptions:
        host.step()
    assert host.scheduler.num_running == 2
    plan = host.step()
    assert {row.request_id for row in plan.rows} == {"high", "middle"}


def test_requests_with_penalties_wait_for_a_row_of_the_penalty_table():
    host = _Host(max_requests=4, dense_batch=50, penalty_requests=2)
    for name in "abc":
        host.add(name, _Job(prompt_len=3, output_len=2, uses_penalties=True))
    first = host.step()
    assert [row.request_id for row in first.rows] == ["a", "b"]
    assert {row.penalty_slot for row in first.rows} == {0, 1}
    while not host.is_idle:
        host.step()
    assert all(track.arrived == 2 for track in host.tracks.values())


def test_a_finished_requests_pages_and_slot_go_to_the_next_at_once():
    host = _Host(num_pages=2, max_requests=1, dense_batch=8)
    host.add("a", _Job(prompt_len=8, output_len=1))
    host.add("b", _Job(prompt_len=8, output_len=1))
    # The last token of "a" is launched, so its pages are free though its value is not here yet.
    assert [row.request_id for row in host.step().rows] == ["a"]
    assert [row.request_id for row in host.step().rows] == ["b"]


def test_an_ended_request_leaves_nothing_behind():
    host = _Host()
    host.add("a", _Job(prompt_len=30, output_len=5))
    host.step()
    assert (host.scheduler.num_running, host.scheduler.has_work) == (1, True)
    host.end("a")
    assert (host.scheduler.num_running, host.scheduler.has_work) == (0, False)
    host.scheduler.finish("a")  # an abort that comes late
    host.scheduler.finish("never seen")
    host.scheduler.check()
    assert host.step() is None


def test_a_used_id_is_refused_until_its_request_has_ended():
    host = _Host()
    job = _Job(prompt_len=3, output_len=2)
    host.add("a", job)
    with pytest.raises(ValueError, match=r"^request id 'a' is already in use$"):
        host.add("a", job)
    while not host.is_idle:
        host.step()
    host.add("a", job)


def test_a_request_larger_than_the_cache_is_refused_alone():
    host = _Host(num_pages=5)
    host.add("fits", _Job(prompt_len=11, output_len=10))  # 20 tokens are cached, not the last
    message = (
        "no memory for this request: it may grow to 22 tokens and the cache holds 20; lower "
        "max_tokens, or raise --cache_num_pages or --cache_memory_fraction"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        host.add("too long", _Job(prompt_len=11, output_len=11))
    while not host.is_idle:
        host.step()
    assert host.tracks["fits"].arrived == 10


def test_check_notices_a_lost_page():
    host = _Host()
    host.add("a", _Job(prompt_len=30, output_len=5))
    host.step()
    host.scheduler._running[0].pages.pop()
    with pytest.raises(AssertionError, match="a page is lost"):
        host.scheduler.check()
