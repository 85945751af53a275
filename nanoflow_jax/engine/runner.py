"""Holds weights, caches and compiled programs; launches steps and collects what they sampled."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, Int32

from nanoflow_jax.engine import compiler, drawing, executors, programs, sampling
from nanoflow_jax.engine import ways as ways_lib
from nanoflow_jax.kv_cache import layout
from nanoflow_jax.models import transformer
from nanoflow_jax.nanobatch.plan import Plan
from nanoflow_jax.parallel import placement as placement_lib
from nanoflow_jax.scheduler import buckets


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
    vector: programs.Vector


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
    vector: programs.Vector
    resets: Sequence[programs.Vector]
    prompt_slices: Sequence[PromptSlice]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleInputs:
    """What the host sends for a sample; not written after launch either.

    Attributes:
        variant: Which sample program.
        vector: What it reads.
    """

    variant: sampling.SamplerVariant
    vector: programs.Vector


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaver:
    """Tokens [start, start + count) of a request, which leave before the model's end."""

    request_id: str
    start: int
    count: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Left:
    """Hidden states on their way to the host.

    Attributes:
        who: Whose they are, in order.
        hidden: Their rows, and padding.
    """

    who: Sequence[Leaver]
    hidden: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forwarded:
    """A forward on the device, of which nothing has been sampled yet.

    Attributes:
        logits: None if no request reached the head.
        hidden: What prompt_logprobs reads; None if no prompt was run.
        prompt_slices: Prompt positions to report on.
        left: What leaves before the head, if anything does.
    """

    logits: jax.Array | None
    hidden: jax.Array | None
    prompt_slices: Sequence[PromptSlice]
    left: Left | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launched:
    """A step on the device: arrays that will hold what the host wants to know."""

    sampled: jax.Array | None
    prompt_rows: Sequence[tuple[PromptSlice, jax.Array]]
    left: Left | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collected:
    """What a step sampled.

    Attributes:
        rows: One int32 row per logit row, as `programs.SampleResult.out`; None if none sampled.
        prompt_rows: Per slice, logprob columns of its positions.
        left: Hidden states that left before the model's end, and whose they are.
    """

    rows: Int32[np.ndarray, "R X"] | None
    prompt_rows: Sequence[tuple[PromptSlice, Int32[np.ndarray, "C X"]]]
    left: Sequence[tuple[Leaver, Float[np.ndarray, "n D"]]] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forwards:
    """Forwards of other plans, compiled.

    Attributes:
        plans: Of the buckets that run by another plan than before.
        sizes: With the plans of all.
        programs: By name.
    """

    plans: Mapping[buckets.Bucket, Plan]
    sizes: programs.Sizes
    programs: Mapping[str, compiler.Compiled]


