"""Several engines of one model, each on devices of its own, that work as one."""

import dataclasses
from collections.abc import Sequence

from nanoflow_jax import request as request_lib
from nanoflow_jax.engine import engine, interface
from nanoflow_jax.grammar import grammars as grammars_lib
from nanoflow_jax.scheduler import sharing


class Replicas:
    """A `TokenEngine` that hands each request to the engine with the least to do.

    One turn steps every engine that has work. Each has a step on its device while the host waits
    for that of another, so that none stands still for long.

    Invariant: `_sharing` has every request that an engine still reports on, and no other.
    """

    def __init__(self, engines: Sequence[interface.TokenEngine]) -> None:
        self._engines = engines
        self._sharing = sharing.Sharing(len(engines))

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return any(one.has_work for one in self._engines)

    @property
    def limits(self) -> engine.Limits:
        """What requests are checked against."""
        return self._engines[0].limits

    @property
    def grammars(self) -> grammars_lib.Grammars | None:
        """Makes matchers, for all engines."""
        return self._engines[0].grammars

    @property
    def counters(self) -> engine.Counters:
        """Totals of all engines."""
        names = [field.name for field in dataclasses.fields(engine.Counters)]
        return engine.Counters(
            **{name: sum(getattr(one.counters, name) for one in self._engines) for name in names}
        )

    @property
    def num_running(self) -> int:
        """Requests in the dense batches."""
        return sum(one.num_running for one in self._engines)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for room."""
        return sum(one.num_waiting for one in self._engines)

    @property
    def num_preemptions(self) -> int:
        """How often a request lost its pages."""
        return sum(one.num_preemptions for one in self._engines)

    @property
    def num_pages_used(self) -> int:
        """Pages of the caches that requests hold."""
        return sum(one.num_pages_used for one in self._engines)

    @property
    def num_late_compiles(self) -> int:
        """Programs compiled inside a step; anything but 0 is a defect."""
        return sum(one.num_late_compiles for one in self._engines)

    @property
    def compile_seconds(self) -> dict[str, float]:
        """Time to make each program, by replica and name."""
        return {
            f"replica {i}: {name}": seconds
            for i, one in enumerate(self._engines)
            for name, seconds in one.compile_seconds.items()
        }

    def add(self, request: request_lib.Request) -> None:
        """Takes a request in; its tokens come from later steps.

        Raises:
            ValueError: This request cannot be served; others are not affected.
        """
        name = request.request_id
        if self._sharing.owner(name) is not None:
            raise ValueError(f"request id {name!r} is already in use")
        chosen = self._sharing.choose()
        self._engines[chosen].add(request)
        most = self.limits.max_context_len
        size = len(request.prompt_ids) + (request.params.max_tokens or most)
        self._sharing.take(name, min(size, most), by=chosen)

    def abort(self, request_id: str, *, output_len: int | None = None) -> None:
        """Ends a request; nothing more is reported of it.

        Args:
            request_id: Which; one that has already ended is ignored.
            output_len: Its length, if it ended at a stop string rather than being dropped.
        """
        owner = self._sharing.owner(request_id)
        if owner is not None:
            self._engines[owner].abort(request_id, output_len=output_len)
            self._sharing.give_back(request_id)

    def step(self) -> list[request_lib.RequestUpdate]:
        """One turn of every engine that has work.

        Raises:
            JaxRuntimeError: A device fails whatever it is given.
        """
        updates = [update for one in self._engines if one.has_work for update in one.step()]
        for update in updates:
            if update.finish_reason is not None:
                self._sharing.give_back(update.request_id)
        return updates

    def check(self) -> None:
        """Raises AssertionError if an invariant is broken."""
        for one in self._engines:
            one.check()
        self._sharing.check()

    def close(self) -> None:
        """Waits for the steps in flight and frees the devices' memory."""
        for one in self._engines:
            one.close()
