"""Runs steps as a chain of segments of a model, or of those that this engine holds."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from nanoflow_jax.engine import (
    compiler,
    drawing,
    executors,
    programs,
    runner,
    sampling,
    segment_inputs,
    segment_programs,
)
from nanoflow_jax.engine import ways as ways_lib
from nanoflow_jax.kv_cache import layout
from nanoflow_jax.models import transformer
from nanoflow_jax.parallel import placement as placement_lib
from nanoflow_jax.scheduler import buckets


class _Segment:
    """Weights and caches of one segment, and how its programs are called."""

    def __init__(self, part: transformer.Transformer) -> None:
        self.graph, state = nnx.split(part)
        self.weights, self.treedef = jax.tree.flatten(state)
        self.span, self.config = part.span, part.config
        self.kinds = tuple(
            (layer.spec, part.config.is_sparse(part.span.start + i))
            for i, layer in enumerate(part.layers)
        )
        self.program = f"layers {part.span.start}-{part.span.stop}"
        self.caches: list[Any] = []

    @property
    def begins(self) -> bool:
        return self.span.start == 0

    @property
    def ends(self) -> bool:
        return self.span.stop == self.config.num_layers

    @property
    def likeness(self) -> Any:
        """Equal for segments that one program serves."""
        shapes = tuple((w.shape, w.dtype, w.sharding) for w in self.weights)
        return self.begins, self.ends, self.kinds, shapes


class SegmentRunner:
    """The device side of an engine whose requests enter and leave between layers.

    Invariant: caches, hidden states and what is drawn from are those that the newest launched step
    leaves; older ones were donated to it.
    """

    def __init__(
        self,
        parts: Sequence[transformer.Transformer],
        *,
        kv_layout: layout.KvLayout,
        sizes: programs.Sizes,
        bucket_list: Sequence[buckets.Bucket],
        max_context_len: int,
        placement: placement_lib.Placement,
        threads: int,
        ways: Mapping[buckets.Bucket, ways_lib.Way],
        watch: compiler.CompileWatch,
        progress: Callable[[compiler.Compiled, int], None],
    ) -> None:
        self._sizes, self._layout, self._placement = sizes, kv_layout, placement
        self._segments = [_Segment(part) for part in parts]
        self._hidden_size = parts[0].config.hidden_size
        self._dtype = self._segments[0].weights[0].dtype
        self._smallest = min(bucket_list, key=lambda bucket: bucket.tokens)
        self._drawer = drawing.Drawer(sizes, placement, max_context_len=max_context_len)
        self._allocate()
        jobs = self._border_jobs(bucket_list)
        first_alike: dict[Any, _Segment] = {}
        for segment in self._segments:
            first = first_alike.setdefault(segment.likeness, segment)
            segment.program = first.program
        for segment in first_alike.values():
            jobs += [self._segment_job(segment, bucket, ways[bucket]) for bucket in bucket_list]
        last = self._segments[-1]
        if last.ends:
            jobs += self._drawer.jobs(
                last.graph,
                last.treedef,
                bucket_list=bucket_list,
                weights=last.weights,
                hidden_size=self._hidden_size,
                shares=self._shares(last),
            )
        self._programs = compiler.compile_all(jobs, threads=threads, progress=progress)
        self._drawer.use(self._programs)
        self.watch = watch

    def _allocate(self) -> None:
        """Makes empty caches and hidden states."""
        share = jax.eval_shape(self._layout.allocate)
        for segment in self._segments:
            segment.caches = [
                jax.tree.map(self._placement.zeros, share, self._layout.axes) for _ in segment.kinds
            ]
        shape = (self._sizes.dense_batch, self._hidden_size)
        self._hidden = jax.device_put(np.zeros(shape, self._dtype), self._placement.sharding(""))

    @property
    def state(self) -> Any:
        """All arrays that steps hand on."""
        caches = [segment.caches for segment in self._segments]
        return caches, self._hidden, self._drawer.state

    def _shares(self, segment: _Segment) -> programs.Shares:
        cache = jax.tree.map(self._placement.spec, self._layout.axes)
        return programs.Shares(
            placement=self._placement,
            caches=[cache] * len(segment.kinds),
            weights=[weight.sharding.spec for weight in segment.weights],
        )

    def _segment_job(
        self,
        segment: _Segment,
        bucket: buckets.Bucket,
        way: ways_lib.Way,
    ) -> compiler.Job:
        size = programs.forward_packing(self._sizes, bucket).size
        return compiler.Job(
            name=f"{segment.program} {bucket}",
            function=segment_programs.build_segment(
                segment.graph,
                segment.treedef,
                span=segment.span,
                num_layers=segment.config.num_layers,
                layout=self._layout,
                sizes=self._sizes,
                bucket=bucket,
                operations=way.operations,
                shares=self._shares(segment),
                keep_lanes=executors.keeps_lanes(way.executor),
            ),
            arguments=(
                drawing.abstract(segment.caches),
                drawing.abstract(self._hidden),
                drawing.abstract(self._drawer.last_tokens),
                drawing.abstract(segment.weights),
                drawing.int32_vector(size),
                drawing.int32_vector(bucket.tokens),
            ),
            donated=(0, 1),
            options=way.compiler_options,
        )

    def _border_jobs(self, bucket_list: Sequence[buckets.Bucket]) -> list[compiler.Job]:
        """What writes and reads hidden states at borders."""
        hidden, jobs = drawing.abstract(self._hidden), []
        for count in segment_inputs.row_counts(bucket_list):
            rows = drawing.int32_vector(count)
            new = jax.ShapeDtypeStruct((count, self._hidden_size), self._dtype)
            jobs.append(
                compiler.Job(
                    name=f"enter {count}",
                    function=segment_programs.enter,
                    arguments=(hidden, rows, new),
                    donated=(0,),
                )
            )
            jobs.append(
                compiler.Job(
                    name=f"leave {count}",
                    function=segment_programs.leave,
                    arguments=(hidden, rows),
                )
            )
        return jobs

    @property
    def compile_seconds(self) -> dict[str, float]:
        """Time each program took to compile, or to fetch from the compilation cache."""
        return {name: program.seconds for name, program in self._programs.items()}

    def forward(self, inputs: segment_inputs.SegmentInputs) -> runner.Forwarded:
        """Hands a forward to the device and returns at once."""
        self._drawer.reset_penalties(inputs.resets)
        if inputs.entering is not None:
            rows, new = inputs.entering
            self._hidden = self._programs[f"enter {len(rows)}"].call(self._hidden, rows, new)
        logits = None
        for index, bucket, vector, rows in inputs.steps:
            segment = self._segments[index]
            result = self._programs[f"{segment.program} {bucket}"].call(
                segment.caches,
                self._hidden,
                self._drawer.last_tokens,
                segment.weights,
                vector,
                rows,
            )
            segment.caches, self._hidden, logits = result.caches, result.hidden, result.logits
        return runner.Forwarded(
            logits=logits,
            hidden=self._hidden,
            prompt_slices=inputs.prompt_slices,
            left=self._launch_leaving(inputs),
        )

    def _launch_leaving(self, inputs: segment_inputs.SegmentInputs) -> runner.Left | None:
        if inputs.leaving is None:
            return None
        call = self._programs[f"leave {len(inputs.leaving)}"].call
        hidden = call(self._hidden, inputs.leaving)
        hidden.copy_to_host_async()
        return runner.Left(who=inputs.leavers, hidden=hidden)

    def sample(
        self, forwarded: runner.Forwarded, inputs: runner.SampleInputs | None
    ) -> runner.Launched:
        """See `runner.Runner.sample`."""
        return runner.launch_draws(self._drawer, self._segments[-1].weights, forwarded, inputs)

    def collect(self, launched: runner.Launched) -> runner.Collected:
        """See `runner.Runner.collect`."""
        return runner.collect(launched)

    def reset(self) -> None:
        """See `runner.Runner.reset`, whose errors it raises."""
        for array in jax.tree.leaves(self.state):
            array.delete()  # there may be no room for both
        self._allocate()
        self._drawer.allocate()
        bucket = self._smallest
        vector = programs.forward_packing(self._sizes, bucket).new()[0]
        rows = np.full(bucket.tokens, self._sizes.dense_batch, np.int32)
        forwarded = self.forward(
            segment_inputs.SegmentInputs(
                steps=[
                    segment_inputs.SegmentStep(i, bucket, vector, rows)
                    for i in range(len(self._segments))
                ],
                entering=None,
                leaving=rows,
                leavers=(),
                resets=(),
                prompt_slices=(),
            )
        )
        draws = None
        if self._segments[-1].ends:
            variant = sampling.SamplerVariant.GREEDY
            padded = self._sizes.padded_rows(bucket)
            pack = programs.sample_packing(self._sizes, rows=padded, variant=variant)
            draws = runner.SampleInputs(variant=variant, vector=pack.new()[0])
        self.collect(self.sample(forwarded, draws))

    def close(self) -> None:
        """Frees the device's memory; nothing can be run afterwards."""
        self.watch.close()
        weights = [segment.weights for segment in self._segments]
        for array in jax.tree.leaves((weights, self.state)):
            if not array.is_deleted():  # an embedding may be in two segments
                array.delete()
