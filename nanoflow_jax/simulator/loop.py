"""A discrete-event run of the serving loop: arrivals, the product's scheduler, predicted steps.

The turn of a replica is that of `engine.Engine.step`: while the device runs step i, the host plans
step i + 1, and only then takes what step i gave, so that an end of text comes one step late.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int64

from nanoflow_jax.kv_cache import pages
from nanoflow_jax.nanobatch.operations import Resource
from nanoflow_jax.scheduler import buckets as bucket_list
from nanoflow_jax.scheduler import scheduler
from nanoflow_jax.scheduler.sharing import Sharing
from nanoflow_jax.scheduler.step_plan import StepPlan
from nanoflow_jax.simulator.step_time import StepTimes, StepWork
from nanoflow_jax.workload.traces import Requests


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served:
    """How requests are served.

    Attributes:
        limits: What a step may hold.
        buckets: Step shapes; a step takes as long as its bucket.
        num_pages: Of each replica's cache.
        num_replicas: Copies of the model that share the requests.
        host_s: That the host takes to plan a step and to take what it gave.
        run_ahead: Whether a step is planned while the one before it runs.
        max_tokens: What every request asks for at most: it ends earlier, and the scheduler does
            not know when. None: each asks for exactly what it gets.
    """

    limits: scheduler.Limits
    buckets: tuple[bucket_list.Bucket, ...]
    num_pages: int
    num_replicas: int = 1
    host_s: float = 0.0
    run_ahead: bool = True
    max_tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """A step that ran.

    Attributes:
        replica: Which one ran it.
        start_s: On the device.
        end_s: On the device.
        bucket_tokens: Of its shape.
        tokens: Computed.
        decode_rows: Of them, those of requests with one token to do.
        new_tokens: Prompt tokens computed for the first time, and tokens that requests got.
        pages_used: By all requests of the replica.
        num_running: Requests that hold pages.
        num_waiting: Requests that wait for them.
        busy_s: Of each resource, at what its datasheet promises.
    """

    replica: int
    start_s: float
    end_s: float
    bucket_tokens: int
    tokens: int
    decode_rows: int
    new_tokens: int
    pages_used: int
    num_running: int
    num_waiting: int
    busy_s: tuple[float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What happened.

    Attributes:
        requests: Those served.
        first_s: When each had its first token, shape [n].
        end_s: When each had its last token, shape [n].
        generated: Tokens that each got, shape [n].
        steps: In the order in which they began; those of several replicas side by side.
        num_preemptions: How often a request lost its pages.
        surplus_tokens: Sampled for requests that had already ended.
    """

    requests: Requests
    first_s: Float64[np.ndarray, "n"]
    end_s: Float64[np.ndarray, "n"]
    generated: Int64[np.ndarray, "n"]
    steps: tuple[StepRecord, ...]
    num_preemptions: int
    surplus_tokens: int


class _Requests:
    """What is known of each request, by its place."""

    def __init__(self, requests: Requests) -> None:
        self.prompt_lens: list[int] = requests.input_lens.tolist()
        self.output_lens: list[int] = requests.output_lens.tolist()
        self.arrivals_s: list[float] = requests.arrivals_s.tolist()
        count = len(self.prompt_lens)
        self.generated = [0] * count
        self.prefilled = [0] * count
        self.first_s = [0.0] * count
        self.end_s = [0.0] * count
        self.surplus_tokens = 0


@dataclasses.dataclass(frozen=True)
class _InFlight:
    plan: StepPlan
    record: StepRecord


