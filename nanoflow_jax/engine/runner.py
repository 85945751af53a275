"""Holds weights, caches and compiled programs; launches steps and collects what they sampled."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Int32

from nanoflow_jax import config as config_lib
from nanoflow_jax.engine import compiler, executors, programs, sampling
from nanoflow_jax.kv_cache import layout
from nanoflow_jax.models import operations as operation_lib
from nanoflow_jax.models import transformer
from nanoflow_jax.parallel import mesh
from nanoflow_jax.parallel import placement as placement_lib
from nanoflow_jax.scheduler import buckets

Vector = Int32[np.ndarray, "X"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptSlice:
    """Prompt positions whose log-probabilities a step computes, at most PROMPT_LOGPROB_ROWS.

    Attributes:
        request_id: Whose prompt.
        count: Positions in use.
        vector: What the program reads.
    """

    request_id: str
    count: int
    vector: Vector


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardInputs:
    """What the host sends for a forward. No array here is written after launch.

    Attributes:
        bucket: Which forward program.
        vector: What it reads.
        resets: Penalty table rows to hand to their new owners first.
        prompt_slices: Prompt positions to report on.
    """

    bucket: buckets.Bucket
    vector: Vector
    resets: Sequence[Vector]
    prompt_slices: Sequence[PromptSlice]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleInputs:
    """What the host sends for a sample; not written after launch either.

    Attributes:
        variant: Which sample program.
        vector: What it reads.
    """

    variant: sampling.SamplerVariant
    vector: Vector


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forwarded:
    """A forward on the device, of which nothing has been sampled yet."""

    logits: jax.Array
    hidden: jax.Array | None
    prompt_slices: Sequence[PromptSlice]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launched:
    """A step on the device: arrays that will hold what the host wants to know."""

    sampled: jax.Array | None
    prompt_rows: Sequence[tuple[PromptSlice, jax.Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collected:
    """What a step sampled.

    Attributes:
        rows: One int32 row per logit row, as `programs.SampleResult.out`; None if none sampled.
        prompt_rows: Per slice, logprob columns of its positions.
    """

    rows: Int32[np.ndarray, "R X"] | None
    prompt_rows: Sequence[tuple[PromptSlice, Int32[np.ndarray, "C X"]]]


class StepRunner(Protocol):
    """What an engine asks of its devices; `Runner` says what each member means."""

    @property
    def watch(self) -> compiler.CompileWatch: ...

    @property
    def compile_seconds(self) -> Mapping[str, float]: ...

    def forward(self, inputs: ForwardInputs) -> Forwarded: ...

    def sample(self, forwarded: Forwarded, inputs: SampleInputs | None) -> Launched: ...

    def collect(self, launched: Launched) -> Collected: ...

    def reset(self) -> None: ...

    def close(self) -> None: ...


class Runner:
    """The device side of the engine.

    Invariant: caches, last tokens and the penalty table are those that the newest launched step
    leaves; older ones were donated to it.
    """

    def __init__(
        self,
        model: transformer.Transformer,
        *,
        kv_layout: layout.KvLayout,
        sizes: programs.Sizes,
        bucket_list: Sequence[buckets.Bucket],
        max_context_len: int,
        placement: placement_lib.Placement,
        threads: int,
        executor: config_lib.Executor,
        options: Mapping[buckets.Bucket, Mapping[str, Any]],
        operations: operation_lib.Operations,
        watch: compiler.CompileWatch,
        progress: Callable[[compiler.Compiled, int], None],
    ) -> None:
        self._sizes = sizes
        graph, state = nnx.split(model)
        self._weights, treedef = jax.tree.flatten(state)
        self._layout, self._num_layers = kv_layout, len(model.layers)
        self._placement, self._everywhere = placement, placement.sharding("")
        self._smallest = min(bucket_list, key=lambda bucket: bucket.tokens)
        self._allocate()
        forwards = [
            self._forward_job(graph, treedef, bucket, operations, executor, options[bucket])
            for bucket in bucket_list
        ]
        others = self._other_jobs(graph, treedef, bucket_list, max_context_len, model)
        self._programs = compiler.compile_all(forwards + others, threads=threads, progress=progress)
        self.watch = watch

    def _allocate(self) -> None:
        """Makes the state that steps hand on: caches, last tokens, penalty table."""
        sizes, place = self._sizes, self._everywhere
        share = jax.eval_shape(self._layout.allocate)
        self._caches = [
            jax.tree.map(self._placement.zeros, share, self._layout.axes)
            for _ in range(self._num_layers)
        ]
        self._last_tokens = jax.device_put(np.zeros((sizes.max_requests,), np.int32), place)
        self._table = jax.device_put(
            sampling.empty_table(sizes.penalty_requests, sizes.vocab_size), place
        )

    @property
    def _shares(self) -> programs.Shares:
        cache = jax.tree.map(self._placement.spec, self._layout.axes)
        return programs.Shares(
            placement=self._placement,
            caches=[cache] * self._num_layers,
            weights=[weight.sharding.spec for weight in self._weights],
        )

    def _forward_job(
        self,
        graph: Any,
        treedef: Any,
        bucket: buckets.Bucket,
        operations: operation_lib.Operations,
        executor: config_lib.Executor,
        options: Mapping[str, Any],
    ) -> compiler.Job:
        size = programs.forward_packing(self._sizes, bucket).size
        return compiler.Job(
            name=f"forward {bucket}",
            function=programs.build_forward(
                graph,
                treedef,
                layout=self._layout,
                sizes=self._sizes,
                bucket=bucket,
                operations=operations,
                shares=self._shares,
                keep_lanes=executors.keeps_lanes(executor),
            ),
            arguments=(
                _abstract(self._caches),
                _abstract(self._last_tokens),
                _abstract(self._weights),
                _vector(size),
            ),
            donated=(0,),
            options={**executors.compiler_options(executor), **options},
        )

    def _other_jobs(
        self,
        graph: Any,
        treedef: Any,
        bucket_list: Sequence[buckets.Bucket],
        max_context_len: int,
        model: transformer.Transformer,
    ) -> list[compiler.Job]:
        sizes, placement = self._sizes, self._placement
        weights = _abstract(self._weights)
        last_tokens, table = _abstract(self._last_tokens), _abstract(self._table)
        by_row = jax.sharding.NamedSharding(placement.mesh, PartitionSpec(mesh.AXIS))

        jobs = []
        for rows in sorted({sizes.padded_rows(bucket) for bucket in bucket_list}):
            for variant in sizes.samplers:
                pack = programs.sample_packing(sizes, rows=rows, variant=variant)
                logits = jax.ShapeDtypeStruct(
                    (rows, sizes.vocab_size), jnp.float32, sharding=by_row
                )
                jobs.append(
                    compiler.Job(
                        name=f"sample {rows} {variant.value}",
                        function=programs.build_sample(
                            sizes=sizes, rows=rows, variant=variant, placement=placement
                        ),
                        arguments=(last_tokens, table, logits, _vector(pack.size)),
                        donated=(0, 1),
                    )
                )
        hidden = jax.ShapeDtypeStruct(
            (sizes.dense_batch, model.config.hidden_size),
            model.embedding[...].dtype,
            sharding=self._everywhere,
        )
        jobs.append(
            compiler.Job(
                name="prompt_logprobs",
                function=programs.build_prompt_logprobs(graph, treedef, self._shares),
                arguments=(weights, hidden, _vector(2 * programs.PROMPT_LOGPROB_ROWS)),
            )
        )
        jobs.append(
            compiler.Job(
                name="reset_penalties",
                function=programs.build_reset(sizes=sizes, max_context_len=max_context_len),
                arguments=(table, _vector(1 + 2 * max_context_len)),
                donated=(0,),
            )
        )
        return jobs

    @property
    def compile_seconds(self) -> dict[str, float]:
        """Time each program took to compile, or to fetch from the compilation cache."""
        return {name: program.seconds for name, program in self._programs.items()}

    def forward(self, inputs: ForwardInputs) -> Forwarded:
        """Hands a forward to the device and returns at once."""
        for vector in inputs.resets:
            self._table = self._programs["reset_penalties"].call(self._table, vector)
        result = self._programs[f"forward {inputs.bucket}"].call(
            self._caches, self._last_tokens, self._weights, inputs.vector
        )
        self._caches = result.caches
        return Forwarded(
            logits=result.logits, hidden=result.hidden, prompt_slices=inputs.prompt_slices
        )

    def sample(self, forwarded: Forwarded, inputs: SampleInputs | None) -> Launched:
        """Hands the rest of a step to the device and returns at once.

        Args:
            forwarded: The newest forward.
            inputs: None when no row samples.
        """
        sampled = None if inputs is None else self._launch_sample(inputs, forwarded.logits)
        prompt_rows = []
        for part in forwarded.prompt_slices:
            rows = self._programs["prompt_logprobs"].call(
                self._weights, forwarded.hidden, part.vector
            )
            rows.copy_to_host_async()
            prompt_rows.append((part, rows))
        return Launched(sampled=sampled, prompt_rows=prompt_rows)

    def _launch_sample(self, inputs: SampleInputs, logits: jax.Array) -> jax.Array:
        name = f"sample {logits.shape[0]} {inputs.variant.value}"
        result = self._programs[name].call(self._last_tokens, self._table, logits, inputs.vector)
        self._last_tokens, self._table = result.last_tokens, result.table
        result.out.copy_to_host_async()
        return result.out

    def collect(self, launched: Launched) -> Collected:
        """Waits for a step and brings its one array to the host."""
        rows = None if launched.sampled is None else np.asarray(launched.sampled)
        prompt_rows = [(part, np.asarray(array)) for part, array in launched.prompt_rows]
        return Collected(rows=rows, prompt_rows=prompt_rows)

    def reset(self) -> None:
        """Starts over with an empty state, after a step failed and perhaps took it along.

        Raises:
            JaxRuntimeError: The device fails on a step without requests too.
        """
        for array in jax.tree.leaves((self._caches, self._last_tokens, self._table)):
            array.delete()  # there may be no room for both
        self._allocate()
        forwarded = self.forward(
            ForwardInputs(
                bucket=self._smallest,
                vector=programs.forward_packing(self._sizes, self._smallest).new()[0],
                resets=(),
                prompt_slices=(),
            )
        )
        variant = sampling.SamplerVariant.GREEDY
        rows = self._sizes.padded_rows(self._smallest)
        pack = programs.sample_packing(self._sizes, rows=rows, variant=variant)
        self.collect(self.sample(forwarded, SampleInputs(variant=variant, vector=pack.new()[0])))

    def close(self) -> None:
        """Frees the device's memory; nothing can be run afterwards."""
        self.watch.close()
        state = (self._weights, self._caches, self._last_tokens, self._table)
        for array in jax.tree.leaves(state):
            array.delete()


def _vector(size: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((size,), jnp.int32)


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
