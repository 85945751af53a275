"""What a step computes on the device: forward, sample, and two small helpers.

Forward leaves logit rows on the device and sample reads them there, so that a later grammar can
put the host between the two. Decode input tokens never leave the device: sample writes them to
`last_tokens` by slot, and the next forward reads them from there.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32

from nanoflow_jax import request
from nanoflow_jax.engine import attention_inputs, bucket_plan, packing, sampling
from nanoflow_jax.kv_cache import layout
from nanoflow_jax.models import operations as operation_lib
from nanoflow_jax.models import transformer
from nanoflow_jax.nanobatch import builders
from nanoflow_jax.nanobatch.operations import LayerShape
from nanoflow_jax.nanobatch.plan import Plan
from nanoflow_jax.parallel import collectives, mesh
from nanoflow_jax.parallel import placement as placement_lib
from nanoflow_jax.scheduler import buckets

# Rows whose logits are computed at once for prompt_logprobs: bounds the [rows, V] array.
PROMPT_LOGPROB_ROWS = 64
MAX_EOS_IDS = 84
# What the host sends to a program.
Vector = Int32[np.ndarray, "X"]
# Bias entries of one row: logit_bias and banned end-of-text or stop tokens.
MAX_BIAS = request.MAX_LOGIT_BIAS + request.MAX_STOP_TOKEN_IDS + MAX_EOS_IDS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes that all programs of an engine share.

    Attributes:
        max_requests: Rows of `last_tokens`.
        max_pages: M, pages of one request at full context.
        num_pages: P; as a page id it drops a token.
        dense_batch: Tokens in a full step.
        vocab_size: V.
        penalty_requests: Rows of the penalty table.
        attention: What the host plans of attention.
        plans: How the layers of a bucket run; one nano-batch where nothing is said.
        num_devices: Devices that share the model; each draws for as many rows as the others.
        samplers: That are compiled, the least first; a step runs the first that serves its rows.
    """

    max_requests: int
    max_pages: int
    num_pages: int
    dense_batch: int
    vocab_size: int
    penalty_requests: int
    attention: attention_inputs.AttentionInputs
    plans: Mapping[buckets.Bucket, Plan] = dataclasses.field(default_factory=dict)
    num_devices: int = 1
    samplers: Sequence[sampling.SamplerVariant] = tuple(sampling.SamplerVariant)

    @property
    def sample_rows(self) -> tuple[int, ...]:
        """Row counts for which sample is compiled: a small one for small steps."""
        counts = {min(8, self.max_requests), self.max_requests}
        return tuple(sorted({-(-n // self.num_devices) * self.num_devices for n in counts}))

    def logit_rows(self, bucket: buckets.Bucket) -> int:
        """Logit rows that a bucket's forward computes."""
        return min(bucket.decode_rows + bucket.prefill_rows, self.max_requests)

    def padded_rows(self, bucket: buckets.Bucket) -> int:
        """Rows of the sample program that follows a bucket's forward."""
        return min(n for n in self.sample_rows if n >= self.logit_rows(bucket))

    def bucket_plan(self, bucket: buckets.Bucket) -> bucket_plan.BucketPlan:
        """How a bucket's forward runs."""
        plan = self.plans.get(bucket)
        if plan is None:  # a plan for sparse layers runs dense ones too
            plan = builders.one(LayerShape(is_sparse=True), num_tokens=bucket.tokens)
        return bucket_plan.BucketPlan(bucket, plan, self.attention)


def forward_packing(sizes: Sizes, bucket: buckets.Bucket) -> packing.Packing:
    """What the host sends to a bucket's forward."""
    tokens, rows, pages = bucket.tokens, bucket.decode_rows, sizes.max_pages
    field = packing.Field
    fields = {
        "token_ids": field(shape=(tokens,)),
        "token_slots": field(shape=(tokens,), fill=sizes.max_requests),
        "positions": field(shape=(tokens,)),
        "pages": field(shape=(tokens,), fill=sizes.num_pages),
        "offsets": field(shape=(tokens,)),
        "decode_pages": field(shape=(rows, pages)),
        "decode_lens": field(shape=(rows,)),
        "logit_tokens": field(shape=(sizes.logit_rows(bucket),)),
    }
    if bucket.prefill_rows:
        fields["prefill_pages"] = field(shape=(bucket.prefill_rows, pages))
    return packing.Packing(fields | sizes.bucket_plan(bucket).fields())


def sample_packing(sizes: Sizes, *, rows: int, variant: sampling.SamplerVariant) -> packing.Packing:
    """What the host sends to sample."""
    field, real = packing.Field, np.float32
    fields = {"slots": field(shape=(rows,), fill=sizes.max_requests)}
    if variant is not sampling.SamplerVariant.GREEDY:
        fields |= {
            "temperature": field(shape=(rows,), dtype=real),
            "top_k": field(shape=(rows,)),
            "top_p": field(shape=(rows,), dtype=real, fill=1.0),
            "min_p": field(shape=(rows,), dtype=real),
            "seed": field(shape=(rows,), dtype=np.uint32),
            "position": field(shape=(rows,)),
        }
    if variant is sampling.SamplerVariant.FULL:
        words = -(-sizes.vocab_size // 32)
        fields |= {
            "presence": field(shape=(rows,), dtype=real),
            "frequency": field(shape=(rows,), dtype=real),
            "repetition": field(shape=(rows,), dtype=real, fill=1.0),
            "count_slot": field(shape=(rows,), fill=sizes.penalty_requests),
            "bias_ids": field(shape=(rows, MAX_BIAS), fill=sizes.vocab_size),
            "bias_values": field(shape=(rows, MAX_BIAS), dtype=real),
            "allowed": field(shape=(rows, words)),
            "has_allowed": field(shape=(rows,)),
            "wants_logprobs": field(shape=()),
        }
    return packing.Packing(fields)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardResult:
    """What forward leaves on the device.

    Attributes:
        caches: One per layer, updated in place.
        logits: One row per logit token, padded to the rows of a sample program.
        hidden: States of every token before the last norm, padded to the dense batch, for
            prompt_logprobs; None in a program without chunks.
    """

    caches: Sequence[Any]
    logits: Float[Array, "R V"]
    hidden: Float[Array, "T D"] | None


jax.tree_util.register_dataclass(ForwardResult)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shares:
    """How what the programs hold lies on the devices of an engine.

    Attributes:
        placement: The devices.
        caches: A partition for each array of the caches.
        weights: One for each weight.
    """

    placement: placement_lib.Placement
    caches: Any
    weights: Sequence[PartitionSpec]


def build_forward(
    graph: Any,
    treedef: Any,
    *,
    layout: layout.KvLayout,
    sizes: Sizes,
    bucket: buckets.Bucket,
    operations: operation_lib.Operations,
    shares: Shares,
    keep_lanes: bool = False,
) -> Callable[..., ForwardResult]:
    """The forward program of one bucket: (caches, last_tokens, weights, vector) -> result."""
    pack = forward_packing(sizes, bucket)
    planned = sizes.bucket_plan(bucket)
    group = shares.placement.group
    operations = dataclasses.replace(operations, group=group)

    def forward(
        caches: Sequence[Any],
        last_tokens: Int32[Array, "R"],
        weights: Sequence[Array],
        vector: Int32[Array, "X"],
    ) -> ForwardResult:
        model: transformer.Transformer = nnx.merge(graph, jax.tree.unflatten(treedef, weights))
        inputs = pack.unpack(vector)
        x, new_caches = model.run_layers(
            embedded(model, inputs, last_tokens, sizes, group),
            inputs["positions"],
            caches,
            planned.read(inputs, layout),
            operations=operations,
            plan=planned.plan,
            keep_lanes=keep_lanes,
        )
        logits = padded_logits(
            model, x, inputs["logit_tokens"], group, num_rows=sizes.padded_rows(bucket)
        )
        hidden = None
        if bucket.prefill_rows:
            hidden = jnp.pad(x, ((0, sizes.dense_batch - x.shape[0]), (0, 0)))
        return ForwardResult(caches=new_caches, logits=logits, hidden=hidden)

    whole = PartitionSpec()
    return collectives.on_each(
        forward,
        shares.placement.mesh,
        in_specs=(shares.caches, whole, shares.weights, whole),
        out_specs=_partitions(shares, has_hidden=bucket.prefill_rows > 0),
    )


def embedded(
    model: transformer.Transformer,
    inputs: Mapping[str, Array],
    last_tokens: Int32[Array, "R"],
    sizes: Sizes,
    group: collectives.Group,
) -> Float[Array, "T D"]:
    """What enters the first layer: of tokens that the host sent, and of those drawn last."""
    slots = inputs["token_slots"]
    sampled = last_tokens.at[slots].get(mode="clip")
    token_ids = jnp.where(slots < sizes.max_requests, sampled, inputs["token_ids"])
    return model.embed(token_ids, group)


def padded_logits(
    model: transformer.Transformer,
    x: Float[Array, "T D"],
    tokens: Int32[Array, "R"],
    group: collectives.Group,
    *,
    num_rows: int,
) -> Float[Array, "r V"]:
    """Logits of some tokens, in as many rows as the sample program that follows reads."""
    if group.num_devices > 1:  # each draws for equally many rows
        tokens = jnp.pad(tokens, (0, num_rows - tokens.shape[0]))
    logits = model.head(x.at[tokens].get(mode="clip"), group)
    return jnp.pad(logits, ((0, num_rows - tokens.shape[0]), (0, 0)))


def _partitions(shares: Shares, *, has_hidden: bool) -> Any:
    """How a forward's result lies on the devices, in its form."""
    parts: Any = {"logits": PartitionSpec(mesh.AXIS), "caches": shares.caches}
    return ForwardResult(**parts, hidden=PartitionSpec() if has_hidden else None)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleResult:
    """What sample leaves: device state, and one array for the host.

    Attributes:
        last_tokens: Newest token of each slot.
        table: Penalty table.
        out: int32 rows: token, ok, and in the full variant logprob, rank, top ids, top values,
            reals as bits.
    """

    last_tokens: Int32[Array, "S"]
    table: sampling.PenaltyTable
    out: Int32[Array, "R X"]


jax.tree_util.register_dataclass(SampleResult)


def build_sample(
    *,
    sizes: Sizes,
    rows: int,
    variant: sampling.SamplerVariant,
    placement: placement_lib.Placement,
) -> Callable[..., SampleResult]:
    """The sample program: (last_tokens, table, logits, vector) -> result.

    Each device draws for its own rows of the logits; all of them then keep what all have drawn.
    """
    pack = sample_packing(sizes, rows=rows, variant=variant)
    group = placement.group

    def sample(
        last_tokens: Int32[Array, "S"],
        table: sampling.PenaltyTable,
        logits: Float[Array, "r V"],
        vector: Int32[Array, "X"],
    ) -> SampleResult:
        inputs = pack.unpack(vector)
        wanted = inputs.pop("wants_logprobs", None)
        own = {name: group.own_rows(value) for name, value in inputs.items()}
        params = _row_params(own, logits.shape[0], variant)
        full = _full_params(own) if variant is sampling.SamplerVariant.FULL else None
        drawn = sampling.sample(logits, params, full, table, variant=variant)
        columns = [drawn.tokens[:, None], drawn.ok.astype(jnp.int32)[:, None]]
        if wanted is not None:
            columns.append(_logprob_columns(logits, drawn.tokens, wanted > 0))
        out = group.all_rows(jnp.concatenate(columns, axis=1))
        tokens = out[:, 0]
        if full is not None:
            table = sampling.count(table, inputs["count_slot"], tokens)
        updated = last_tokens.at[inputs["slots"]].set(tokens, mode="drop")
        return SampleResult(last_tokens=updated, table=table, out=out)

    whole, by_row = PartitionSpec(), PartitionSpec(mesh.AXIS)
    return collectives.on_each(
        sample, placement.mesh, in_specs=(whole, whole, by_row, whole), out_specs=whole
    )


def _row_params(
    inputs: dict[str, Array], rows: int, variant: sampling.SamplerVariant
) -> sampling.RowParams:
    if variant is sampling.SamplerVariant.GREEDY:
        zeros = jnp.zeros((rows,), jnp.float32)
        none = jnp.zeros((rows,), jnp.int32)
        return sampling.RowParams(
            temperature=zeros,
            top_k=none,
            top_p=zeros,
            min_p=zeros,
            seed=jnp.zeros((rows,), jnp.uint32),
            position=none,
        )
    names = [f.name for f in dataclasses.fields(sampling.RowParams)]
    return sampling.RowParams(**{name: inputs[name] for name in names})


def _full_params(inputs: dict[str, Array]) -> sampling.FullParams:
    names = [f.name for f in dataclasses.fields(sampling.FullParams) if f.name != "has_allowed"]
    return sampling.FullParams(
        has_allowed=inputs["has_allowed"] > 0, **{name: inputs[name] for name in names}
    )


def _logprob_columns(
    logits: Float[Array, "R V"], tokens: Int32[Array, "R"], wanted: Array
) -> Int32[Array, "R X"]:
    """Logprob, rank, top ids and top values as bits; zeros when no row wants them."""
    count = min(request.MAX_LOGPROBS, logits.shape[1])

    def compute() -> Int32[Array, "R X"]:
        found = sampling.prompt_logprobs(logits, tokens, num_logprobs=count)
        parts = (found.token[:, None], found.rank[:, None], found.top_ids, found.top_values)
        return jnp.concatenate([packing.as_bits(part) for part in parts], axis=1)

    def skip() -> Int32[Array, "R X"]:
        return jnp.zeros((logits.shape[0], 2 + 2 * count), jnp.int32)

    return jax.lax.cond(wanted, compute, skip)


def build_prompt_logprobs(
    graph: Any, treedef: Any, shares: Shares
) -> Callable[..., Int32[Array, "C X"]]:
    """Logprobs of a bounded slice of prompt positions: (weights, hidden, vector) -> rows.

    The vector holds the flat token index of each position, then the token that follows it.
    """
    group = shares.placement.group

    def prompt_logprobs(
        weights: Sequence[Array], hidden: Float[Array, "T D"], vector: Int32[Array, "X"]
    ) -> Int32[Array, "C X"]:
        model: transformer.Transformer = nnx.merge(graph, jax.tree.unflatten(treedef, weights))
        places, targets = vector.reshape(2, -1)
        logits = model.head(hidden.at[places].get(mode="clip"), group)
        return group.all_rows(_logprob_columns(logits, group.own_rows(targets), jnp.asarray(True)))

    whole = PartitionSpec()
    return collectives.on_each(
        prompt_logprobs,
        shares.placement.mesh,
        in_specs=(shares.weights, whole, whole),
        out_specs=whole,
    )


def build_reset(*, sizes: Sizes, max_context_len: int) -> Callable[..., sampling.PenaltyTable]:
    """Gives a row of the penalty table to a request: (table, vector) -> table.

    The vector holds the row, then prompt ids, then output ids, each padded with V.
    """

    def reset(table: sampling.PenaltyTable, vector: Int32[Array, "X"]) -> sampling.PenaltyTable:
        prompt, output = vector[1:].reshape(2, max_context_len)
        return sampling.reset_slot(table, vector[0], prompt, output)

    return reset