class _Replica:
    """One engine: a host and the devices that share the model.

    Invariant: the device is free from `_device_free_s` on; `clock_s` is the host's.
    """

    def __init__(self, number: int, served: Served, times: StepTimes, requests: _Requests) -> None:
        self.clock_s = 0.0
        self._number, self._served, self._times = number, served, times
        self._requests = requests
        self._scheduler = scheduler.Scheduler(
            served.limits, served.buckets, pages.PageAllocator(served.num_pages)
        )
        self._device_free_s = 0.0
        self._in_flight: _InFlight | None = None
        self.ended: list[int] = []
        self.steps: list[StepRecord] = []

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work or self._in_flight is not None

    @property
    def num_preemptions(self) -> int:
        return self._scheduler.num_preemptions

    def add(self, index: int) -> None:
        """Takes a request in at its arrival, which an idle host has waited for."""
        known, most = self._requests, self._served.max_tokens
        if not self.has_work:
            self.clock_s = max(self.clock_s, known.arrivals_s[index])
        prompt_len = known.prompt_lens[index]
        length = known.output_lens[index] if most is None else most
        self._scheduler.add(
            str(index),
            prompt_len=prompt_len,
            limit=prompt_len + length,
            priority=0,
            uses_penalties=False,
            ends_at_limit=most is None,
        )

    def step(self) -> None:
        """One turn, in the order of `engine.Engine.step`."""
        before = self.clock_s
        plan = self._scheduler.plan()
        launched = self._launch(plan) if plan else None
        self._commit()
        self._in_flight = launched
        if not self._served.run_ahead:
            self._commit()
        stuck = launched is None and self.clock_s == before and self._scheduler.has_work
        assert not stuck, "nothing can run and nothing is in flight"

    def _launch(self, plan: StepPlan) -> _InFlight:
        self.clock_s += self._served.host_s
        time = self._times.predict(_work(plan))
        start = max(self.clock_s, self._device_free_s)
        self._device_free_s = start + time.device_s
        record = StepRecord(
            replica=self._number,
            start_s=start,
            end_s=self._device_free_s,
            bucket_tokens=plan.bucket.tokens,
            tokens=plan.num_tokens,
            decode_rows=len(plan.decode),
            new_tokens=0,
            pages_used=self._scheduler.num_pages_used,
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            busy_s=tuple(time.busy_s[one] for one in Resource),
        )
        return _InFlight(plan, record)

    def _commit(self) -> None:
        flight, self._in_flight = self._in_flight, None
        if flight is None:
            return
        self.clock_s = max(self.clock_s, flight.record.end_s)
        self._scheduler.commit(flight.plan)
        new = self._take_tokens(flight.plan, flight.record.end_s)
        self.steps.append(dataclasses.replace(flight.record, new_tokens=new))

    def _take_tokens(self, plan: StepPlan, now: float) -> int:
        """Counts what a step gave; ends requests that have all they wanted."""
        known, new = self._requests, 0
        for row in plan.rows:
            index = int(row.request_id)
            prompt_len, prefilled = known.prompt_lens[index], known.prefilled[index]
            if prefilled < prompt_len:
                done = min(row.start + row.length, prompt_len)
                new += max(done - prefilled, 0)
                known.prefilled[index] = max(done, prefilled)
            if row.samples:
                new += self._take_token(index, now)
        return new

    def _take_token(self, index: int, now: float) -> int:
        known, wanted = self._requests, self._requests.output_lens[index]
        if known.generated[index] == wanted:
            known.surplus_tokens += 1
            return 0
        known.generated[index] += 1
        if known.generated[index] == 1:
            known.first_s[index] = now
        if known.generated[index] == wanted:
            known.end_s[index] = now
            self.ended.append(index)
            if self._served.max_tokens is not None:
                self._scheduler.finish(str(index), output_len=wanted)
        return 1


def _work(plan: StepPlan) -> StepWork:
    """Of a step: a token sees all before it and itself."""
    rows = len(plan.decode)
    return StepWork(
        tokens=plan.bucket.tokens,
        decode_rows=rows,
        decode_context=sum([row.start for row in plan.decode]) + rows,
        chunk_pairs=sum(r.length * (r.start + (r.length + 1) / 2) for r in plan.chunks),
    )


def run(requests: Requests, served: Served, times: StepTimes) -> Run:
    """Serves all requests.

    Args:
        requests: In order of arrival.
        served: How.
        times: Predicts steps.

    Raises:
        ValueError: A request asks for more than the cache holds, or gets more than it asks for.
    """
    _check(requests, served)
    known = _Requests(requests)
    replicas = [_Replica(i, served, times, known) for i in range(served.num_replicas)]
    sharing, coming = Sharing(served.num_replicas), 0
    count = len(known.arrivals_s)
    while True:
        busy = [one for one in replicas if one.has_work]
        soonest = min(busy, key=lambda one: one.clock_s) if busy else None
        arrives_first = coming < count and (
            soonest is None or known.arrivals_s[coming] <= soonest.clock_s
        )
        if arrives_first:
            size = known.prompt_lens[coming] + (served.max_tokens or known.output_lens[coming])
            chosen = sharing.choose()
            replicas[chosen].add(coming)
            sharing.take(str(coming), size, by=chosen)
            coming += 1
        elif soonest is None:
            break
        else:
            soonest.step()
            for index in soonest.ended:
                sharing.give_back(str(index))
            soonest.ended.clear()
    return _finished(requests, known, replicas)


def _check(requests: Requests, served: Served) -> None:
    most = served.max_tokens
    longest = int(requests.output_lens.max())
    if most is not None and longest > most:
        raise ValueError(
            f"--max_tokens={most} is less than the {longest} tokens that a request gets; raise it"
        )


def _finished(requests: Requests, known: _Requests, replicas: Sequence[_Replica]) -> Run:
    steps = sorted((s for one in replicas for s in one.steps), key=lambda s: s.start_s)
    return Run(
        requests=requests,
        first_s=np.array(known.first_s),
        end_s=np.array(known.end_s),
        generated=np.array(known.generated),
        steps=tuple(steps),
        num_preemptions=sum(one.num_preemptions for one in replicas),
        surplus_tokens=known.surplus_tokens,
    )
