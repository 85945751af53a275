"""Programs of all modes for one load, which share weights and pages."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from nanoflow_jax.bench import steady_state
from nanoflow_jax.bench.ablation_ground import Ground
from nanoflow_jax.bench.ablation_modes import Mode
from nanoflow_jax.engine import (
    attention_inputs,
    build,
    compiler,
    implementations,
    inputs,
    programs,
    sampling,
)
from nanoflow_jax.kv_cache import layout as layout_lib
from nanoflow_jax.models import transformer
from nanoflow_jax.models.paged_attention import PagedAttention
from nanoflow_jax.nanobatch.executor import Call
from nanoflow_jax.nanobatch.plan import TokenRange
from nanoflow_jax.parallel import placement as placement_lib

ALONE = "decode attention alone"  # the mode
# Of keys and values, and of queries of attention alone: of variance 1.
_SPREAD = 3.0**0.5


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
class Workshop:
    """Makes programs.

    Attributes:
        ground: The model and the device.
        layout: Of the cache of a layer.
        placement: Of the model.
        graph: Of the model without weights.
        treedef: Of its weights.
        specs: What attention of each layer computes.
        weights: Abstract.
        caches: Abstract, one for each layer.
        seed: Of queries of attention alone.
    """

    ground: Ground
    layout: layout_lib.KvLayout
    placement: placement_lib.Placement
    graph: Any
    treedef: Any
    specs: Sequence[transformer.AttentionSpec]
    weights: Any
    caches: Any
    seed: int

    def sizes(self, mode: Mode, load: steady_state.Load) -> programs.Sizes:
        """Sizes of a mode's programs.

        Raises:
            ValueError: As `Ground.choices` does.
        """
        bucket, model = load.bucket, self.ground.source.config
        return programs.Sizes(
            max_requests=bucket.decode_rows,
            max_pages=-(-load.lengths.longest // self.ground.page_size),
            num_pages=self.layout.shape.num_pages,
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
            layout=self.layout,
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
    ) -> Programs:
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
            alone=compiled[ALONE].call if ALONE in compiled else None,
            max_requests=load.bucket.decode_rows,
        )

    def _forward_job(self, mode: Mode, load: steady_state.Load) -> compiler.Job:
        sizes = self.sizes(mode, load)
        return compiler.Job(
            name=mode.name,
            function=programs.build_forward(
                self.graph,
                self.treedef,
                layout=self.layout,
                sizes=sizes,
                bucket=load.bucket,
                operations=self.ground.operations(mode),
                shares=programs.Shares(placement=self.placement, caches=None, weights=()),
                keep_lanes=mode.keep_lanes,
            ),
            arguments=(
                self.caches,
                _int32(sizes.max_requests),
                self.weights,
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
            sizes=sizes, rows=rows, variant=variant, placement=self.placement
        )

        def judge(
            last_tokens: Int32[Array, "S"],
            logits: Float[Array, "R V"],
            vector: Int32[Array, "X"],
            wanted: Int32[Array, "R"],
            is_given: Bool[Array, ""],
        ) -> tuple[Int32[Array, "S"], Int32[Array, "R"], Float[Array, "R 2"]]:
            drawn, values = _two_best(logits)
            tokens = jnp.where(is_given, wanted, drawn)
            slots = pack.unpack(vector)["slots"]
            return last_tokens.at[slots].set(tokens, mode="drop"), drawn, values

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
            attend = planned.read(pack.unpack(vector), self.layout)
            q = random_numbers(jax.random.key(self.seed), shape, self.ground.dtype)
            return _attend(attend, q, caches, self.specs)

        return compiler.Job(name=ALONE, function=alone, arguments=(self.caches, _int32(pack.size)))


def _two_best(
    logits: Float[Array, "R V"],
) -> tuple[Int32[Array, "R"], Float[Array, "R 2"]]:
    """The best token of each row, and the two best logits."""
    best = jnp.argmax(logits, axis=1).astype(jnp.int32)
    first = jnp.take_along_axis(logits, best[:, None], axis=1)[:, 0]
    is_best = jnp.arange(logits.shape[1], dtype=jnp.int32)[None] == best[:, None]
    second = jnp.where(is_best, -jnp.inf, logits).max(axis=1)
    return best, jnp.stack([first, second], axis=1)


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


def random_numbers(key: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """Numbers of mean 0 and variance 1; of a cache that keeps bits, those of bfloat16."""
    if dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(random_numbers(key, shape, jnp.bfloat16), jnp.uint16)
    return jax.random.uniform(key, shape, dtype, -_SPREAD, _SPREAD)


def _int32(size: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((size,), jnp.int32)
