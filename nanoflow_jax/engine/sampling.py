"""From logit rows to tokens, on the device and without sorting the vocabulary.

Order of processing, that of vLLM's V1 sampler: allowed tokens, bias (which also bans
end-of-text ids for min_tokens, with -inf) -> penalties -> temperature -> min_p -> top_k ->
top_p -> draw. A filter is a floor under the scaled logits, so tokens that tie at the floor
all stay; top_p keeps the smallest set of most likely tokens, and their ties, that holds the
fraction `top_p` of what min_p and top_k left. Logprobs are those of the raw logits.

A row's token is a function of that row alone: whether `filters.py` finds it among the largest
few logits or has to search the row depends on no other row.
"""

import dataclasses
import enum

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from nanoflow_jax.engine.filters import FADED, Filters, draw_from_head, draw_from_row, search
from nanoflow_jax.engine.logit_rows import WIDE, argmax, blocks, ones, row_sum, top


class SamplerVariant(enum.Enum):
    """How much of the sampler a program contains; a batch runs the least that serves its rows.

    Each serves all rows that those before it do.
    """

    GREEDY = "greedy"  # every row takes its largest logit
    FILTERED = "filtered"  # temperature, min_p, top_k, top_p
    FULL = "full"  # allowed tokens, bias and penalties as well


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RowParams:
    """How each row is drawn; row r's only randomness is fold_in(key(seed[r]), position[r])."""

    temperature: Float[Array, "R"]  # 0: the row takes its largest processed logit
    top_k: Int[Array, "R"]  # 0: off
    top_p: Float[Array, "R"]  # 1: off
    min_p: Float[Array, "R"]  # 0: off
    seed: UInt32[Array, "R"]
    position: Int[Array, "R"]  # index in its request of the token being drawn


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class FullParams:
    """What SamplerVariant.FULL does to each row's logits before they are drawn from.

    `W` is ceil(V / 32): token i is bit i % 32 of word i // 32, llguidance's bitmask, so a
    grammar's mask can take the place of the allowed tokens.
    """

    presence: Float[Array, "R"]  # 0: off
    frequency: Float[Array, "R"]  # 0: off
    repetition: Float[Array, "R"]  # 1: off
    count_slot: Int[Array, "R"]  # row of the penalty table; its capacity: no penalties
    bias_ids: Int[Array, "R B"]  # padded with V
    bias_values: Float[Array, "R B"]
    allowed: Int[Array, "R W"]
    has_allowed: Bool[Array, "R"]  # False: the row ignores its mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PenaltyTable:
    """Tokens seen by the requests that use penalties, one of C slots each."""

    output_counts: Int[Array, "C V"]
    prompt_seen: Bool[Array, "C V"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Logprobs:
    """Log-probabilities under the raw logits, before any processing."""

    token: Float[Array, "R"]
    rank: Int[Array, "R"]  # 1 + number of tokens with a larger logit
    top_ids: Int[Array, "R K"]  # largest first; of equal ones the lower id first
    top_values: Float[Array, "R K"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples:
    """One token a row. Where `ok` is False the row had no token to give, and `tokens` holds 0."""

    tokens: Int[Array, "R"]
    ok: Bool[Array, "R"]  # False: a NaN or +inf among the logits, or every token banned
    logprobs: Logprobs | None


def sample(
    logits: Float[Array, "R V"],
    row: RowParams,
    full: FullParams | None = None,
    table: PenaltyTable | None = None,
    *,
    variant: SamplerVariant,
    num_logprobs: int = 0,
) -> Samples:
    """Draws one token a row.

    Args:
        logits: Any float dtype; all arithmetic is in float32.
        row: Read by FILTERED and FULL.
        full: Read by FULL.
        table: Read by FULL.
        variant: What the program contains.
        num_logprobs: Most likely tokens to report beside the drawn one; 0 reports nothing.

    Raises:
        ValueError: The variant is FULL and `full` or `table` is missing.
    """
    raw = logits.astype(jnp.float32)
    # The NaN test is a sum because XLA:CPU's max skips NaN; a lone -inf (a ban) leaves it alone.
    ok = ~jnp.isnan(row_sum(blocks(raw, WIDE)))
    if variant is SamplerVariant.GREEDY:
        peak, tokens = argmax(raw)
    else:
        x = raw
        if variant is SamplerVariant.FULL:
            if full is None or table is None:
                raise ValueError(
                    f"SamplerVariant.FULL needs full and table, got full={full}, table={table}; "
                    "pass both or use SamplerVariant.FILTERED"
                )
            x = process_logits(raw, full, table)
        peak, tokens = _draw(x, row, ok)
    ok = ok & jnp.isfinite(peak)
    tokens = jnp.where(ok, tokens, 0)
    logprobs = _logprobs(raw, tokens, num_logprobs) if num_logprobs else None
    return Samples(tokens=tokens, ok=ok, logprobs=logprobs)


def prompt_logprobs(
    logits: Float[Array, "T V"], targets: Int[Array, "T"], *, num_logprobs: int
) -> Logprobs:
    """Logprobs of the tokens that follow T prompt positions, one row a position."""
    return _logprobs(logits.astype(jnp.float32), targets, num_logprobs)


def process_logits(
    x: Float[Array, "R V"], full: FullParams, table: PenaltyTable
) -> Float[Array, "R V"]:
    """Applies masks, biases and penalties; what no row uses is skipped when the program runs.

    repetition_penalty divides positive and multiplies other logits of tokens in the prompt or
    the output, as transformers does; presence and frequency look at the output alone, as
    OpenAI defines them.
    """
    capacity, vocab_size = table.output_counts.shape

    def mask(x: Float[Array, "R V"]) -> Float[Array, "R V"]:
        bits = (
            full.allowed[:, :, None] >> jnp.arange(32, dtype=jnp.int32)[None, None] & 1
        )  # [R, W, 32]
        bits = bits.reshape(x.shape[0], -1)[:, :vocab_size]
        return jnp.where((bits == 1) | ~full.has_allowed[:, None], x, -jnp.inf)

    def bias(x: Float[Array, "R V"]) -> Float[Array, "R V"]:
        rows = lax.broadcasted_iota(jnp.int32, full.bias_ids.shape, 0)
        return x.at[rows, full.bias_ids].add(full.bias_values, mode="drop")

    def penalise(x: Float[Array, "R V"]) -> Float[Array, "R V"]:
        counts = table.output_counts.at[full.count_slot].get(mode="fill", fill_value=0)
        prompt = table.prompt_seen.at[full.count_slot].get(mode="fill", fill_value=False)
        repetition = jnp.where(prompt | (counts > 0), full.repetition[:, None], 1.0)
        x = jnp.where(x > 0, x / repetition, x * repetition)
        x = x - full.frequency[:, None] * counts.astype(jnp.float32)
        return x - full.presence[:, None] * (counts > 0).astype(jnp.float32)

    x = lax.cond(full.has_allowed.any(), mask, lambda x: x, x)
    x = lax.cond((full.bias_ids < vocab_size).any(), bias, lambda x: x, x)
    return lax.cond((full.count_slot < capacity).any(), penalise, lambda x: x, x)


def empty_table(capacity: int, vocab_size: int) -> PenaltyTable:
    """A table in which no slot has seen a token."""
    return PenaltyTable(
        output_counts=jnp.zeros((capacity, vocab_size), jnp.int32),
        prompt_seen=jnp.zeros((capacity, vocab_size), jnp.bool_),
    )


def reset_slot(
    table: PenaltyTable,
    slot: Int[Array, ""],
    prompt_ids: Int[Array, "P"],
    output_ids: Int[Array, "O"],
) -> PenaltyTable:
    """Gives a slot to a request with these tokens; both lists are padded with V."""
    vocab_size = table.output_counts.shape[1]
    counts = jnp.zeros((vocab_size,), jnp.int32).at[output_ids].add(1, mode="drop")
    seen = jnp.zeros((vocab_size,), jnp.bool_).at[prompt_ids].set(True, mode="drop")
    return PenaltyTable(
        output_counts=table.output_counts.at[slot].set(counts),
        prompt_seen=table.prompt_seen.at[slot].set(seen),
    )


def count(
    table: PenaltyTable, count_slot: Int[Array, "R"], tokens: Int[Array, "R"]
) -> PenaltyTable:
    """Adds one drawn token a row; a row whose slot is the capacity adds nothing."""
    counts = table.output_counts.at[count_slot, tokens].add(1, mode="drop")
    return dataclasses.replace(table, output_counts=counts)


def _draw(
    x: Float[Array, "R V"], row: RowParams, ok: Bool[Array, "R"]
) -> tuple[Float[Array, "R"], Int[Array, "R"]]:
    """Each row's largest logit, and its token: that one at temperature 0, else a drawn one."""
    peak, largest = argmax(x)
    drawn = ok & jnp.isfinite(peak) & (row.temperature > 0)
    scale = jnp.where(drawn, row.temperature, 1.0)
    filters = Filters(
        peak=jnp.where(drawn, peak, 0.0),
        scale=scale,
        floor=jnp.maximum(jnp.log(row.min_p), FADED),
        top_k=jnp.where((row.top_k > 0) & (row.top_k < x.shape[1]), row.top_k, 0),
        top_p=row.top_p,
    )
    keys = _keys(row.seed, row.position)
    has_filter = drawn & (filters.limited() | (row.min_p > 0))
    closed, tokens = lax.cond(
        has_filter.any(),
        lambda: draw_from_head(x, filters, keys),
        lambda: (jnp.zeros_like(drawn), largest),
    )
    closed = closed & has_filter
    tokens = lax.cond(
        (drawn & ~closed).any(),
        lambda: jnp.where(
            closed,
            tokens,
            draw_from_row(x, search(x, filters, drawn & ~closed & filters.limited()), keys),
        ),
        lambda: tokens,
    )
    return peak, jnp.where(drawn, tokens, largest)


def _logprobs(x: Float[Array, "R V"], tokens: Int[Array, "R"], num_logprobs: int) -> Logprobs:
    parts = blocks(x, WIDE)
    peak = parts.max(axis=2).max(axis=1)
    log_total = jnp.log(row_sum(jnp.exp(parts - peak[:, None, None])))
    own = jnp.take_along_axis(x, tokens[:, None], axis=1)
    larger = row_sum(ones(parts > own[:, :, None]))  # floats: exact below 2 ** 24
    values, ids = top(x, min(num_logprobs, x.shape[1]))
    return Logprobs(
        token=own[:, 0] - peak - log_total,  # the peak first: large logits lose nothing
        rank=larger.astype(jnp.int32) + 1,
        top_ids=ids,
        top_values=values - peak[:, None] - log_total[:, None],
    )


def _keys(seed: UInt32[Array, "R"], position: Int[Array, "R"]) -> Key[Array, "R"]:
    """Each row's randomness, a function of its request's seed and the token's index."""

    def one(seed: UInt32[Array, ""], position: Int[Array, ""]) -> Key[Array, ""]:
        return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position)

    return jax.vmap(one)(seed, position)
