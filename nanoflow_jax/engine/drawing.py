"""The half of a runner that draws: last tokens, the penalty table, and their programs."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from nanoflow_jax.engine import compiler, programs, sampling
from nanoflow_jax.parallel import mesh
from nanoflow_jax.parallel import placement as placement_lib
from nanoflow_jax.scheduler import buckets


class Drawer:
    """Draws from the logits that a forward left on the device.

    Invariant: its state is that which the newest launched step leaves; older ones were donated.
    """

    def __init__(
        self, sizes: programs.Sizes, placement: placement_lib.Placement, *, max_context_len: int
    ) -> None:
        self._sizes, self._placement = sizes, placement
        self._max_context_len = max_context_len
        self._everywhere = placement.sharding("")
        self._programs: Mapping[str, compiler.Compiled] = {}
        self.allocate()

    def allocate(self) -> None:
        """Makes the state anew: nothing drawn, nothing counted."""
        sizes, place = self._sizes, self._everywhere
        self.last_tokens = jax.device_put(np.zeros((sizes.max_requests,), np.int32), place)
        self._table = jax.device_put(
            sampling.empty_table(sizes.penalty_requests, sizes.vocab_size), place
        )

    @property
    def state(self) -> Any:
        """All arrays that steps hand on."""
        return self.last_tokens, self._table

    def jobs(
        self,
        graph: Any,
        treedef: Any,
        *,
        bucket_list: Sequence[buckets.Bucket],
        weights: Sequence[jax.Array],
        hidden_size: int,
        shares: programs.Shares,
    ) -> list[compiler.Job]:
        """What is to be compiled.

        Args:
            graph: Of a model that has its head.
            treedef: Of its weights.
            bucket_list: Whose forwards are drawn from.
            weights: Of that model.
            hidden_size: D.
            shares: How those lie on the devices.
        """
        sizes = self._sizes
        last_tokens, table = abstract(self.last_tokens), abstract(self._table)
        by_row = jax.sharding.NamedSharding(self._placement.mesh, PartitionSpec(mesh.AXIS))
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
                            sizes=sizes, rows=rows, variant=variant, placement=self._placement
                        ),
                        arguments=(last_tokens, table, logits, int32_vector(pack.size)),
                        donated=(0, 1),
                    )
                )
        hidden = jax.ShapeDtypeStruct(
            (sizes.dense_batch, hidden_size), weights[0].dtype, sharding=self._everywhere
        )
        jobs.append(
            compiler.Job(
                name="prompt_logprobs",
                function=programs.build_prompt_logprobs(graph, treedef, shares),
                arguments=(
                    abstract(weights),
                    hidden,
                    int32_vector(2 * programs.PROMPT_LOGPROB_ROWS),
                ),
            )
        )
        most = self._max_context_len
        jobs.append(
            compiler.Job(
                name="reset_penalties",
                function=programs.build_reset(sizes=sizes, max_context_len=most),
                arguments=(table, int32_vector(1 + 2 * most)),
                donated=(0,),
            )
        )
        return jobs

    def use(self, compiled: Mapping[str, compiler.Compiled]) -> None:
        """Takes the programs that its jobs became."""
        self._programs = compiled

    def reset_penalties(self, resets: Sequence[programs.Vector]) -> None:
        """Gives rows of the penalty table to new owners."""
        for vector in resets:
            self._table = self._programs["reset_penalties"].call(self._table, vector)

    def draw(
        self, logits: jax.Array, variant: sampling.SamplerVariant, vector: programs.Vector
    ) -> jax.Array:
        """Hands a sample to the device; see `programs.SampleResult.out` for what it will be."""
        name = f"sample {logits.shape[0]} {variant.value}"
        result = self._programs[name].call(self.last_tokens, self._table, logits, vector)
        self.last_tokens, self._table = result.last_tokens, result.table
        result.out.copy_to_host_async()
        return result.out

    def prompt_logprobs(
        self, weights: Sequence[jax.Array], hidden: jax.Array, vector: programs.Vector
    ) -> jax.Array:
        """Hands the log-probabilities of some prompt positions to the device."""
        rows = self._programs["prompt_logprobs"].call(weights, hidden, vector)
        rows.copy_to_host_async()
        return rows


def int32_vector(size: int) -> jax.ShapeDtypeStruct:
    """What a job is told of a vector."""
    return jax.ShapeDtypeStruct((size,), jnp.int32)


def abstract(tree: Any) -> Any:
    """What a job is told of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
