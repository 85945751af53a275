"""What one CTA of decode attention does; `decode_attention` says what for.

Each of a CTA's two compute warpgroups takes one worker of `work_list` after another: it walks their
items, over its own ring of tiles, and never waits for the other. The third warpgroup fetches (TMA)
for both, across the borders of items and workers. A tile's scores are a product of 64 rows (WGMMA),
of which the N / K query heads of a kv head fill the first.

Source: warp-specialised loop, running softmax between two products: FlashAttention-3
(arXiv 2407.08608, section 3.1).
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from nanoflow_jax import compat
from pallas_kernels import checks, mosaic
from pallas_kernels.decode_walk import Item, Place, Walk
from pallas_kernels.scores import powers
from pallas_kernels.work_list import TILE_LEN, WORKERS_PER_CTA

# Stands for minus infinity where a difference is taken: -inf - -inf would be NaN.
_LOWEST = -1e30
# Rows of a warpgroup's product, of which one kv head's query heads are the first.
_ROWS = 64
# Of wider heads tiles are half as long: else scores would not fit into registers beside results.
_WHOLE_TILE_HEAD_DIM = 176
_SHORT_TILE_LEN = TILE_LEN // 2
# Up to it there are registers enough for results to leave in wide slices.
_WIDE_SLICE_HEAD_DIM = 128
_QUERY_SLOTS = 2
# Columns that leave at a time through shared memory: the most, of results and of parts.
_OUT_COLUMNS = 64
_PART_COLUMNS = 32
# Barriers of one array have their phases in one 32-bit register.
_MOST_STAGES = 32 // WORKERS_PER_CTA
_BARRIER_BYTES = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """What a model says of its scores, and how the kernel runs.

    Raises:
        ValueError: A number is out of its range.
    """

    scale: float
    window: int | None
    softcap: float | None
    interpreted: bool

    def __post_init__(self) -> None:
        checks.check_scores(scale=self.scale, window=self.window, softcap=self.softcap)

    def powers(self, products: Any) -> Any:
        """Scores of products of queries and keys, as powers of 2."""
        return powers(products, scale=self.scale, softcap=self.softcap)


@dataclasses.dataclass(frozen=True)
class DecodeRefs:
    """Refs of one decode attention in global memory; G2 is N / K filled up to rows of TMA."""

    q: Any  # [R * K, G2, H]
    cache: Any  # [P, 2, K, S, H]
    page_table: Any  # [R, M]
    context_lens: Any  # [R]
    live: Any  # [R, 3]
    workers: Any  # [W, 5]
    out: Any  # [R * K, G2, H]
    parts: Any  # [C, G2, H]
    part_weights: Any  # [C, G2]


def decode_role(index: Any, num_ctas: Any, refs: DecodeRefs, options: DecodeOptions) -> None:
    """What CTA `index` of `num_ctas` does; the device may compute both."""
    _Decode(refs, options).run(index, num_ctas)


def _tile_len(head_dim: int) -> int:
    """Tokens that are multiplied at a time."""
    is_whole = head_dim <= _WHOLE_TILE_HEAD_DIM or head_dim % _ROWS
    return TILE_LEN if is_whole or not compat.CAN_LOAD_TRANSPOSED else _SHORT_TILE_LEN


class _Decode:
    """The kernel of one decode attention, as it is traced."""

    def __init__(self, refs: DecodeRefs, options: DecodeOptions) -> None:
        self._refs, self._options = refs, options
        self._dtype = refs.cache.dtype
        _, _, self._num_kv_heads, self._page_size, self._head_dim = refs.cache.shape
        self._group = refs.q.shape[1]
        self._tile_len = _tile_len(self._head_dim)
        # Pages, or parts of one, in a tile.
        self._pieces = max(1, self._tile_len // self._page_size)
        # Queries lie so close that the product of one reads rows of the next, to no effect. The
        # race detector would rightly see a write to those, so interpreted ones lie apart.
        self._query_step = _ROWS if options.interpreted else self._group
        self._query_rows = _ROWS + (WORKERS_PER_CTA * _QUERY_SLOTS - 1) * self._query_step
        # Wide ones have neither registers nor shared memory to spare.
        narrower = 1 if self._head_dim <= _WIDE_SLICE_HEAD_DIM else 2
        self._out_columns = math.gcd(self._head_dim, _OUT_COLUMNS // narrower)
        self._part_columns = math.gcd(self._head_dim, _PART_COLUMNS // narrower)
        self._stages = self._num_stages()
        self._walk = Walk(
            live=refs.live,
            workers=refs.workers,
            context_lens=refs.context_lens,
            num_kv_heads=self._num_kv_heads,
            tiles_each=TILE_LEN // self._tile_len,
        )

    def _num_stages(self) -> int:
        """Tiles of keys or of values in each worker's ring: all that fits."""
        itemsize = jnp.dtype(self._dtype).itemsize
        query_rows = _ROWS + (WORKERS_PER_CTA * _QUERY_SLOTS - 1) * self._group
        queries = query_rows * self._head_dim * itemsize
        out_row = self._out_columns * itemsize + self._part_columns * 4
        out = WORKERS_PER_CTA * _ROWS * out_row
        tile = self._tile_len * self._head_dim * itemsize
        if self._options.interpreted:
            return 3  # fewer than a test's tiles
        left = mosaic.SHARED_BYTES - queries - out - _BARRIER_BYTES
        return min(left // (WORKERS_PER_CTA * tile), _MOST_STAGES)

    def run(self, index: Any, num_ctas: Any) -> None:
        def scope(**scratch: Any) -> None:
            warpgroup = lax.axis_index("warpgroup")
            scratch_refs = _Scratch(**scratch)

            @pl.when(warpgroup == mosaic.MEMORY_WARPGROUP)
            def _() -> None:
                plgpu.set_max_registers(mosaic.MEMORY_REGISTERS, action="decrease")
                self._fetch(index, num_ctas, scratch_refs)

            @pl.when(warpgroup < WORKERS_PER_CTA)
            def _() -> None:
                plgpu.set_max_registers(mosaic.COMPUTE_REGISTERS, action="increase")
                self._compute(index, num_ctas, warpgroup, scratch_refs)

        pl.run_scoped(scope, collective_axes="warpgroup", **self._scratch())

    def _scratch(self) -> dict[str, Any]:
        workers, head_dim, dtype = WORKERS_PER_CTA, self._head_dim, self._dtype
        wide = mosaic.swizzled(head_dim, dtype, most_columns=self._tile_len)

        def slices(columns: int, dtype: Any) -> Any:
            shape = (workers, _ROWS, columns)
            return plgpu.SMEM(shape, dtype, transforms=mosaic.swizzled(columns, dtype))

        scratch = {
            "queries": plgpu.SMEM((self._query_rows, head_dim), dtype, transforms=wide),
            "tiles": plgpu.SMEM(
                (workers, self._stages, self._tile_len, head_dim), dtype, transforms=wide
            ),
            "out": slices(self._out_columns, dtype),
            "part": slices(self._part_columns, jnp.float32),
            "part_weight": plgpu.SMEM((workers, _ROWS), jnp.float32),
            "query_full": plgpu.Barrier(num_barriers=workers * _QUERY_SLOTS),
            "query_empty": plgpu.Barrier(num_barriers=workers * _QUERY_SLOTS),
            "tile_full": plgpu.Barrier(
                num_arrivals=self._pieces, num_barriers=workers * self._stages
            ),
            "tile_empty": plgpu.Barrier(num_barriers=workers * self._stages),
        }
        if self._options.interpreted:
            shape = (workers, _ROWS, self._tile_len)
            scratch["weights"] = plgpu.SMEM(
                shape, dtype, transforms=mosaic.swizzled(self._tile_len, dtype)
            )
        return scratch

    # ---- the warpgroup that fetches

    def _fetch(self, index: Any, num_ctas: Any, s: "_Scratch") -> None:
        """Fetches for both workers of a CTA of the plan in turn, then for those of the next."""
        workers = range(WORKERS_PER_CTA)

        def one_cta(i: Any, counts: Any) -> Any:
            first_worker = (index + i * num_ctas) * WORKERS_PER_CTA
            begins = [self._walk.begin(first_worker + slot)[0] for slot in workers]
            num_tiles = jnp.maximum(*(begin.left for begin in begins)) * self._walk.tiles_each

            def step(_: Any, states: Any) -> Any:
                return tuple(self._fetch_one(slot, states[slot], s) for slot in workers)

            states = tuple(
                _Fetched(place=begin, within=jnp.int32(0), items=items, tiles=tiles)
                for begin, (items, tiles) in zip(begins, counts, strict=True)
            )
            states = lax.fori_loop(jnp.int32(0), num_tiles, step, states)
            return tuple((state.items, state.tiles) for state in states)

        zero = jnp.int32(0)
        counts = lax.fori_loop(
            zero, self._walk.planned_ctas(index, num_ctas), one_cta, ((zero, zero),) * len(workers)
        )
        # A barrier must not end with an arrival that nobody has seen.
        for slot, (items, tiles) in enumerate(counts):
            self._drain(s.tile_empty, slot, self._stages, 2 * tiles)
            self._drain(s.query_empty, slot, _QUERY_SLOTS, items)

    def _fetch_one(self, slot: int, state: "_Fetched", s: "_Scratch") -> "_Fetched":
        """Fetches keys and values of one tile, before an item's first its queries."""
        item = self._walk.item(state.place)
        is_there = state.place.left > 0

        @pl.when(is_there & (state.within == 0))
        def _() -> None:
            place = lax.rem(state.items, jnp.int32(_QUERY_SLOTS)) + slot * _QUERY_SLOTS

            @pl.when(state.items >= _QUERY_SLOTS)
            def _() -> None:
                plgpu.barrier_wait(s.query_empty.at[place])

            rows = pl.ds(place * self._query_step, self._group)
            query = self._refs.q.at[item.request * self._num_kv_heads + item.head]
            plgpu.copy_gmem_to_smem(query, s.queries.at[rows], s.query_full.at[place])

        @pl.when(is_there)
        def _() -> None:
            pages = self._pages(item, item.first_tile + state.within)
            for part in range(2):  # keys, values
                self._fetch_tile(pages, part, item.head, slot, 2 * state.tiles + part, s)

        is_last = is_there & (state.within + 1 == item.num_tiles)
        one = is_there.astype(jnp.int32)
        here = state.place
        return _Fetched(
            place=Place(
                *(jnp.where(is_last, *both) for both in zip(item.after, here, strict=True))
            ),
            within=jnp.where(is_last, 0, state.within + one),
            items=state.items + is_last.astype(jnp.int32),
            tiles=state.tiles + one,
        )

    def _pages(self, item: Item, tile: Any) -> list[tuple[Any, Any]]:
        """Page and first token in it for each piece of a tile."""
        table, tile_len, page_size = self._refs.page_table, self._tile_len, self._page_size
        # Past the last page its like is fetched again: the number of arrivals stays the same.
        last = lax.div(item.length - 1, jnp.int32(page_size))
        if page_size > tile_len:
            # Written so that the compiler sees what first tokens are multiples of.
            num_tiles = jnp.int32(page_size // tile_len)
            number = jnp.minimum(lax.div(tile, num_tiles), last)
            return [(table[item.request, number], lax.rem(tile, num_tiles) * tile_len)]
        numbers = [jnp.minimum(tile * self._pieces + i, last) for i in range(self._pieces)]
        return [(table[item.request, number], 0) for number in numbers]

    def _fetch_tile(
        self, pages: Any, part: int, head: Any, slot: int, count: Any, s: "_Scratch"
    ) -> None:
        place = lax.rem(count, jnp.int32(self._stages))
        barrier = place + slot * self._stages

        @pl.when(count >= self._stages)
        def _() -> None:
            plgpu.barrier_wait(s.tile_empty.at[barrier])

        piece_len = self._tile_len // self._pieces
        for i, (page, token) in enumerate(pages):
            plgpu.copy_gmem_to_smem(
                self._refs.cache.at[page, part, head, pl.ds(token, piece_len)],
                s.tiles.at[slot, place, pl.ds(i * piece_len, piece_len)],
                s.tile_full.at[barrier],
            )

    def _drain(self, barriers: Any, slot: int, depth: int, count: Any) -> None:
        def wait(i: Any, _: None) -> None:
            plgpu.barrier_wait(barriers.at[lax.rem(i, jnp.int32(depth)) + slot * depth])

        lax.fori_loop(jnp.maximum(count - depth, 0), count, wait, None)

    # ---- the warpgroups that compute

    def _compute(self, index: Any, num_ctas: Any, slot: Any, s: "_Scratch") -> None:
        def one_cta(i: Any, counts: Any) -> Any:
            worker = (index + i * num_ctas) * WORKERS_PER_CTA + slot
            place, num_items, part = self._walk.begin(worker)

            def one_item(_: Any, state: Any) -> Any:
                return self._one_item(*state, slot=slot, s=s)

            *_, items, tiles = lax.fori_loop(0, num_items, one_item, (place, part, *counts))
            return items, tiles

        zero = jnp.int32(0)
        lax.fori_loop(zero, self._walk.planned_ctas(index, num_ctas), one_cta, (zero, zero))
        plgpu.wait_smem_to_gmem(0)

    def _one_item(
        self, place: Place, part: Any, items: Any, tiles: Any, *, slot: Any, s: "_Scratch"
    ) -> tuple[Place, Any, Any, Any]:
        """Reads item number `items`, after `tiles` tiles; the same of the next."""
        item = self._walk.item(place)
        query_slot = lax.rem(items, jnp.int32(_QUERY_SLOTS)) + slot * _QUERY_SLOTS
        plgpu.barrier_wait(s.query_full.at[query_slot])
        query = s.queries.at[pl.ds(query_slot * self._query_step, _ROWS)]

        def one_tile(i: Any, running: Any) -> Any:
            return self._one_tile(
                item, item.first_tile + i, 2 * (tiles + i), query, slot, running, s
            )

        running = lax.fori_loop(0, item.num_tiles, one_tile, self._nothing())
        plgpu.barrier_arrive(s.query_empty.at[query_slot])
        self._store(item, part, running, slot, s)
        part = jnp.where(item.is_whole, part, part + 1)
        return item.after, part, items + 1, tiles + item.num_tiles

    def _nothing(self) -> tuple[Any, Any, Any]:
        """Softmax over no keys: result, largest score, sum of exponentials."""
        full = plgpu.Layout.WGMMA
        per_row = full.reduce(1)
        return (
            plgpu.layout_cast(jnp.zeros((_ROWS, self._head_dim), jnp.float32), full),
            plgpu.layout_cast(jnp.full((_ROWS,), _LOWEST, jnp.float32), per_row),
            plgpu.layout_cast(jnp.zeros((_ROWS,), jnp.float32), per_row),
        )

    def _one_tile(
        self, item: Item, tile: Any, count: Any, query: Any, slot: Any, running: Any, s: "_Scratch"
    ) -> Any:
        """Adds the tile whose keys are number `count` in the worker's ring, its values the next."""
        mixed, top, total = running
        first_token = tile * self._tile_len
        keys, values = (lax.rem(count + i, jnp.int32(self._stages)) for i in range(2))

        plgpu.barrier_wait(s.tile_full.at[keys + slot * self._stages])

        def product(accumulator: Any) -> Any:
            plgpu.wgmma(accumulator, query, s.tiles.at[slot, keys].transpose((1, 0)))
            return accumulator[...]

        scores = pl.run_scoped(product, plgpu.ACC((_ROWS, self._tile_len), jnp.float32))
        plgpu.barrier_arrive(s.tile_empty.at[keys + slot * self._stages])
        scores = self._options.powers(scores)
        seen = self._is_seen(item, first_token, scores.shape, 1)
        scores = jnp.where(seen, scores, _LOWEST)
        new_top = jnp.maximum(top, scores.max(axis=1))
        fade = jnp.exp2(top - new_top)
        weights = jnp.exp2(scores - lax.broadcast_in_dim(new_top, scores.shape, [0]))
        total = total * fade + weights.sum(axis=1)
        mixed = mixed * lax.broadcast_in_dim(fade, mixed.shape, [0])

        plgpu.barrier_wait(s.tile_full.at[values + slot * self._stages])
        self._zero_unseen(item, first_token, s.tiles.at[slot, values])
        mixed = self._mix(mixed, weights.astype(self._dtype), s.tiles.at[slot, values], slot, s)
        plgpu.barrier_arrive(s.tile_empty.at[values + slot * self._stages])
        return mixed, new_top, total

    def _is_seen(self, item: Item, first_token: Any, shape: tuple[int, int], axis: int) -> Any:
        iota = plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)
        is_seen = iota < item.length - first_token
        if self._options.window is not None:
            is_seen &= iota >= item.length - self._options.window - first_token
        return is_seen

    def _zero_unseen(self, item: Item, first_token: Any, tile: Any) -> None:
        """A weight of 0 is not enough: 0 * NaN is NaN, and a page may hold an older owner's."""
        has_unseen = first_token + self._tile_len > item.length
        if self._options.window is not None:
            has_unseen |= first_token < item.length - self._options.window

        @pl.when(has_unseen)
        def _() -> None:
            # Some columns at a time, in a loop that stays one: registers are short here.
            is_short = self._tile_len < _ROWS
            width = _ROWS if is_short else mosaic.swizzled_columns(self._head_dim, self._dtype)

            @pl.loop(0, self._head_dim // width)
            def _(i: Any) -> None:
                some = tile.at[:, pl.ds(i * width, width)]
                if is_short:  # too short to be the rows of a layout
                    some = some.transpose((1, 0))
                values = some[...]
                seen = self._is_seen(item, first_token, values.shape, int(is_short))
                some[...] = jnp.where(seen, values, jnp.zeros((), values.dtype))

            plgpu.commit_smem()

    def _mix(self, mixed: Any, weights: Any, tile: Any, slot: Any, s: "_Scratch") -> Any:
        """Mixed + weights @ tile, the weights in registers."""
        if self._options.interpreted:
            return self._mix_interpreted(mixed, weights, tile, slot, s)
        multiply = pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, weights, tile))
        return multiply(plgpu.ACC.init(mixed))

    def _mix_interpreted(
        self, mixed: Any, weights: Any, tile: Any, slot: Any, s: "_Scratch"
    ) -> Any:
        """The same by way of shared memory: all that the interpreter knows."""
        s.weights[slot] = weights
        plgpu.commit_smem()

        def product(accumulator: Any) -> Any:
            plgpu.wgmma(accumulator, s.weights.at[slot], tile)
            return accumulator[...]

        return mixed + pl.run_scoped(product, plgpu.ACC(mixed.shape, jnp.float32))

    def _store(self, item: Item, part: Any, running: Any, slot: Any, s: "_Scratch") -> None:
        mixed, top, total = running
        row = item.request * self._num_kv_heads + item.head
        real = pl.ds(0, self._group)
        inverse = 1.0 / total

        def leave(staging: Any, target: Any) -> None:
            width = staging.shape[1]
            for start in range(0, self._head_dim, width):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                some = mixed[:, start : start + width]
                some = some * lax.broadcast_in_dim(inverse, some.shape, [0])
                staging[...] = some.astype(staging.dtype)
                plgpu.commit_smem()
                columns = pl.ds(start, width)
                plgpu.copy_smem_to_gmem(staging.at[real], target.at[:, columns])

        @pl.when(item.is_whole)
        def _() -> None:
            leave(s.out.at[slot], self._refs.out.at[row])

        @pl.when(jnp.logical_not(item.is_whole))
        def _() -> None:
            leave(s.part.at[slot], self._refs.parts.at[part])
            s.part_weight[slot] = top + jnp.log2(total)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(s.part_weight.at[slot, real], self._refs.part_weights.at[part])


class _Fetched(NamedTuple):
    """How far one worker's tiles are fetched.

    Attributes:
        place: Where its item begins.
        within: Tiles of that item before the next.
        items: Items before that, of this worker and those before it in its slot.
        tiles: Tiles before the next, of all of them.
    """

    place: Place
    within: Any
    items: Any
    tiles: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Scratch:
    """Shared memory and barriers; axis 0, or parts of barriers, belong to one worker each."""

    queries: Any
    tiles: Any
    out: Any
    part: Any
    part_weight: Any
    query_full: Any
    query_empty: Any
    tile_full: Any
    tile_empty: Any
    weights: Any = None
