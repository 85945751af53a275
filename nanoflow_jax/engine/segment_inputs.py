"""Deals a step's rows to the segments of a model: each runs the rows whose layers it has."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from nanoflow_jax.engine import inputs, programs, runner
from nanoflow_jax.engine.sequence import Sequence as TokenSequence
from nanoflow_jax.models import architecture
from nanoflow_jax.scheduler import buckets as bucket_lib
from nanoflow_jax.scheduler import step_plan


class SegmentStep(NamedTuple):
    """A segment's part of a step: its number, its bucket, and what its program reads."""

    segment: int
    bucket: bucket_lib.Bucket
    vector: programs.Vector
    rows: programs.Vector


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentInputs:
    """What the host sends for a forward in segments. No array here is written after launch.

    Attributes:
        steps: The segments that have anything to do, in order.
        entering: Places in the step and hidden states that come from outside, padded to the size of
            a program; None if there are none.
        leaving: Places in the step of what leaves, padded too.
        leavers: Whose that is, in order.
        resets: See `runner.ForwardInputs`.
        prompt_slices: See `runner.ForwardInputs`; their tokens are places in the step.
    """

    steps: Sequence[SegmentStep]
    entering: tuple[programs.Vector, Float[np.ndarray, "n D"]] | None
    leaving: programs.Vector | None
    leavers: Sequence[runner.Leaver]
    resets: Sequence[programs.Vector]
    prompt_slices: Sequence[runner.PromptSlice]