class StepRunner(Protocol):
    """What an engine asks of its devices; `Runner` says what each member means.

    What a forward reads is of the kind that the engine's builder builds.
    """

    @property
    def watch(self) -> compiler.CompileWatch: ...

    @property
    def compile_seconds(self) -> Mapping[str, float]: ...

    def forward(self, inputs: Any) -> Forwarded: ...

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
        ways: Mapping[buckets.Bucket, ways_lib.Way],
        watch: compiler.CompileWatch,
        progress: Callable[[compiler.Compiled, int], None],
    ) -> None:
        self._sizes = sizes
        graph, state = nnx.split(model)
        self._weights, treedef = jax.tree.flatten(state)
        self._model_form = (graph, treedef)
        self._layout, self._num_layers = kv_layout, len(model.layers)
        self._placement = placement
        self._smallest = min(bucket_list, key=lambda bucket: bucket.tokens)
        self._drawer = drawing.Drawer(sizes, placement, max_context_len=max_context_len)
        self._allocate()
        forwards = [self._forward_job(sizes, bucket, ways[bucket]) for bucket in bucket_list]
        draws = self._drawer.jobs(
            graph,
            treedef,
            bucket_list=bucket_list,
            weights=self._weights,
            hidden_size=model.config.hidden_size,
            shares=self._shares,
        )
        self._programs = dict(
            compiler.compile_all(forwards + draws, threads=threads, progress=progress)
        )
        self._drawer.use(self._programs)
        self.watch = watch

    def _allocate(self) -> None:
        """Makes empty caches."""
        share = jax.eval_shape(self._layout.allocate)
        self._caches = [
            jax.tree.map(self._placement.zeros, share, self._layout.axes)
            for _ in range(self._num_layers)
        ]

    @property
    def state(self) -> Any:
        """All arrays that steps hand on: caches, last tokens, penalty table."""
        return self._caches, self._drawer.state

    @property
    def _shares(self) -> programs.Shares:
        cache = jax.tree.map(self._placement.spec, self._layout.axes)
        return programs.Shares(
            placement=self._placement,
            caches=[cache] * self._num_layers,
            weights=[weight.sharding.spec for weight in self._weights],
        )

    def _forward_job(
        self, sizes: programs.Sizes, bucket: buckets.Bucket, way: ways_lib.Way
    ) -> compiler.Job:
        size = programs.forward_packing(sizes, bucket).size
        return compiler.Job(
            name=f"forward {bucket}",
            function=programs.build_forward(
                *self._model_form,
                layout=self._layout,
                sizes=sizes,
                bucket=bucket,
                operations=way.operations,
                shares=self._shares,
                keep_lanes=executors.keeps_lanes(way.executor),
            ),
            arguments=(
                drawing.abstract(self._caches),
                drawing.abstract(self._drawer.last_tokens),
                drawing.abstract(self._weights),
                drawing.int32_vector(size),
            ),
            donated=(0,),
            options=way.compiler_options,
        )

    def compile_forwards(
        self,
        plans: Mapping[buckets.Bucket, Plan],
        ways: Mapping[buckets.Bucket, ways_lib.Way],
        *,
        gives_up: Callable[[], bool],
    ) -> Forwards | None:
        """Compiles forwards of other plans; nothing that runs is touched, from any thread.

        Args:
            plans: Of all buckets; what runs by its plan already is not compiled again.
            ways: How each bucket runs.
            gives_up: Asked before each program; None is returned once it says so.
        """
        sizes = dataclasses.replace(self._sizes, plans=plans)
        changed = {b: plan for b, plan in plans.items() if plan != self._sizes.plans.get(b)}
        done = {}
        for bucket in changed:
            if gives_up():
                return None
            job = self._forward_job(sizes, bucket, ways[bucket])
            done[job.name] = compiler.compile_one(job)
        return Forwards(plans=changed, sizes=sizes, programs=done)

    def take(self, forwards: Forwards) -> None:
        """Runs other plans from the next forward on."""
        self._programs |= forwards.programs
        self._sizes = forwards.sizes

    @property
    def compile_seconds(self) -> dict[str, float]:
        """Time each program took to compile, or to fetch from the compilation cache."""
        return {name: program.seconds for name, program in self._programs.items()}

    def forward(self, inputs: ForwardInputs) -> Forwarded:
        """Hands a forward to the device and returns at once."""
        self._drawer.reset_penalties(inputs.resets)
        result = self._programs[f"forward {inputs.bucket}"].call(
            self._caches, self._drawer.last_tokens, self._weights, inputs.vector
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
        return launch_draws(self._drawer, self._weights, forwarded, inputs)

    def collect(self, launched: Launched) -> Collected:
        """Waits for a step and brings its one array to the host."""
        return collect(launched)

    def reset(self) -> None:
        """Starts over with an empty state, after a step failed and perhaps took it along.

        Raises:
            JaxRuntimeError: The device fails on a step without requests too.
        """
        for array in jax.tree.leaves(self.state):
            array.delete()  # there may be no room for both
        self._allocate()
        self._drawer.allocate()
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
        for array in jax.tree.leaves((self._weights, self.state)):
            array.delete()


def launch_draws(
    drawer: drawing.Drawer,
    weights: Sequence[jax.Array],
    forwarded: Forwarded,
    inputs: SampleInputs | None,
) -> Launched:
    """Hands what follows a forward to the device.

    Args:
        drawer: Of the runner.
        weights: Of the model, or of its part with the head.
        forwarded: The newest forward.
        inputs: None when no row samples.
    """
    sampled = None
    if inputs is not None:
        assert forwarded.logits is not None
        sampled = drawer.draw(forwarded.logits, inputs.variant, inputs.vector)
    prompt_rows = []
    for part in forwarded.prompt_slices:
        assert forwarded.hidden is not None
        rows = drawer.prompt_logprobs(weights, forwarded.hidden, part.vector)
        prompt_rows.append((part, rows))
    return Launched(sampled=sampled, prompt_rows=prompt_rows, left=forwarded.left)


def collect(launched: Launched) -> Collected:
    """Waits for a step and brings what it gave to the host."""
    rows = None if launched.sampled is None else np.asarray(launched.sampled)
    prompt_rows = [(part, np.asarray(array)) for part, array in launched.prompt_rows]
    left = []
    if launched.left is not None:
        hidden, place = np.asarray(launched.left.hidden), 0
        for who in launched.left.who:
            left.append((who, hidden[place : place + who.count]))
            place += who.count
    return Collected(rows=rows, prompt_rows=prompt_rows, left=left)
