"""What a step computes on the device where requests enter and leave between layers.

Each token of a step has a row of its own in one array, `hidden`, for the whole step. Rows that come
from outside are written there first; a segment reads the rows of its tokens and writes them back;
what leaves is read when all segments have run. So a segment's program depends on its layers and its
bucket alone, and not on who ran before it.

    enter -> layers [0, 2) -> layers [2, 4) -> ... -> leave
                 8 rows           5 rows
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32

from nanoflow_jax.engine import programs
from nanoflow_jax.kv_cache import layout as layout_lib
from nanoflow_jax.models import architecture, transformer
from nanoflow_jax.models import operations as operation_lib
from nanoflow_jax.parallel import collectives, mesh
from nanoflow_jax.scheduler import buckets


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentResult:
    """What a segment leaves on the device.

    Attributes:
        caches: One per layer, updated in place.
        hidden: Of all tokens of the step, those of this segment updated.
        logits: As in `programs.ForwardResult`; None before the last segment.
    """

    caches: Sequence[Any]
    hidden: Float[Array, "B D"]
    logits: Float[Array, "R V"] | None


jax.tree_util.register_dataclass(SegmentResult)


def build_segment(
    graph: Any,
    treedef: Any,
    *,
    span: architecture.Span,
    num_layers: int,
    layout: layout_lib.KvLayout,
    sizes: programs.Sizes,
    bucket: buckets.Bucket,
    operations: operation_lib.Operations,
    shares: programs.Shares,
    keep_lanes: bool,
) -> Callable[..., SegmentResult]:
    """The program of a segment and a bucket.

    (caches, hidden, last_tokens, weights, vector, rows) -> result: rows has the place in `hidden`
    of each token of the bucket, and one past the end where there is none.

    Args:
        graph: Of a model that holds these layers.
        treedef: Of its weights.
        span: The layers.
        num_layers: L.
        layout: Of a layer's cache.
        sizes: Of the engine.
        bucket: Tokens that run.
        operations: What layers are made of.
        shares: How what the program reads lies on the devices.
        keep_lanes: See `executor.run`.
    """
    pack = programs.forward_packing(sizes, bucket)
    planned = sizes.bucket_plan(bucket)
    group = shares.placement.group
    operations = dataclasses.replace(operations, group=group)
    begins, ends = span.start == 0, span.stop == num_layers

    def segment(
        caches: Sequence[Any],
        hidden: Float[Array, "B D"],
        last_tokens: Int32[Array, "R"],
        weights: Sequence[Array],
        vector: Int32[Array, "X"],
        rows: Int32[Array, "T"],
    ) -> SegmentResult:
        model: transformer.Transformer = nnx.merge(graph, jax.tree.unflatten(treedef, weights))
        inputs = pack.unpack(vector)
        if begins:
            x = programs.embedded(model, inputs, last_tokens, sizes, group)
        else:
            x = hidden.at[rows].get(mode="fill", fill_value=0)
        x, new_caches = model.run_layers(
            x,
            inputs["positions"],
            caches,
            planned.read(inputs, layout),
            start=span.start,
            operations=operations,
            plan=planned.plan,
            keep_lanes=keep_lanes,
        )
        logits = None
        if ends:
            tokens, most = inputs["logit_tokens"], sizes.padded_rows(bucket)
            logits = programs.padded_logits(model, x, tokens, group, num_rows=most)
        if not ends or bucket.prefill_rows:  # after the last layer for prompt_logprobs alone
            hidden = hidden.at[rows].set(x, mode="drop")
        return SegmentResult(caches=new_caches, hidden=hidden, logits=logits)

    whole = PartitionSpec()
    parts: Any = {"caches": shares.caches, "hidden": whole}
    parts["logits"] = PartitionSpec(mesh.AXIS) if ends else None
    return collectives.on_each(
        segment,
        shares.placement.mesh,
        in_specs=(shares.caches, whole, whole, shares.weights, whole, whole),
        out_specs=SegmentResult(**parts),
    )


def enter(
    hidden: Float[Array, "B D"], rows: Int32[Array, "n"], new: Float[Array, "n D"]
) -> Float[Array, "B D"]:
    """Writes hidden states that come from outside; rows past the end are padding."""
    return hidden.at[rows].set(new, mode="drop")


def leave(hidden: Float[Array, "B D"], rows: Int32[Array, "n"]) -> Float[Array, "n D"]:
    """Reads hidden states that go outside."""
    return hidden.at[rows].get(mode="clip")
