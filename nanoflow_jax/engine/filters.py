"""One draw a row: the filters min_p, top_k and top_p, and a race of what they leave.

Filters are a floor under the row's scaled logits. Tokens that tie at the floor all stay. The floor
is found among the largest few entries of the row where they hold all that is kept, else by
search over the int32 image of float32, which orders as the floats do: exact, and no sort of the
vocabulary. A CPU halves, in at most 32 rounds that end early; a GPU, which would have to ask its
host after each round whether to go on, tries 8 floors in each of 10 passes over the row.

What is kept races (Gumbel-max): every token has its own random delay, and the largest sum of
logit and noise wins. Inverting the running sum would need one random number instead of some
hundred, but moves all later borders when one logit changes in its last bit, as it does between
batch shapes: 5 of 500 rows of 40 tokens drew another token for it, see docs/decisions.md.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from nanoflow_jax.engine.logit_rows import WIDE, blocks, ones, row_sum, top

FADED = -104.0  # exp() of anything lower is 0 in float32
_HEAD = 64  # largest entries of a row looked at before any search
# Logits searched at a time: they stay in the second-level cache of a core, or of a GPU (16 MiB).
_CPU_CELLS = 1 << 18
_GPU_CELLS = 1 << 22
_FLOORS_AT_ONCE = 8  # as many sums as XLA:GPU makes in one pass
_PASSES = 10  # enough to cut [FADED, 0] into ninths until images are neighbours

_Bracket = tuple[Array, Array, Array, Array]  # low, high, entries kept at low, and at high
_Find = Callable[..., Array]  # `_bisect` or `_divide`
_Weigh = Callable[[Array], Array]  # scaled logits to what is summed of those kept


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Filters:
    """A row's filters in terms of its scaled logits, (logit - peak) / scale: 0 at the largest.

    Subtracting first keeps a tiny temperature from overflowing anything but losers, to -inf.
    """

    peak: Float[Array, "R"]
    scale: Float[Array, "R"]
    floor: Float[Array, "R"]  # scaled logits below it are out; at least FADED
    top_k: Int[Array, "R"]
    top_p: Float[Array, "R"]

    def limited(self) -> Bool[Array, "R"]:
        """Rows whose floor depends on the other logits."""
        return (self.top_k > 0) | (self.top_p < 1)

    def scaled(self, x: Float[Array, "R *X"]) -> Float[Array, "R *X"]:
        """Logits to scaled logits."""
        per_row = (-1,) + (1,) * (x.ndim - 1)
        return (x - self.peak.reshape(per_row)) / self.scale.reshape(per_row)

    def weights(self, x: Float[Array, "R *X"]) -> Float[Array, "R *X"]:
        """Logits to unnormalised probabilities, exactly 0 below the floor."""
        y = self.scaled(x)
        floor = self.floor.reshape((-1,) + (1,) * (x.ndim - 1))
        return jnp.where(y >= floor, jnp.exp(y), 0.0)


def draw_from_head(
    x: Float[Array, "R V"], filters: Filters, keys: Key[Array, "R"]
) -> tuple[Bool[Array, "R"], Int[Array, "R"]]:
    """Draws among the `_HEAD` largest logits.

    Returns:
        Whether all that a row's filters keep is there, and the token (meaningless if not).
    """
    values, ids = top(x, min(_HEAD, x.shape[1]))
    size = values.shape[1]
    y = filters.scaled(values)

    def complete(floor: Float[Array, "R"]) -> Bool[Array, "R"]:
        return (y[:, -1] < floor) | jnp.full_like(floor, size == x.shape[1], dtype=jnp.bool_)

    has_k = filters.top_k > 0
    kth = jnp.take_along_axis(y, jnp.clip(filters.top_k, 1, size)[:, None] - 1, axis=1)[:, 0]
    floor = jnp.maximum(filters.floor, jnp.where(has_k, kth, -jnp.inf))
    left = complete(floor) & (filters.top_k <= size)  # what min_p and top_k leave is in the head
    weights = jnp.where(y >= floor[:, None], jnp.exp(y), 0.0)
    sums = jnp.cumsum(weights, axis=1)

    has_p = filters.top_p < 1
    total = lax.cond(
        (has_p & ~left).any(),
        lambda: jnp.where(left, sums[:, -1], row_sum(filters.weights(blocks(x, WIDE)))),
        lambda: sums[:, -1],
    )
    reached = sums >= (filters.top_p * total)[:, None]
    nucleus = jnp.take_along_axis(y, jnp.argmax(reached, axis=1)[:, None], axis=1)[:, 0]
    floor = jnp.where(has_p & reached[:, -1], jnp.maximum(floor, nucleus), floor)
    # With top_k beyond the head, or top_p's end beyond it, the row must be searched.
    known = (left | (~has_k & reached[:, -1])) & complete(floor)
    index = _race(jnp.where(y >= floor[:, None], y, -jnp.inf), keys, ids)
    return known, jnp.take_along_axis(ids, index[:, None], axis=1)[:, 0]


def draw_from_row(
    x: Float[Array, "R V"], filters: Filters, keys: Key[Array, "R"]
) -> Int[Array, "R"]:
    """Draws among all logits at or above the floor: first the block, then the token in it."""
    parts = blocks(x, WIDE)
    num_blocks, width = parts.shape[1:]
    sums = filters.weights(parts).sum(axis=2)
    numbers = jnp.arange(num_blocks, dtype=jnp.int32)[None]
    # Noise of blocks is numbered after that of tokens.
    block = _race(jnp.log(sums), keys, num_blocks * width + jnp.broadcast_to(numbers, sums.shape))
    chosen = jnp.take_along_axis(parts, block[:, None, None], axis=1)[:, 0]
    y = filters.scaled(chosen)
    y = jnp.where(y >= filters.floor[:, None], y, -jnp.inf)
    first = block * width
    index = _race(y, keys, first[:, None] + jnp.arange(width, dtype=jnp.int32)[None])
    return first + index


def _race(y: Float[Array, "R N"], keys: Key[Array, "R"], ids: Int[Array, "R N"]) -> Int[Array, "R"]:
    """Index drawn with probability proportional to exp(y), of a row that has a finite y.

    Args:
        y: -inf where nothing may be drawn.
        keys: Each row's randomness.
        ids: Which of the row's random numbers each entry gets.
    """
    fold = jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))
    bits = jax.random.key_data(fold(keys, ids))[..., 0]
    # In (0, 1), and fine near 0, where the winners are: noise reaches up to 23.
    uniform = jnp.minimum((bits.astype(jnp.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    noise = -jnp.log(-jnp.log1p(-uniform))
    return jnp.argmax(y + noise, axis=1).astype(jnp.int32)


def search(x: Float[Array, "R V"], filters: Filters, wanted: Bool[Array, "R"]) -> Filters:
    """Raises the floors of the wanted rows to what their top_k and top_p ask, exactly."""
    num_rows, size = x.shape

    def in_groups_of(cells: int, find: _Find) -> Callable[..., Float[Array, "R"]]:
        group = min(max(cells // size, 1), num_rows)
        return functools.partial(_search_in_groups, group=group, find=find)

    floor = lax.platform_dependent(
        x,
        filters,
        wanted,
        cpu=in_groups_of(_CPU_CELLS, _bisect),
        default=in_groups_of(_GPU_CELLS, _divide),
    )
    return dataclasses.replace(filters, floor=floor)


def _search_in_groups(
    x: Float[Array, "R V"], filters: Filters, wanted: Bool[Array, "R"], *, group: int, find: _Find
) -> Float[Array, "R"]:
    num_rows = x.shape[0]
    # Wanted rows first; the filling is out of range: read as the last row, written nowhere.
    order = jnp.argsort(~wanted, stable=True).astype(jnp.int32)
    order = jnp.pad(order, (0, -num_rows % group), constant_values=num_rows)

    def search_group(i: Int[Array, ""], floor: Float[Array, "R"]) -> Float[Array, "R"]:
        rows = lax.dynamic_slice_in_dim(order, i * group, group)
        part, want = jax.tree.map(lambda a: a.at[rows].get(mode="clip"), (filters, wanted))
        found = _floors(x.at[rows].get(mode="clip"), part, find)
        return floor.at[rows].set(jnp.where(want, found, part.floor), mode="drop")

    num_groups = (wanted.astype(jnp.int32).sum() + group - 1) // group
    return lax.fori_loop(0, num_groups, search_group, filters.floor)


def _floors(x: Float[Array, "G V"], filters: Filters, find: _Find) -> Float[Array, "G"]:
    """Floors that leave what top_k and then top_p leave."""
    y = blocks(filters.scaled(x), WIDE)
    top_k = filters.top_k.astype(jnp.float32)
    floor = find(y, filters.floor, filters.top_k > 0, jnp.ones_like, top_k)
    mass = row_sum(jnp.where(y >= floor[:, None, None], jnp.exp(y), 0.0))
    return find(y, floor, filters.top_p < 1, jnp.exp, filters.top_p * mass)


def _bisect(
    y: Float[Array, "G N X"],
    floor: Float[Array, "G"],
    wanted: Bool[Array, "G"],
    weigh: _Weigh,
    goal: Float[Array, "G"],
) -> Float[Array, "G"]:
    """Largest floor at which what is kept still weighs the goal; `floor` if it never does.

    Bisects [low, high): low reaches the goal and high does not. A row is done when only one
    entry lies between them, or, where several tie, when the two are neighbouring floats.
    """
    weights = weigh(y)

    def test(low: Int[Array, "G"]) -> tuple[Bool[Array, "G"], Float[Array, "G"]]:
        keep = y >= _float_of(low)[:, None, None]
        return row_sum(jnp.where(keep, weights, 0.0)) >= goal, row_sum(ones(keep))

    def active(state: _Bracket) -> Bool[Array, "G"]:
        low, high, kept_low, kept_high = state
        return wanted & (high - low > 1) & (kept_low - kept_high > 1)

    def halve(state: _Bracket) -> _Bracket:
        low, high, kept_low, kept_high = state
        middle = low + (high - low) // 2
        enough, kept = test(middle)
        up, down = active(state) & enough, active(state) & ~enough
        return (
            jnp.where(up, middle, low),
            jnp.where(down, middle, high),
            jnp.where(up, kept, kept_low),
            jnp.where(down, kept, kept_high),
        )

    low = _image_of(floor)
    enough, kept = test(low)
    high = jnp.where(enough, _image_of(jnp.zeros_like(floor)) + 1, low)
    state = (low, high, kept, jnp.zeros_like(kept))
    return _float_of(lax.while_loop(lambda state: active(state).any(), halve, state)[0])


def _divide(
    y: Float[Array, "G N X"],
    floor: Float[Array, "G"],
    wanted: Bool[Array, "G"],
    weigh: _Weigh,
    goal: Float[Array, "G"],
) -> Float[Array, "G"]:
    """A floor that keeps what that of `_bisect` keeps: the largest at which the goal is reached.

    Each pass cuts [low, low + width), whose low reaches the goal, into equal steps and goes on
    with the last of them whose lower end reaches it too, until the width is 1.
    """

    def num_reached(
        low: Int[Array, "G"], steps: list[Int[Array, "G"]], width: Int[Array, "G"]
    ) -> Int[Array, "G"]:
        kept = [y >= _float_of(low + step)[:, None, None] for step in steps]
        parts = [jnp.where(keep, weigh(y), 0.0).sum(axis=2) for keep in kept]  # each [G, N]
        reached = jnp.stack(parts).sum(axis=2) >= goal[None]  # [steps, G]
        return (reached & (jnp.stack(steps) < width[None])).astype(jnp.int32).sum(axis=0)

    def narrow(_: Int[Array, ""], state: tuple[Array, Array]) -> tuple[Array, Array]:
        low, width = state
        step = (width + _FLOORS_AT_ONCE) // (_FLOORS_AT_ONCE + 1)
        steps = [(i + 1) * step for i in range(_FLOORS_AT_ONCE)]
        above = num_reached(low, steps, width) * step
        return low + above, jnp.minimum(step, width - above)

    def find() -> Float[Array, "G"]:
        low = _image_of(floor)
        width = _image_of(jnp.zeros_like(floor)) + 1 - low
        width *= num_reached(low, [jnp.zeros_like(low)], width)
        low, _ = lax.fori_loop(0, _PASSES, narrow, (low, width))
        return jnp.where(wanted, _float_of(low), floor)

    return lax.cond(wanted.any(), find, lambda: floor)


def _image_of(y: Float[Array, "G"]) -> Int[Array, "G"]:
    """Integers that order as the floats do; 0 for 0, one less for -0."""
    bits = lax.bitcast_convert_type(y, jnp.int32)
    return bits ^ (bits >> 31 & 0x7FFFFFFF)


def _float_of(image: Int[Array, "G"]) -> Float[Array, "G"]:
    return lax.bitcast_convert_type(image ^ (image >> 31 & 0x7FFFFFFF), jnp.float32)
