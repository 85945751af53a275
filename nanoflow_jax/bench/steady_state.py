"""Steps of a server under constant load, found by the scheduler alone: no device runs.

Requests of one kind come without end. The scheduler is turned until as many are young as old, and
what it then decides for some steps in a row is kept. Any plan can run these steps, again and again
and always the same: which tokens come does not change what is decided, as no request ends early.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from nanoflow_jax import request as request_lib
from nanoflow_jax.engine import inputs as inputs_lib
from nanoflow_jax.engine import runner, sequence
from nanoflow_jax.kv_cache import pages
from nanoflow_jax.scheduler import scheduler as scheduler_lib
from nanoflow_jax.scheduler import step_plan
from nanoflow_jax.scheduler.buckets import Bucket

# Over what is expected, as how many run at once goes up and down: rows, and pages for them.
_MORE_ROWS, _MORE_PAGES = 1.125, 1.04


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lengths:
    """Of every request.

    Attributes:
        prompt: Tokens that come in.
        output: Tokens to generate. 0 is prompts alone, of which one token is drawn all the same.
    """

    prompt: int
    output: int

    def __str__(self) -> str:
        return f"{self.prompt}/{self.output}"

    @property
    def decoded(self) -> int:
        """Tokens of a request that come in as decode rows: the first is the prompt's own."""
        return max(self.output - 1, 0)

    @property
    def longest(self) -> int:
        """Tokens of a whole request."""
        return self.prompt + max(self.output, 1)


