"""One model on one device, and programs of all modes that take turns on its weights and pages."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from nanoflow_jax import config as config_lib
from nanoflow_jax.bench import steady_state
from nanoflow_jax.bench.ablation_modes import Mode
from nanoflow_jax.engine import (
    attention_inputs,
    build,
    compiler,
    implementations,
    inputs,
    kernel_choice,
    programs,
    sampling,
)
from nanoflow_jax.models import loading, transformer
from nanoflow_jax.models import operations as operation_lib
from nanoflow_jax.models.paged_attention import PagedAttention
from nanoflow_jax.nanobatch.executor import Call
from nanoflow_jax.nanobatch.plan import TokenRange

_ALONE = "decode attention alone"
# Of keys and values, and of queries of attention alone: of variance 1.
_SPREAD = 3.0**0.5
_RANDOM_PAGES = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ground:
    """What is known before anything is loaded.

    Attributes:
        config: The knobs.
        source: The opened model.
        device: The one it will run on.
    """

    config: config_lib.EngineConfig
    source: build.ModelSource
    device: jax.Device

    def __post_init__(self) -> None:
        section, processes = self.config.parallel, self.config.processes
        if section.tensor_parallel * section.data_parallel * processes.num_processes > 1:
            raise ValueError(
                "ablation compares modes on one device; leave out --tensor_parallel, "
                "--data_parallel and --num_processes"
            )

    @property
    def on_gpu(self) -> bool:
        """Whether the device is one."""
        return self.device.platform == "gpu"

    @property
    def machine(self) -> kernel_choice.Machine:
        """Where it will run."""
        return kernel_choice.machine_of(self.device)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the model as it will run."""
        return build.run_dtype(
            self.config.model.dtype, self.source.stored_dtype, self.device.platform
        )

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return self.config.cache.page_size or build.defaults_of(self.device).page_size

    @property
    def served(self) -> kernel_choice.Served:
        """What kernels are asked about."""
        return kernel_choice.Served(
            config=self.source.config, dtype=self.dtype, page_size=self.page_size
        )

    def choices(self, mode: Mode) -> kernel_choice.Choices:
        """What a mode's operations are made of.

        Raises:
            ValueError: They cannot be had here.
        """
        return kernel_choice.choose(
            mode.kernels, self.machine, self.served, caps_products=mode.caps_products
        )

    def operations(self, mode: Mode) -> operation_lib.Operations:
        """What a mode's layers are made of, attention left out.

        Raises:
            ValueError: They cannot be had here.
        """
        return implementations.operations(self.choices(mode))


