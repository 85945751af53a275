"""Runs the batches of a server beside its live requests, each in a thread of its own.

Whatever ends the engine or the server, a batch goes on from its rows on the disk.
"""

import asyncio
import dataclasses
import logging
import threading
from collections.abc import Mapping
from concurrent import futures
from typing import Any

from nanoflow_jax.batch import record, resume, rows, run, source
from nanoflow_jax.serve import batch_model, batches
from nanoflow_jax.serve.batch_record import Batch, Problem, Status

_MAX_RETRY_S = 60.0
_ENDERS = 2  # Threads for batches that only want their end, which wait for no turn.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How batches run.

    Attributes:
        models: Names that rows may give to the model; its own is among them anyway.
        sampling: Fields of SamplingParams for what rows leave out.
        max_running: Batches at once; the others wait in order of arrival.
        lookahead: Choices of one batch that are handed to the engine ahead of need.
        priority: Of rows; their own, -1000 to 1000, is added, and stays above that of live ones.
        retry_s: Wait after the disk refused; doubled each time, up to a minute.
    """

    models: frozenset[str] = frozenset()
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    max_running: int = 2
    lookahead: int = 128
    priority: int = 3000
    retry_s: float = 5.0


@dataclasses.dataclass(eq=False, kw_only=True)
class _Work:
    """A batch in its thread."""

    batch_id: str
    takes_turn: bool
    model: batch_model.EngineModel
    nudged: threading.Event = dataclasses.field(default_factory=threading.Event)
    stopped: bool = False

    def nudge(self) -> None:
        """Has the thread look at once whether it should stop."""
        self.nudged.set()
        self.model.wake()


class BatchRunner:
    """Brings every batch of a store to its end."""

    def __init__(
        self,
        store: batches.BatchStore,
        engine: batch_model.Engine,
        texts: batch_model.Texts,
        identity: record.ModelIdentity,
        settings: Settings | None = None,
    ) -> None:
        """Prepares; `run` starts.

        Args:
            store: The batches.
            engine: Shared with live requests.
            texts: Its methods are called from several threads.
            identity: Of the model: a batch that was begun with another one fails.
            settings: How they run.
        """
        self._store = store
        self._engine = engine
        self._texts = texts
        self._identity = identity
        self._settings = settings or Settings()
        self._running: dict[str, _Work] = {}
        self._given_up: set[str] = set()
        self._log = logging.getLogger(__name__)

    async def run(self) -> None:
        """Runs until it is cancelled; batches are then left as they are, to go on later."""
        loop = asyncio.get_running_loop()
        changed = asyncio.Event()

        def on_change() -> None:
            loop.call_soon_threadsafe(changed.set)

        self._store.on_change(on_change)
        most = self._settings.max_running + _ENDERS
        pool = futures.ThreadPoolExecutor(most, thread_name_prefix="batch")
        tasks: set[asyncio.Task[None]] = set()
        try:
            while True:
                changed.clear()
                waiting = await asyncio.to_thread(self._store.unended)
                for work in self._due(waiting, loop):
                    task = loop.create_task(self._run(work, pool, changed))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                await changed.wait()
        finally:
            self._store.on_change(lambda: None)
            for work in self._running.values():
                work.stopped = True
                work.nudge()
            await asyncio.gather(*tasks)
            pool.shutdown(wait=False)

    def _due(self, waiting: list[Batch], loop: asyncio.AbstractEventLoop) -> list[_Work]:
        """What can start now, the oldest first; nudges what should stop."""
        due = []
        for batch in sorted(waiting, key=lambda batch: batch.status is Status.VALIDATING):
            wants_end = batch.status is Status.CANCELLING or batch.ending is not None
            if batch.id in self._running:
                if wants_end:
                    self._running[batch.id].nudge()
                continue
            num_turns = sum(work.takes_turn for work in self._running.values())
            is_full = num_turns >= self._settings.max_running
            if batch.id in self._given_up or (is_full and not wants_end):
                continue
            model = batch_model.EngineModel(
                self._engine,
                self._texts,
                loop,
                prefix=batch.id,
                priority=self._settings.priority,
            )
            work = _Work(batch_id=batch.id, takes_turn=not wants_end, model=model)
            self._running[batch.id] = work
            due.append(work)
        return due

    async def _run(
        self, work: _Work, pool: futures.ThreadPoolExecutor, changed: asyncio.Event
    ) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(pool, self._work, work)
        except Exception:
            # Left as it is on the disk: the next start of the server tries again.
            self._log.exception("batch %s cannot be brought to its end", work.batch_id)
            self._given_up.add(work.batch_id)
        finally:
            del self._running[work.batch_id]
            changed.set()

    def _work(self, work: _Work) -> None:
        """Brings a batch to its end, in its thread; waits and goes on when the disk refuses."""
        wait_s = self._settings.retry_s
        while not work.stopped:
            work.nudged.clear()
            try:
                self._advance(work)
                return
            except OSError as error:
                self._log.warning(
                    "batch %s waits %g s: %s; its finished rows are kept",
                    work.batch_id,
                    wait_s,
                    error,
                )
            if not work.stopped:
                work.nudged.wait(wait_s)
            wait_s = min(2 * wait_s, _MAX_RETRY_S)

    def _advance(self, work: _Work) -> None:
        batch = self._store.get(work.batch_id)
        if batch.ending is None:
            found: Problem | Status | None = Status.CANCELLED
            if batch.status is not Status.CANCELLING:
                found = self._try_answer(batch, work)
            if found is None:
                return
            if isinstance(found, Problem):
                self._store.finalize(batch.id, Status.FAILED, problems=(found,))
            else:
                self._store.finalize(batch.id, found)
        self._store.end(batch.id)

    def _try_answer(self, batch: Batch, work: _Work) -> Problem | Status | None:
        """Answers the rows that are left; None if the server stops before the last one."""
        try:
            return self._answer(batch, work)
        except record.JobChangedError as error:
            return Problem(
                code="server_changed",
                message=f"the server was started with other settings: {error.changes}. Finished "
                "rows are kept; make a new batch of the others",
            )
        except OSError:
            raise
        except Exception:
            self._log.exception("batch %s fails", batch.id)
            return Problem(
                code="server_error",
                message="the server failed on this batch; finished rows are kept, and the "
                "server's log says more",
            )

    def _answer(self, batch: Batch, work: _Work) -> Problem | Status | None:
        store = self._store
        if not store.files.has(batch.input_file_id):
            return Problem(code="file_not_found", message="the input file is no longer there")
        settings, identity = self._settings, self._identity
        options = resume.Options(
            input=store.files.path(batch.input_file_id),
            output=store.rows_path(batch.id),
            defaults=rows.Defaults(sampling=settings.sampling, seed=batch.seed),
            accepts=rows.Accepts(endpoint=batch.endpoint, models=settings.models | {identity.name}),
        )

        def report(state: run.State) -> None:
            totals = state.totals
            store.count(
                batch.id,
                total=state.num_rows,
                completed=totals.num_ok,
                failed=totals.num_failed,
            )

        def should_stop() -> bool:
            return work.stopped or store.get(batch.id).status is Status.CANCELLING

        with resume.open_job(options, identify=lambda: identity, shard_of=_all_lines) as job:
            if not job.num_rows:
                return Problem(code="empty_file", message="the input file has no rows")
            store.begin(batch.id, total=job.num_rows)
            job.run(
                work.model, lookahead=settings.lookahead, report=report, should_stop=should_stop
            )
            if job.is_finished:
                return Status.COMPLETED
        return None if work.stopped else Status.CANCELLED


def _all_lines(lines: source.JsonlSource, k: int, n: int) -> resume.Lines:
    assert (k, n) == (0, 1), "a server has all rows of a batch"
    return lines