def parse_lengths(text: str) -> Lengths:
    """Lengths from PROMPT/OUTPUT.

    Raises:
        ValueError: It has another form, or a prompt is empty.
    """
    prompt, slash, output = text.partition("/")
    if not (slash and prompt.isdecimal() and output.isdecimal()) or int(prompt) < 1:
        raise ValueError(f"{text!r} is not PROMPT/OUTPUT in tokens, such as 512/512 or 512/0")
    return Lengths(prompt=int(prompt), output=int(output))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """A dense batch that is kept full.

    Attributes:
        lengths: Of the requests.
        dense_batch: Tokens of a step.
    """

    lengths: Lengths
    dense_batch: int

    @property
    def decode_rows(self) -> int:
        """Requests with one token to do, on average, if memory allows."""
        one = self.lengths
        return round(self.dense_batch * one.decoded / (one.prompt + one.decoded))

    @property
    def bucket(self) -> Bucket:
        """The one step shape."""
        chunks = min(-(-self.dense_batch // self.lengths.prompt) + 1, self.dense_batch)
        rows = min(round(_MORE_ROWS * self.decode_rows) + chunks, self.dense_batch)
        return Bucket(tokens=self.dense_batch, decode_rows=rows, prefill_rows=chunks)

    def num_pages(self, page_size: int) -> int:
        """Pages that its requests hold, on average, and as many more as may begin at once."""
        one, bucket = self.lengths, self.bucket
        mean = -(-(one.prompt + one.decoded // 2) // page_size) + 1
        whole = -(-one.longest // page_size)
        return round(_MORE_PAGES * self.decode_rows * mean) + (bucket.prefill_rows + 1) * whole


def fit(load: Load, *, num_pages: int, page_size: int, granule: int) -> Load:
    """The largest dense batch up to that of the load that the memory keeps full.

    Args:
        load: What is wanted.
        num_pages: Of the cache.
        page_size: Tokens in a page.
        granule: The dense batch found is a multiple, unless it is the one wanted.

    Raises:
        ValueError: The cache is too small for a granule.
    """
    found = load
    while found.num_pages(page_size) > num_pages:
        tokens = (found.dense_batch - 1) // granule * granule
        if tokens < granule:
            raise ValueError(
                f"a cache of {num_pages} pages of {page_size} tokens keeps no dense batch of "
                f"{granule} tokens full with requests of {load.lengths}; take shorter --lengths or "
                "raise --cache_memory_fraction"
            )
        found = dataclasses.replace(load, dense_batch=tokens)
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One step to be run.

    Attributes:
        forwards: What its forward reads, by the name of a mode.
        sample: What its sample reads; None if no row samples.
        tokens: In the dense batch, padding left out.
        decode_rows: Requests with one token to do.
        context_tokens: Cached tokens that they see.
        samplers: Requests for which a token is drawn, in the order of the rows of logits.
    """

    forwards: Mapping[str, runner.ForwardInputs]
    sample: runner.SampleInputs | None
    tokens: int
    decode_rows: int
    context_tokens: int
    samplers: tuple[str, ...]

    @property
    def sampled_rows(self) -> int:
        """Rows that sample, the first of the logits."""
        return len(self.samplers)


class Simulation:
    """The host's side of an engine whose device is left out.

    Invariant: a token counts as sampled once the step after its own has been planned, as in an
    engine that plans ahead.
    """

    def __init__(
        self, load: Load, *, num_pages: int, page_size: int, vocab_size: int, seed: int = 0
    ) -> None:
        """Begins with nothing running.

        Args:
            load: What is kept up.
            num_pages: Of the cache.
            page_size: Tokens in a page.
            vocab_size: Prompts have tokens below it.
            seed: Of the prompts, and of how far each of the first requests is.
        """
        self._load, self._vocab_size = load, vocab_size
        bucket = load.bucket
        self._scheduler = scheduler_lib.Scheduler(
            scheduler_lib.Limits(
                max_requests=bucket.decode_rows,
                dense_batch=load.dense_batch,
                page_size=page_size,
                penalty_requests=0,
            ),
            [bucket],
            pages.PageAllocator(num_pages),
        )
        self._sequences: dict[str, sequence.Sequence] = {}
        self._random = np.random.default_rng(seed)
        self._in_flight: step_plan.StepPlan | None = None
        self._added = 0

    def warm_up(self) -> int:
        """Turns until the first requests are gone; how many steps that took."""
        one, tokens = self._load.lengths, self._load.dense_batch
        # While prompts come in, half the tokens of a step are already decode rows.
        filled = 2 * (self._load.decode_rows * one.prompt // tokens + 1)
        turns = filled + one.decoded + 2 * (one.prompt // tokens + 1)
        for _ in range(turns):
            self._commit_after(self._plan())
        return turns

    def record(self, count: int, builders: Mapping[str, inputs_lib.InputBuilder]) -> list[Step]:
        """The next steps.

        Args:
            count: How many.
            builders: What writes them for each mode; several modes may share one.

        Returns:
            As many, in order.
        """
        found = []
        for _ in range(count):
            plan = self._plan()
            each = {id(builder): builder for builder in builders.values()}
            built = {key: one.build(plan, self._sequences) for key, one in each.items()}
            found.append(
                Step(
                    forwards={name: built[id(builder)] for name, builder in builders.items()},
                    # The rows of logits lie alike in all plans.
                    sample=next(iter(each.values())).build_sample(plan, self._sequences),
                    tokens=plan.num_tokens,
                    decode_rows=len(plan.decode),
                    context_tokens=sum(row.start + 1 for row in plan.decode),
                    samplers=tuple(row.request_id for row in plan.rows if row.samples),
                )
            )
            self._commit_after(plan)
        return found

    def _plan(self) -> step_plan.StepPlan:
        while self._scheduler.num_waiting <= self._load.bucket.prefill_rows:
            self._add()
        plan = self._scheduler.plan()
        assert plan is not None, "nothing can run under a constant load"
        return plan

    def _add(self) -> None:
        """One more request; the first ones end early, so that later some are always near it."""
        one, name = self._load.lengths, str(self._added)
        most = max(one.output, 1)
        is_early = self._added < self._load.decode_rows
        output = int(self._random.integers(1, most + 1)) if is_early else most
        prompt = self._random.integers(0, self._vocab_size, one.prompt).tolist()
        made = sequence.make_sequence(
            request_lib.Request(
                request_id=name,
                prompt_ids=prompt,
                params=request_lib.SamplingParams(
                    max_tokens=output, temperature=0.0, ignore_eos=True
                ),
            ),
            vocab_size=self._vocab_size,
            max_context_len=one.longest,
            eos_ids=(),
        )
        self._scheduler.add(
            name,
            prompt_len=one.prompt,
            limit=made.limit,
            priority=0,
            uses_penalties=False,
            ends_at_limit=True,
        )
        self._sequences[name] = made
        self._added += 1

    def _commit_after(self, plan: step_plan.StepPlan) -> None:
        """Takes the step before a planned one as done: its tokens are some or other."""
        done, self._in_flight = self._in_flight, plan
        if done is None:
            return
        self._scheduler.commit(done)
        for row in done.rows:
            if not row.samples:
                continue
            made = self._sequences[row.request_id]
            made.token_ids.append(int(self._random.integers(self._vocab_size)))
            if len(made.token_ids) == made.limit:
                del self._sequences[row.request_id]

    def check(self) -> None:
        """Raises AssertionError if an invariant is broken."""
        self._scheduler.check()


def describe(load: Load) -> dict[str, Any]:
    """A load for a result's manifest."""
    bucket = load.bucket
    return {
        "dense_batch": load.dense_batch,
        "bucket": str(bucket),
        "prompt": load.lengths.prompt,
        "output": load.lengths.output,
    }
