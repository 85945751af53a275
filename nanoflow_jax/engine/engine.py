"""The hot loop: while the device runs step i, the host plans step i + 1."""

import dataclasses
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Float, Int32

from nanoflow_jax import request as request_lib
from nanoflow_jax.engine import fed as fed_lib
from nanoflow_jax.engine import inputs, plan_swap, recovery, runner, sequence, step_trace
from nanoflow_jax.grammar import grammars as grammars_lib
from nanoflow_jax.grammar import matcher as matcher_lib
from nanoflow_jax.scheduler import scheduler, step_plan

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request is checked against.

    Attributes:
        vocab_size: V.
        max_context_len: Most tokens of one request.
        eos_ids: End-of-text tokens.
    """

    vocab_size: int
    max_context_len: int
    eos_ids: Collection[int]


@dataclasses.dataclass(kw_only=True)
class Counters:
    """Totals since the engine started.

    Attributes:
        steps: Steps launched.
        decode_tokens: Decode rows run.
        prompt_tokens: Tokens of chunks run: prompts, recomputed ones included.
        generated_tokens: Tokens given to requests.
        surplus_tokens: Tokens sampled for requests that had already ended.
        failed_steps: Steps that the device gave up.
    """

    steps: int = 0
    decode_tokens: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    surplus_tokens: int = 0
    failed_steps: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class _InFlight:
    """A launched step and what is needed to read its results."""

    plan: step_plan.StepPlan
    launched: runner.Launched


class Engine:
    """Runs requests in dense batches and reports their tokens.

    Invariant: at most one step is in flight; every sequence is known to the scheduler.
    """

    def __init__(
        self,
        step_runner: runner.StepRunner,
        step_scheduler: scheduler.Scheduler,
        builder: inputs.StepBuilder,
        limits: Limits,
        *,
        grammars: grammars_lib.Grammars | None,
        run_ahead: bool,
        trace: step_trace.StepTrace,
        plans: plan_swap.PlanSwap | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner = step_runner
        self._scheduler = step_scheduler
        self._inputs = builder
        self._limits = limits
        self._grammars = grammars
        self._run_ahead = run_ahead
        self._trace = trace
        self._plans = plans
        self._clock = clock
        self._sequences: dict[str, sequence.Sequence] = {}
        self._keys: dict[str, str] = {}
        self._num_added = 0
        self._in_flight: _InFlight | None = None
        self._outbox: list[request_lib.RequestUpdate] = []
        self._left: list[fed_lib.LeftRows] = []
        self._recovery = recovery.Recovery(max_requests=step_scheduler.limits.max_requests)
        self.counters = Counters()

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        is_due = bool(self._outbox or self._left)
        return is_due or self._in_flight is not None or self._scheduler.has_work

    @property
    def limits(self) -> Limits:
        """What requests are checked against."""
        return self._limits

    @property
    def grammars(self) -> grammars_lib.Grammars | None:
        """Makes matchers; what is prepared there is added without waiting."""
        return self._grammars

    @property
    def num_running(self) -> int:
        """Requests in the dense batch."""
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        """Requests that wait for room."""
        return self._scheduler.num_waiting

    @property
    def num_preemptions(self) -> int:
        """How often a request lost its pages."""
        return self._scheduler.num_preemptions

    @property
    def num_pages_used(self) -> int:
        """Pages of the cache that requests hold."""
        return self._scheduler.num_pages_used

    @property
    def num_late_compiles(self) -> int:
        """Programs compiled inside a step; anything but 0 is a defect."""
        return self._runner.watch.num_late

    @property
    def compile_seconds(self) -> Mapping[str, float]:
        """Time to make each program."""
        return self._runner.compile_seconds

    def add(self, request: request_lib.Request, fed: fed_lib.Fed | None = None) -> None:
        """Takes a request in; its tokens come from later steps.

        Args:
            request: What is asked. Of one that is fed, the prompt says only how long it is.
            fed: If it runs some layers only, and what it runs comes with `feed`.

        Raises:
            ValueError: This request cannot be served; others are not affected.
        """
        if request.request_id in self._keys:
            raise ValueError(f"request id {request.request_id!r} is already in use")
        made = sequence.make_sequence(
            request,
            vocab_size=self._limits.vocab_size,
            max_context_len=self._limits.max_context_len,
            eos_ids=self._limits.eos_ids,
            matcher=self._try_matcher(request.params.grammar),
        )
        # A name of our own: a step in flight may still carry an ended request of the same id.
        key = str(self._num_added)
        self._scheduler.add(
            key,
            prompt_len=made.prompt_len,
            limit=made.limit if fed is None else fed.max_len,
            priority=request.priority,
            uses_penalties=made.params.uses_penalties,
            ends_at_limit=not made.ends and not made.params.stop and made.matcher is None,
            is_fed=fed is not None,
            draws=fed is None or not fed.leaves,
        )
        made.wait_for(fed)
        self._num_added += 1
        self._keys[request.request_id] = key
        self._sequences[key] = made

    def _try_matcher(self, grammar: request_lib.Grammar | None) -> matcher_lib.Matcher | None:
        if grammar is None:
            return None
        if self._grammars is None:
            raise ValueError(
                "this model has no tokenizer, so it cannot follow a grammar; leave grammar out, or "
                "serve a folder with a tokenizer.json"
            )
        return self._grammars.matcher(grammar)

    def feed(
        self,
        request_id: str,
        *,
        token_ids: Sequence[int] = (),
        hidden: Float[np.ndarray, "n D"] | None = None,
    ) -> None:
        """Gives a request that is fed its next rows: token ids, or hidden states.

        Args:
            request_id: One that has not ended.
            token_ids: Where it begins with the embedding.
            hidden: Elsewhere. Of one that draws, rows after the prompt come one by one, when the
                token of the one before was drawn.
        """
        key = self._keys[request_id]
        self._scheduler.feed(key, self._sequences[key].feed(token_ids, hidden))

    def truncate(self, request_id: str, position: int) -> None:
        """Forgets the rows of a request that is fed at and after a position.

        Nothing is reported of them any more, once this has returned; if it ended with one of them,
        it has ended.
        """
        self._settle()
        key = self._keys.get(request_id)
        if key is None:
            return  # it failed, or its last token was in flight
        self._sequences[key].truncate(position)
        self._scheduler.truncate(key, position)
        self._outbox = [one for one in self._outbox if one.request_id != request_id]
        self._left = [
            left if left.request_id != request_id else left.before(position) for left in self._left
        ]

    def _settle(self) -> None:
        """Waits for the step in flight, if any."""
        try:
            self._commit()
        except jax.errors.JaxRuntimeError as error:
            self._recover(error)

    def take_left(self) -> list[fed_lib.LeftRows]:
        """Hidden states that left since the last call, in order."""
        left, self._left = self._left, []
        return [one for one in left if len(one.hidden)]

    def abort(self, request_id: str, *, output_len: int | None = None) -> None:
        """Ends a request; nothing more is reported of it.

        Args:
            request_id: Which; one that has already ended is ignored.
            output_len: Its length, if it ended at a stop string rather than being dropped.
        """
        key = self._keys.get(request_id)
        if key is not None:
            self._end(key, output_len=output_len)

    def _end(self, key: str, *, output_len: int | None) -> None:
        self._scheduler.finish(key, output_len=output_len)
        ended = self._sequences.pop(key)
        del self._keys[ended.request.request_id]

    def step(self) -> list[request_lib.RequestUpdate]:
        """One turn. While the device runs step i, the host plans step i + 1.

        Raises:
            JaxRuntimeError: The device fails whatever it is given.
        """
        try:
            with self._runner.watch.forbid():
                plan = self._plan()
                forwarded = self._forward(plan) if plan else None
                if plan and self._needs_tokens(plan):
                    self._commit()
                launched = self._sample(plan, forwarded) if plan and forwarded else None
                self._commit()
                self._in_flight = launched
                if not self._may_run_ahead:
                    self._commit()
        except jax.errors.JaxRuntimeError as error:
            self._recover(error)
        updates, self._outbox = self._outbox, []
        return updates

    @property
    def _may_run_ahead(self) -> bool:
        """Whether a step is launched before the last one is known to be good."""
        return self._run_ahead and self._recovery.group is None

    def _plan(self) -> step_plan.StepPlan | None:
        while self._trace.is_due(self.counters.steps):
            self._commit()
            self._trace.turn()
        if self._plans is not None:
            self._inputs = self._plans.turn(self._inputs)
        if self._recovery.is_active and self._recovery.take_step(self._counts()):
            self._let_run()
        return self._scheduler.plan()

    def _counts(self) -> dict[str, int]:
        return {key: len(made.token_ids) for key, made in self._sequences.items()}

    def _recover(self, error: Exception) -> None:
        """After a failed step: computes its requests again, without the one that is to blame."""
        self.counters.failed_steps += 1
        self._in_flight = None
        self._fail_fed(error)
        counts = self._counts()
        ran = {key: counts[key] for key in self._start_over()}
        _LOG.error("a step of %d requests failed: %s", len(ran), error)
        self._runner.reset()
        _LOG.info("the requests of the failed step are computed again")
        guilty = self._recovery.blame(ran)
        if guilty is not None:
            message = f"the device failed on this request, also when it ran alone: {error}"
            self._fail(guilty, message)
        self._let_run()

    def _fail_fed(self, error: Exception) -> None:
        """Ends those whose cached rows went with the step, as they cannot be computed again."""
        message = f"the device failed, and with it went what was cached of this session: {error}"
        for key, made in list(self._sequences.items()):
            if made.fed is not None and made.fed.has_run:
                self._fail(key, message)

    def _let_run(self) -> None:
        """Lets those run whose turn it is, with nobody beside them that it is not."""
        if self._recovery.group is not None:
            self._start_over()
        self._scheduler.restrict(self._recovery.group, most=self._recovery.most_running)

    def _start_over(self) -> list[str]:
        """Takes back what was launched; see `Scheduler.restart`."""
        for made in self._sequences.values():
            made.prompt_logprobs_done = made.prompt_logprobs_told
        return self._scheduler.restart()

    def _forward(self, plan: step_plan.StepPlan) -> runner.Forwarded:
        self._note_starts(plan)
        forwarded = self._runner.forward(self._inputs.build(plan, self._sequences))
        self.counters.steps += 1
        self.counters.decode_tokens += len(plan.decode)
        self.counters.prompt_tokens += sum(row.length for row in plan.chunks)
        return forwarded

    def _note_starts(self, plan: step_plan.StepPlan) -> None:
        for row in plan.rows:
            made = self._sequences[row.request_id]
            if made.started_s is None:
                made.started_s = self._clock()

    def _needs_tokens(self, plan: step_plan.StepPlan) -> bool:
        """Whether a mask depends on a token that is still on the device."""
        rows = ((row, self._sequences[row.request_id]) for row in plan.rows if row.samples)
        return any(
            made.mask_needs_tokens and len(made.token_ids) < row.start + row.length
            for row, made in rows
        )

    def _sample(self, plan: step_plan.StepPlan, forwarded: runner.Forwarded) -> _InFlight:
        vectors = self._inputs.build_sample(plan, self._sequences)
        return _InFlight(plan=plan, launched=self._runner.sample(forwarded, vectors))

    def _commit(self) -> None:
        """Waits for the step in flight and hands its tokens to their requests."""
        flight, self._in_flight = self._in_flight, None
        if flight is None:
            return
        collected = self._runner.collect(flight.launched)
        self._tell_prompts(collected)
        self._tell_left(collected)
        sampling_rows = [row for row in flight.plan.rows if row.samples]
        self._scheduler.commit(flight.plan)
        for i, row in enumerate(sampling_rows):
            made = self._sequences.get(row.request_id)
            if made is None:
                self.counters.surplus_tokens += 1
                continue
            assert collected.rows is not None
            self._take_token(row.request_id, made, collected.rows[i])

    def _take_token(self, key: str, made: sequence.Sequence, row: Int32[np.ndarray, "X"]) -> None:
        token, is_ok = int(row[0]), bool(row[1])
        if is_ok and made.matcher is not None and token not in made.ends:
            made.matcher.advance(token)
        error = made.try_error(is_ok=is_ok)
        if error is not None:
            self._fail(key, error)
            return
        made.token_ids.append(token)
        self.counters.generated_tokens += 1
        reason = None
        if token in made.ends or made.meets_grammar:
            reason = request_lib.FinishReason.STOP
            self._end(key, output_len=made.num_generated)
        elif len(made.token_ids) >= made.limit:
            reason = request_lib.FinishReason.LENGTH
            self._end(key, output_len=None)
        wanted = made.params.logprobs
        # A grammar that may end takes an end-of-text token though the request ignores it.
        is_end = token in made.ends or (made.matcher is not None and token in self._limits.eos_ids)
        self._outbox.append(
            request_lib.RequestUpdate(
                request_id=made.request.request_id,
                token_ids=(token,),
                logprobs=() if wanted is None else (_logprobs(token, row[2:], wanted),),
                finish_reason=reason,
                stop_token_id=token if reason is request_lib.FinishReason.STOP and is_end else None,
                started_s=made.started_s if made.num_generated == 1 else None,
            )
        )

    def _fail(self, key: str, message: str) -> None:
        """Ends a request with an error of its own."""
        request_id = self._sequences[key].request.request_id
        self._end(key, output_len=None)
        self._outbox.append(
            request_lib.RequestUpdate(
                request_id=request_id,
                finish_reason=request_lib.FinishReason.ERROR,
                error=message,
            )
        )

    def _tell_prompts(self, collected: runner.Collected) -> None:
        """Reports the log-probabilities of prompt tokens that a step computed."""
        for part, rows in collected.prompt_rows:
            made = self._sequences.get(part.request_id)
            if made is None:
                continue
            wanted = made.params.prompt_logprobs
            assert wanted is not None
            targets = part.vector[len(part.vector) // 2 :]
            made.prompt_logprobs_told += part.count
            self._outbox.append(
                request_lib.RequestUpdate(
                    request_id=made.request.request_id,
                    prompt_logprobs=tuple(
                        _logprobs(int(targets[i]), rows[i], wanted) for i in range(part.count)
                    ),
                )
            )

    def _tell_left(self, collected: runner.Collected) -> None:
        for who, hidden in collected.left:
            made = self._sequences.get(who.request_id)
            if made is not None:
                name = made.request.request_id
                self._left.append(fed_lib.LeftRows(request_id=name, start=who.start, hidden=hidden))

    def check(self) -> None:
        """Raises AssertionError if an invariant is broken."""
        self._scheduler.check()
        assert len(self._keys) == len(self._sequences), "a request has two names"

    def close(self) -> None:
        """Waits for the step in flight, frees the device's memory and ends the grammars' process.

        Requests that are left get nothing more, and nothing can be added.
        """
        self._commit()
        self._trace.close()
        if self._plans is not None:
            self._plans.close()
        self._runner.close()
        if self._grammars is not None:
            self._grammars.close()


def _logprobs(token: int, row: Int32[np.ndarray, "X"], wanted: int) -> request_lib.TokenLogprobs:
    """Reads the columns that `programs` wrote: logprob, rank, top ids, top values."""
    count = (len(row) - 2) // 2
    wanted = min(wanted, count)  # a small vocabulary has no more
    values = row.view(np.float32)
    top = zip(row[2 : 2 + wanted], values[2 + count : 2 + count + wanted], strict=True)
    return request_lib.TokenLogprobs(
        token_id=token,
        logprob=float(values[0]),
        rank=int(row[1]),
        top=tuple((int(t), float(v)) for t, v in top),
    )
