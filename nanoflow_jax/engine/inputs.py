"""Writes one step's plan into the vectors that its programs read."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int32

from nanoflow_jax.engine import programs, runner, sampling
from nanoflow_jax.engine.sequence import Sequence as TokenSequence
from nanoflow_jax.kv_cache import tiles
from nanoflow_jax.nanobatch import dealing
from nanoflow_jax.scheduler import step_plan


class StepBuilder(Protocol):
    """What an engine asks of whoever writes its steps; `InputBuilder` says what they mean."""

    def build(self, plan: step_plan.StepPlan, sequences: Mapping[str, TokenSequence]) -> Any: ...

    def build_sample(
        self, plan: step_plan.StepPlan, sequences: Mapping[str, TokenSequence]
    ) -> runner.SampleInputs | None: ...


class InputBuilder:
    """Builds the host's part of each step; keeps the packings of all programs."""

    def __init__(self, sizes: programs.Sizes, *, page_size: int, max_context_len: int) -> None:
        self._sizes = sizes
        self._page_size = page_size
        self._max_context_len = max_context_len
        self._bucket_plan = functools.cache(sizes.bucket_plan)
        self._forward_packing = functools.cache(functools.partial(programs.forward_packing, sizes))
        self._sample_packing = functools.cache(functools.partial(programs.sample_packing, sizes))

    def with_sizes(self, sizes: programs.Sizes) -> "InputBuilder":
        """The builder of an engine whose buckets run by other plans."""
        return InputBuilder(sizes, page_size=self._page_size, max_context_len=self._max_context_len)

    def build(
        self, plan: step_plan.StepPlan, sequences: Mapping[str, TokenSequence]
    ) -> runner.ForwardInputs:
        """What a step's forward reads.

        Args:
            plan: What to run.
            sequences: The requests in it, by the scheduler's id.
        """
        placement = self._place(plan)
        return runner.ForwardInputs(
            bucket=plan.bucket,
            vector=self._forward(plan, placement, sequences),
            resets=[
                self._reset(row, sequences[row.request_id])
                for row in plan.rows
                if row.is_first and row.penalty_slot is not None
            ],
            prompt_slices=self._prompt_slices(plan, placement, sequences),
        )

    def vector(
        self, plan: step_plan.StepPlan, sequences: Mapping[str, TokenSequence]
    ) -> programs.Vector:
        """What a forward of layers without a head reads; see `build`."""
        return self._forward(plan, self._place(plan), sequences)

    def places(self, plan: step_plan.StepPlan) -> Int32[np.ndarray, "n"]:
        """Where in the dense batch the tokens of a plan's rows are, row after row."""
        placement = self._place(plan)
        chunks = [placement.chunk_tokens(i) for i in range(len(plan.chunks))]
        return np.concatenate([placement.decode_tokens, *chunks])

    def _place(self, plan: step_plan.StepPlan) -> dealing.Placement:
        return self._bucket_plan(plan.bucket).dealer.place(
            len(plan.decode), [row.length for row in plan.chunks]
        )

    def build_sample(
        self, plan: step_plan.StepPlan, sequences: Mapping[str, TokenSequence]
    ) -> runner.SampleInputs | None:
        """What a step's sample reads; None when no row samples.

        Args:
            plan: What runs.
            sequences: The requests in it. One that ended since the forward was launched may be
                missing: its row draws some token, which nobody reads.
        """
        rows = [(i, row) for i, row in enumerate(r for r in plan.rows if r.samples)]
        rows = [(i, row) for i, row in rows if row.request_id in sequences]
        if not rows:
            return None
        wanted = {sequences[row.request_id].variant_at(row.start + row.length) for _, row in rows}
        order = list(sampling.SamplerVariant)
        least = max(map(order.index, wanted))
        variant = next(v for v in self._sizes.samplers if order.index(v) >= least)
        return runner.SampleInputs(
            variant=variant, vector=self._sample(plan, rows, sequences, variant)
        )

    def _forward(
        self,
        plan: step_plan.StepPlan,
        placement: dealing.Placement,
        sequences: Mapping[str, TokenSequence],
    ) -> programs.Vector:
        vector, views = self._forward_packing(plan.bucket).new()
        count, places = len(plan.decode), placement.decode_tokens
        starts = np.fromiter((row.start for row in plan.decode), np.int32, count)
        views["positions"][places] = starts
        views["offsets"][places] = starts % self._page_size
        views["decode_lens"][placement.decode_rows] = starts + 1
        for row, place, table_row in zip(
            plan.decode, places.tolist(), placement.decode_rows.tolist(), strict=True
        ):
            tokens = sequences[row.request_id].token_ids
            if row.start < len(tokens):
                views["token_ids"][place] = tokens[row.start]
            else:  # sampled by the step in flight: its value is on the device only
                views["token_slots"][place] = row.slot
            views["pages"][place] = row.pages[row.start // self._page_size]
            views["decode_pages"][table_row, : len(row.pages)] = row.pages
        samples = np.fromiter((row.samples for row in plan.decode), bool, count)
        views["logit_tokens"][: samples.sum()] = places[samples]
        pieces = self._write_pieces(plan, placement, sequences, views)
        self._bucket_plan(plan.bucket).write(views, pieces)
        return vector

    def _write_pieces(
        self,
        plan: step_plan.StepPlan,
        placement: dealing.Placement,
        sequences: Mapping[str, TokenSequence],
        views: Mapping[str, np.ndarray],
    ) -> list[tiles.Chunk]:
        logit_row, found = sum(row.samples for row in plan.decode), []
        for piece in placement.pieces:
            row = plan.chunks[piece.chunk]
            start, end = row.start + piece.offset, row.start + piece.offset + piece.length
            span = slice(piece.start, piece.start + piece.length)
            positions = np.arange(start, end, dtype=np.int32)
            views["token_ids"][span] = sequences[row.request_id].token_ids[start:end]
            views["positions"][span] = positions
            pages = np.asarray(row.pages, np.int32)
            views["pages"][span] = pages[positions // self._page_size]
            views["offsets"][span] = positions % self._page_size
            views["prefill_pages"][piece.chunk, : len(pages)] = pages
            found.append(
                tiles.Chunk(start=piece.start, length=piece.length, position=start, row=piece.chunk)
            )
            if row.samples and end == row.start + row.length:
                views["logit_tokens"][logit_row] = span.stop - 1
                logit_row += 1
        return found

    def _sample(
        self,
        plan: step_plan.StepPlan,
        rows: Sequence[tuple[int, step_plan.Row]],
        sequences: Mapping[str, TokenSequence],
        variant: sampling.SamplerVariant,
    ) -> programs.Vector:
        size = self._sizes.padded_rows(plan.bucket)
        vector, views = self._sample_packing(rows=size, variant=variant).new()
        for i, row in rows:
            views["slots"][i] = row.slot
            if variant is sampling.SamplerVariant.GREEDY:
                continue
            sequence = sequences[row.request_id]
            p = sequence.params
            views["temperature"][i] = p.temperature
            views["top_k"][i] = p.top_k
            views["top_p"][i] = p.top_p
            views["min_p"][i] = p.min_p
            views["seed"][i] = sequence.seed
            views["position"][i] = row.start + row.length
            if variant is sampling.SamplerVariant.FULL:
                self._write_full(views, i, row, sequence)
        return vector

    def _write_full(
        self,
        views: Mapping[str, np.ndarray],
        i: int,
        row: step_plan.Row,
        sequence: TokenSequence,
    ) -> None:
        p = sequence.params
        if row.penalty_slot is not None:
            views["presence"][i] = p.presence_penalty
            views["frequency"][i] = p.frequency_penalty
            views["repetition"][i] = p.repetition_penalty
            views["count_slot"][i] = row.penalty_slot
        ids, values = sequence.bias
        bans = sequence.bans_at(row.start + row.length)
        views["bias_ids"][i, : len(ids)] = ids
        views["bias_values"][i, : len(ids)] = values
        views["bias_ids"][i, len(ids) : len(ids) + len(bans)] = bans
        views["bias_values"][i, len(ids) : len(ids) + len(bans)] = -np.inf
        if sequence.is_masked:
            sequence.fill_mask(views["allowed"][i], position=row.start + row.length)
            views["has_allowed"][i] = 1
        if p.logprobs is not None:
            views["wants_logprobs"][...] = 1

    def _reset(self, row: step_plan.Row, sequence: TokenSequence) -> programs.Vector:
        most = self._max_context_len
        vector = np.full(1 + 2 * most, self._sizes.vocab_size, np.int32)
        prompt_len = sequence.prompt_len
        output = sequence.token_ids[prompt_len:]
        assert row.penalty_slot is not None
        vector[0] = row.penalty_slot
        vector[1 : 1 + prompt_len] = sequence.token_ids[:prompt_len]
        vector[1 + most : 1 + most + len(output)] = output
        return vector

    def _prompt_slices(
        self,
        plan: step_plan.StepPlan,
        placement: dealing.Placement,
        sequences: Mapping[str, TokenSequence],
    ) -> list[runner.PromptSlice]:
        """Slices of the prompt positions whose next token is a prompt token, not yet reported."""
        found, most = [], programs.PROMPT_LOGPROB_ROWS
        for index, row in enumerate(plan.chunks):
            sequence = sequences[row.request_id]
            if sequence.params.prompt_logprobs is None:
                continue
            places = placement.chunk_tokens(index)
            begin = max(row.start, sequence.prompt_logprobs_done)
            end = min(row.start + row.length, sequence.prompt_len - 1)
            for start in range(begin, end, most):
                count = min(most, end - start)
                vector = np.zeros(2 * most, np.int32)
                vector[:count] = places[start - row.start : start - row.start + count]
                vector[most : most + count] = sequence.token_ids[start + 1 : start + count + 1]
                found.append(
                    runner.PromptSlice(request_id=row.request_id, count=count, vector=vector)
                )
            sequence.prompt_logprobs_done = max(end, sequence.prompt_logprobs_done)
        return found
