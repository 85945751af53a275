"""One model on one device, and programs of all modes that take turns on its weights and pages."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32

from nanoflow_jax.bench import steady_state
from nanoflow_jax.bench.ablation_ground import Ground
from nanoflow_jax.bench.ablation_programs import Programs, Workshop, random_numbers
from nanoflow_jax.engine import (
    cache_memory,
    implementations,
    kernel_choice,
    model_source,
    sampling,
)
from nanoflow_jax.models import loading

# Of a cache, that are not copies of each other.
_RANDOM_PAGES = 256


class Stage:
    """Weights, pages and newest tokens, which each program uses in turn.

    Invariant: the pages are those that the newest program left; it was given the ones before.

    Attributes:
        ground: The model and the device.
        num_pages: Of the cache.
        workshop: Makes the programs.
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
        placement = loading.place_model(source.config, [ground.device])
        choices = kernel_choice.choose(config.kernels, ground.machine, ground.served)
        model = model_source.load_weights(
            config.model, source, ground.dtype, placement, progress=lambda _: None
        )
        layout = cache_memory.make_layout(
            placement,
            config.cache,
            ground.served,
            most_pages=most_pages,
            page_major=ground.on_gpu or implementations.wants_page_major(choices),
            num_replicas=1,
        )
        self.num_pages = layout.shape.num_pages
        graph, state = nnx.split(model)
        self._weights, treedef = jax.tree.flatten(state)
        self._fill = jax.jit(_fill, donate_argnums=0, keep_unused=True)
        self._caches = [layout.allocate() for _ in model.layers]
        self.workshop = Workshop(
            ground=ground,
            layout=layout,
            placement=placement,
            graph=graph,
            treedef=treedef,
            specs=[layer.spec for layer in model.layers],
            weights=_abstract(self._weights),
            caches=_abstract(self._caches),
            seed=seed,
        )

    def refill(self, programs_: Programs) -> Int32[Array, "S"]:
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
        self, programs_: Programs, name: str, steps: Sequence[steady_state.Step]
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
        self, programs_: Programs, name: str, steps: Sequence[steady_state.Step]
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
        programs_: Programs,
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
        programs_: Programs,
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


def _fill(cache: Any, seed: Any) -> Any:
    """Random numbers on every page of a cache: some pages of them, again and again.

    The whole at once would need its memory a second time.
    """
    leaves, tree = jax.tree.flatten(cache)
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), len(leaves))

    def fill(key: Any, x: Array) -> Array:
        count = min(_RANDOM_PAGES, x.shape[0])
        some = random_numbers(key, (count, *x.shape[1:]), x.dtype)
        return jnp.take(some, jnp.arange(x.shape[0]) % count, axis=0)

    return jax.tree.unflatten(tree, [fill(k, x) for k, x in zip(keys, leaves, strict=True)])


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