class Stage:
    """Weights, pages and newest tokens, which each program uses in turn.

    Invariant: the pages are those that the newest program left; it was given the ones before.

    Attributes:
        ground: The model and the device.
        num_pages: Of the cache.
    """

    def __init__(self, ground: Ground, *, most_pages: int, seed: int = 0) -> None:
        """Loads the model and takes memory for pages.

        Args:
            ground: The model and the device.
            most_pages: That any steps will need.
            seed: Of what lies in the cache, and of the first tokens.

        Raises:
            ValueError: The knobs do not fit the model or the memory.
        """
        self.ground, self._seed = ground, seed
        config, source = ground.config, ground.source
        self._placement = loading.place_model(source.config, [ground.device])
        choices = kernel_choice.choose(config.kernels, ground.machine, ground.served)
        model = build.load_weights(
            config.model, source, ground.dtype, self._placement, build.Reports()
        )
        self._layout = build.make_layout(
            self._placement,
            config.cache,
            ground.served,
            most_pages=most_pages,
            page_major=ground.on_gpu or implementations.wants_page_major(choices),
            num_replicas=1,
            least=lambda count: count,
        )
        self.num_pages = self._layout.shape.num_pages
        self._graph, state = nnx.split(model)
        self._weights, self._treedef = jax.tree.flatten(state)
        self._specs = [layer.spec for layer in model.layers]
        self._fill = jax.jit(_fill, donate_argnums=0, keep_unused=True)
        self._caches = [self._layout.allocate() for _ in self._specs]

    def sizes(self, mode: Mode, load: steady_state.Load) -> programs.Sizes:
        """Sizes of a mode's programs.

        Raises:
            ValueError: As `Ground.choices` does.
        """
        bucket, model = load.bucket, self.ground.source.config
        return programs.Sizes(
            max_requests=bucket.decode_rows,
            max_pages=-(-load.lengths.longest // self.ground.page_size),
            num_pages=self.num_pages,
            dense_batch=load.dense_batch,
            vocab_size=model.vocab_size,
            penalty_requests=0,
            attention=self._attention(mode, load.dense_batch),
            plans={bucket: mode.plan},
        )

    def _attention(self, mode: Mode, dense_batch: int) -> attention_inputs.AttentionInputs:
        model, tile_len = self.ground.source.config, build.defaults_of(self.ground.device).tile_len
        return implementations.attention(
            self.ground.choices(mode),
            layout=self._layout,
            group=model.group_size,
            windows=model.distinct_windows,
            tile_len=min(tile_len, dense_batch),
        )

    def builder(self, mode: Mode, load: steady_state.Load) -> inputs.InputBuilder:
        """Writes what a mode's programs read.

        Raises:
            ValueError: As `Ground.choices` does.
        """
        return inputs.InputBuilder(
            self.sizes(mode, load),
            page_size=self.ground.page_size,
            max_context_len=load.lengths.longest,
        )

    def compile(
        self,
        modes: Sequence[Mode],
        load: steady_state.Load,
        *,
        has_alone: bool,
    ) -> "Programs":
        """Compiles the programs of some modes for one load.

        Args:
            modes: Whose choices can be had; two that differ in name only share a program.
            load: What they will run.
            has_alone: Whether also decode attention alone, where there are decode rows.
        """
        own: dict[str, str] = {}
        made: dict[str, Mode] = {}
        for mode in modes:
            same = (name for name, one in made.items() if _is_same(one, mode))
            own[mode.name] = next(same, mode.name)
            made.setdefault(own[mode.name], mode)
        jobs = [self._forward_job(mode, load) for mode in made.values()]
        jobs += self._other_jobs(modes[0], load)
        if has_alone and load.decode_rows:
            jobs.append(self._alone_job(modes[0], load))
        compiled = compiler.compile_all(
            jobs,
            threads=self.ground.config.compile.threads,
            progress=lambda compiled, total: None,
        )
        return Programs(
            forwards={name: compiled[of].call for name, of in own.items()},
            sample=compiled["sample"].call,
            judge=compiled["judge"].call,
            alone=compiled[_ALONE].call if _ALONE in compiled else None,
            max_requests=load.bucket.decode_rows,
        )

    def _forward_job(self, mode: Mode, load: steady_state.Load) -> compiler.Job:
        sizes = self.sizes(mode, load)
        return compiler.Job(
            name=mode.name,
            function=programs.build_forward(
                self._graph,
                self._treedef,
                layout=self._layout,
                sizes=sizes,
                bucket=load.bucket,
                operations=self.ground.operations(mode),
                shares=programs.Shares(placement=self._placement, caches=None, weights=()),
                keep_lanes=mode.keep_lanes,
            ),
            arguments=(
                _abstract(self._caches),
                _int32(sizes.max_requests),
                _abstract(self._weights),
                _int32(programs.forward_packing(sizes, load.bucket).size),
            ),
            donated=(0,),
            options=mode.compiler_options,
        )

    def _other_jobs(self, plain: Mode, load: steady_state.Load) -> list[compiler.Job]:
        sizes = self.sizes(plain, load)
        rows = sizes.padded_rows(load.bucket)
        variant = sampling.SamplerVariant.GREEDY
        pack = programs.sample_packing(sizes, rows=rows, variant=variant)
        table = jax.eval_shape(lambda: sampling.empty_table(0, sizes.vocab_size))
        last_tokens = _int32(sizes.max_requests)
        logits = jax.ShapeDtypeStruct((rows, sizes.vocab_size), jnp.float32)
        vector = _int32(pack.size)
        sample = programs.build_sample(
            sizes=sizes, rows=rows, variant=variant, placement=self._placement
        )

        def judge(
            last_tokens: Int32[Array, "S"],
            logits: Float[Array, "R V"],
            vector: Int32[Array, "X"],
            wanted: Int32[Array, "R"],
            is_given: Bool[Array, ""],
        ) -> tuple[Int32[Array, "S"], Int32[Array, "R"], Float[Array, "R 2"]]:
            values, found = jax.lax.top_k(logits, 2)
            tokens = jnp.where(is_given, wanted, found[:, 0])
            slots = pack.unpack(vector)["slots"]
            return last_tokens.at[slots].set(tokens, mode="drop"), found[:, 0], values

        return [
            compiler.Job(
                name="sample",
                function=sample,
                arguments=(last_tokens, table, logits, vector),
                donated=(0, 1),
            ),
            compiler.Job(
                name="judge",
                function=judge,
                arguments=(
                    last_tokens,
                    logits,
                    vector,
                    _int32(rows),
                    jax.ShapeDtypeStruct((), jnp.bool_),
                ),
                donated=(0,),
            ),
        ]

    def _alone_job(self, plain: Mode, load: steady_state.Load) -> compiler.Job:
        """Decode attention of all layers, one after another, and nothing else."""
        sizes, config = self.sizes(plain, load), self.ground.source.config
        pack = programs.forward_packing(sizes, load.bucket)
        planned = sizes.bucket_plan(load.bucket)
        shape = (load.dense_batch, config.num_heads, config.head_dim)

        def alone(caches: Sequence[Any], vector: Int32[Array, "X"]) -> Float[Array, "R N H"]:
            attend = planned.read(pack.unpack(vector), self._layout)
            q = _random(jax.random.key(self._seed), shape, self.ground.dtype)
            return _attend(attend, q, caches, self._specs)

        return compiler.Job(
            name=_ALONE, function=alone, arguments=(_abstract(self._caches), _int32(pack.size))
        )

    def refill(self, programs_: "Programs") -> Int32[Array, "S"]:
        """Random keys and values on every page, always the same; so are the tokens returned.

        Returns:
            The newest token of each slot.
        """
        for i, cache in enumerate(self._caches):
            self._caches[i] = self._fill(cache, np.uint32(self._seed + i))
        draw = np.random.default_rng(self._seed)
        tokens = draw.integers(0, self.ground.source.config.vocab_size, programs_.max_requests)
        return jnp.asarray(tokens, jnp.int32)

    def run(
        self, programs_: "Programs", name: str, steps: Sequence[steady_state.Step]
    ) -> list["Ran"]:
        """Runs steps one after another as an engine does: the next is launched before one is read.

        Args:
            programs_: Compiled ones.
            name: Of the mode.
            steps: What to run.

        Returns:
            Of each step, the time from the end of the one before, the first from its launch.
        """
        last_tokens = self.refill(programs_)
        table = sampling.empty_table(0, self.ground.source.config.vocab_size)
        jax.block_until_ready((self._caches, last_tokens))
        stamps, drawn = [time.perf_counter()], []
        in_flight: tuple[steady_state.Step, Array] | None = None
        for step in [*steps, None]:
            launched = None
            if step is not None:
                logits = self._forward(programs_, name, last_tokens, step)
                launched = step, logits
                if step.sample is not None:
                    sampled = programs_.sample(last_tokens, table, logits, step.sample.vector)
                    last_tokens, table = sampled.last_tokens, sampled.table
                    sampled.out.copy_to_host_async()
                    launched = step, sampled.out
            if in_flight is not None:
                drawn.append(_collect(*in_flight))
                stamps.append(time.perf_counter())
            in_flight = launched
        spans = np.diff(stamps).tolist()
        return [Ran(seconds=s, tokens=t) for s, t in zip(spans, drawn, strict=True)]

    def run_alone(
        self, programs_: "Programs", name: str, steps: Sequence[steady_state.Step]
    ) -> list[float]:
        """Seconds of decode attention of each step, launched one after another.

        Args:
            programs_: Compiled ones.
            name: Of the mode that splits nothing.
            steps: What to run.
        """
        assert programs_.alone is not None, "there are no decode rows"
        self.refill(programs_)
        jax.block_until_ready(self._caches)
        stamps, in_flight = [time.perf_counter()], None
        for step in [*steps, None]:
            launched = None
            if step is not None:
                launched = programs_.alone(self._caches, step.forwards[name].vector)
            if in_flight is not None:
                jax.block_until_ready(in_flight)
                stamps.append(time.perf_counter())
            in_flight = launched
        return [*np.diff(stamps).tolist()]

    def judge(
        self,
        programs_: "Programs",
        name: str,
        steps: Sequence[steady_state.Step],
        *,
        wanted: Sequence["Judged"] | None = None,
    ) -> list["Judged"]:
        """What a mode draws in each step that follows the same tokens as another mode's.

        Args:
            programs_: Compiled ones.
            name: Of the mode.
            steps: What to run.
            wanted: What the other mode drew; None to follow its own.
        """
        last_tokens = self.refill(programs_)
        found = []
        for i, step in enumerate(steps):
            logits = self._forward(programs_, name, last_tokens, step)
            if step.sample is None:
                found.append(Judged.of(np.zeros(0, np.int32), np.zeros((0, 2), np.float32)))
                continue
            given = np.zeros(logits.shape[0], np.int32)
            if wanted is not None:
                given[: step.sampled_rows] = wanted[i].tokens
            last_tokens, tokens, values = programs_.judge(
                last_tokens, logits, step.sample.vector, given, np.bool_(wanted is not None)
            )
            rows = slice(step.sampled_rows)
            found.append(Judged.of(np.asarray(tokens)[rows], np.asarray(values)[rows]))
        return found

    def _forward(
        self,
        programs_: "Programs",
        name: str,
        last_tokens: Int32[Array, "S"],
        step: steady_state.Step,
    ) -> Float[Array, "R V"]:
        vector = step.forwards[name].vector
        result = programs_.forwards[name](self._caches, last_tokens, self._weights, vector)
        self._caches = result.caches
        logits: Float[Array, "R V"] = result.logits
        return logits

    def close(self) -> None:
        """Frees the device's memory; nothing can be run afterwards."""
        for array in jax.tree.leaves((self._weights, self._caches)):
            array.delete()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Programs:
    """Compiled programs for one load.

    Attributes:
        forwards: By the names of modes.
        sample: Draws greedily.
        judge: Draws greedily and goes on with what it is given.
        alone: Decode attention alone; None if there are no decode rows.
        max_requests: Slots.
    """

    forwards: Mapping[str, Callable[..., Any]]
    sample: Callable[..., Any]
    judge: Callable[..., Any]
    alone: Callable[..., Any] | None
    max_requests: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ran:
    """One step that was run: how long it took, and the tokens that it drew."""

    seconds: float
    tokens: Int32[np.ndarray, "R"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
    """What one step drew.

    Attributes:
        tokens: Of each row that samples.
        best: The logit of each.
        margins: Its distance to the next best.
    """

    tokens: Int32[np.ndarray, "R"]
    best: Float[np.ndarray, "R"]
    margins: Float[np.ndarray, "R"]

    @classmethod
    def of(cls, tokens: Int32[np.ndarray, "R"], values: Float[np.ndarray, "R 2"]) -> "Judged":
        """From the two best logits of each row."""
        return cls(tokens=tokens, best=values[:, 0], margins=values[:, 0] - values[:, 1])


def _collect(step: steady_state.Step, array: Array) -> Int32[np.ndarray, "R"]:
    """Waits for a step; its tokens."""
    if step.sample is None:
        jax.block_until_ready(array)
        return np.zeros(0, np.int32)
    return np.asarray(array)[: step.sampled_rows, 0]


def _attend(
    attend: PagedAttention,
    q: Float[Array, "T N H"],
    caches: Sequence[Any],
    specs: Sequence[transformer.AttentionSpec],
) -> Float[Array, "R N H"]:
    """Decode attention of each layer, after that of the one before it."""
    token = None
    for layer, (cache, spec) in enumerate(zip(caches, specs, strict=True)):
        call = Call(
            layer=layer,
            operation="decode_attention",
            key="decode_attention.0",
            tokens=TokenRange(0, q.shape[0]),
            num_ctas=None,
            token=token,
        )
        (token,) = attend.attend_decode(q, cache, spec, call)
    assert token is not None, "a step without decode rows has no decode attention"
    return token


def _is_same(one: Mode, other: Mode) -> bool:
    """Whether one program serves both."""
    return dataclasses.replace(one, name=other.name, role=other.role) == other


def _fill(cache: Any, seed: Any) -> Any:
    """Random numbers on every page of a cache: some pages of them, again and again.

    The whole at once would need its memory a second time.
    """
    leaves, tree = jax.tree.flatten(cache)
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), len(leaves))

    def fill(key: Any, x: Array) -> Array:
        count = min(_RANDOM_PAGES, x.shape[0])
        some = _random(key, (count, *x.shape[1:]), x.dtype)
        return jnp.take(some, jnp.arange(x.shape[0]) % count, axis=0)

    return jax.tree.unflatten(tree, [fill(k, x) for k, x in zip(keys, leaves, strict=True)])


def _random(key: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """Numbers of mean 0 and variance 1; of a cache that keeps bits, those of bfloat16."""
    if dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(_random(key, shape, jnp.bfloat16), jnp.uint16)
    return jax.random.uniform(key, shape, dtype, -_SPREAD, _SPREAD)


def _int32(size: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((size,), jnp.int32)


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