class SegmentInputBuilder:
    """Builds the host's part of each step of a model in segments.

    Invariant: `_ending` has the rows that reach the head in the plan that was built last.
    """

    def __init__(
        self,
        whole: inputs.InputBuilder,
        spans: Sequence[architecture.Span],
        *,
        num_layers: int,
        bucket_list: Sequence[bucket_lib.Bucket],
        hidden_size: int,
        dtype: np.dtype[Any],
    ) -> None:
        """Nothing is built.

        Args:
            whole: Writes what one program reads.
            spans: The segments, in order.
            num_layers: L.
            bucket_list: What each segment is compiled for, sorted.
            hidden_size: D.
            dtype: Of hidden states.
        """
        self._whole, self._spans, self._num_layers = whole, tuple(spans), num_layers
        self._all = architecture.Span(0, num_layers)
        self._buckets, self._counts = tuple(bucket_list), row_counts(bucket_list)
        self._hidden_size, self._dtype = hidden_size, dtype
        self._ending: step_plan.StepPlan | None = None

    def build(
        self, plan: step_plan.StepPlan, sequences: Mapping[str, TokenSequence]
    ) -> SegmentInputs:
        """What a step's forward reads; see `inputs.InputBuilder.build`."""
        made = [sequences[row.request_id] for row in plan.rows]
        spans = [self._all if one.fed is None else one.fed.span for one in made]
        places = _places(plan.rows)
        here = [
            tuple(i for i, span in enumerate(spans) if span.covers(segment))
            for segment in self._spans
        ]
        known: dict[tuple[int, ...], _Dealt] = {}
        resets: Sequence[programs.Vector] = ()
        slices: Sequence[runner.PromptSlice] = ()
        self._ending = None
        if here[-1] and self._spans[-1].stop == self._num_layers:
            self._ending = self._only(plan, here[-1])
            last = self._whole.build(self._ending, sequences)
            dealt = self._deal(self._ending, here[-1], places, last.vector)
            known[here[-1]], resets = dealt, last.resets
            slices = [_at_places(part, dealt.rows) for part in last.prompt_slices]
        for chosen in dict.fromkeys(here):
            if chosen and chosen not in known:
                some = self._only(plan, chosen)
                vector = self._whole.vector(some, sequences)
                known[chosen] = self._deal(some, chosen, places, vector)
        leaving = [i for i, span in enumerate(spans) if span.stop < self._num_layers]
        return SegmentInputs(
            steps=[SegmentStep(i, *known[chosen]) for i, chosen in enumerate(here) if chosen],
            entering=self._entering(plan, places, made),
            leaving=self._padded([places[i] for i in leaving], fill=0) if leaving else None,
            leavers=[_leaver(plan.rows[i]) for i in leaving],
            resets=resets,
            prompt_slices=slices,
        )

    def build_sample(
        self, plan: step_plan.StepPlan, sequences: Mapping[str, TokenSequence]
    ) -> runner.SampleInputs | None:
        """What the sample of the step that was built last reads; see `inputs.InputBuilder`."""
        if self._ending is None:
            return None
        return self._whole.build_sample(self._ending, sequences)

    def _only(self, plan: step_plan.StepPlan, chosen: Sequence[int]) -> step_plan.StepPlan:
        """A plan of some of the rows, in a bucket of their own."""
        if len(chosen) == len(plan.rows):
            return plan
        count = len(plan.decode)
        decode = tuple(plan.decode[i] for i in chosen if i < count)
        chunks = tuple(plan.chunks[i - count] for i in chosen if i >= count)
        bucket = bucket_lib.pick_bucket(
            self._buckets,
            tokens=len(decode) + sum(row.length for row in chunks),
            decode_rows=len(decode),
            prefill_rows=len(chunks),
        )
        return step_plan.StepPlan(decode=decode, chunks=chunks, bucket=bucket)

    def _deal(
        self,
        some: step_plan.StepPlan,
        chosen: Sequence[int],
        places: Sequence[programs.Vector],
        vector: programs.Vector,
    ) -> "_Dealt":
        """Says where each token of a bucket is in the step."""
        rows = np.full(some.bucket.tokens, self._buckets[-1].tokens, np.int32)
        rows[self._whole.places(some)] = np.concatenate([places[i] for i in chosen])
        return _Dealt(some.bucket, vector, rows)

    def _entering(
        self,
        plan: step_plan.StepPlan,
        places: Sequence[programs.Vector],
        made: Sequence[TokenSequence],
    ) -> tuple[programs.Vector, Float[np.ndarray, "n D"]] | None:
        """Takes what waits to enter with this step."""
        found: list[Float[np.ndarray, "n D"]] = []
        entering = []
        for row, place, sequence in zip(plan.rows, places, made, strict=True):
            if sequence.fed is None:
                continue
            taken = sequence.fed.take(row.start, row.length)
            if taken:
                entering.append(place)
                found += taken
        if not found:
            return None
        rows = self._padded(entering, fill=self._buckets[-1].tokens)
        hidden = np.zeros((len(rows), self._hidden_size), self._dtype)
        np.concatenate(found, out=hidden[: sum(map(len, found))])
        return rows, hidden

    def _padded(self, places: Sequence[programs.Vector], *, fill: int) -> programs.Vector:
        count = sum(map(len, places))
        padded = np.full(next(n for n in self._counts if n >= count), fill, np.int32)
        padded[:count] = np.concatenate(places)
        return padded


class _Dealt(NamedTuple):
    """What the programs of all segments read that have the same rows to run."""

    bucket: bucket_lib.Bucket
    vector: programs.Vector
    rows: programs.Vector


def row_counts(bucket_list: Sequence[bucket_lib.Bucket]) -> tuple[int, ...]:
    """Sizes for which the programs are compiled through which rows enter and leave."""
    return tuple(sorted({bucket.tokens for bucket in bucket_list}))


def _places(rows: Sequence[step_plan.Row]) -> list[programs.Vector]:
    """Where the tokens of each row are in the step."""
    ends = itertools.accumulate(row.length for row in rows)
    return [
        np.arange(end - row.length, end, dtype=np.int32)
        for end, row in zip(ends, rows, strict=True)
    ]


def _at_places(part: runner.PromptSlice, rows: programs.Vector) -> runner.PromptSlice:
    """A slice of a bucket's tokens as one of the step's."""
    vector = part.vector.copy()
    vector[: part.count] = rows[vector[: part.count]]
    return dataclasses.replace(part, vector=vector)


def _leaver(row: step_plan.Row) -> runner.Leaver:
    return runner.Leaver(request_id=row.request_id, start=row.start, count=row.length)
