"""What one CTA does of prefill attention; see `prefill_attention`."""

import dataclasses
import types
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic
from pallas_kernels.prefill_tiles import GRANULE, TILE_GRANULES, tile_len
from pallas_kernels.scores import powers

_ROWS = TILE_GRANULES * GRANULE
_HALF = _ROWS // mosaic.COMPUTE_WARPGROUPS
_HALF_GRANULES = TILE_GRANULES // mosaic.COMPUTE_WARPGROUPS
# Stands for minus infinity where a difference is taken: -inf - -inf would be NaN.
_LOWEST = -1e30
_MOST_STAGES = 4
_BARRIER_BYTES = 1024
# Registers a thread. Other kernels' 40 are too few for the warpgroup that moves memory here: as jax
# 0.10.2 compiles it, it spills.
_COMPUTE_REGISTERS = mosaic.COMPUTE_REGISTERS - 8
_MEMORY_REGISTERS = mosaic.MEMORY_REGISTERS + 8 * mosaic.COMPUTE_WARPGROUPS
# Columns of a value tile that the memory warpgroup can hold in its few registers.
_CLEARED = 64
# Columns of a part's result that leave at a time.
_PART_COLUMNS = 32


class PrefillRefs(NamedTuple):
    """Refs of the kernel in global memory: what it needs of `PrefillTiles`, between others."""

    q: Any
    pages: Any  # [P * 2 * K, S, H]
    page_table: Any
    starts: Any
    counts: Any
    positions: Any
    rows: Any
    num_tiles: Any
    cuts: Any
    out: Any
    parts: Any = None  # [K * granules of a tile * B, rows of a granule, H or more] in float32
    part_weights: Any = None  # [K * granules of a tile * B, rows of a granule]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillForm:
    """What a kernel is compiled for.

    Attributes:
        group: Query heads for each KV head.
        in_place: Whether results go where the queries came from; else tile by tile.
        max_parts: B, items that may be parts of a tile's keys.
        is_simulated: Whether it is interpreted, where an accumulator cannot be carried and weights
            cannot be multiplied from registers.
    """

    head_dim: int
    page_size: int
    num_kv_heads: int
    group: int
    dtype: Any
    scale: float
    window: int | None
    softcap: float | None
    in_place: bool
    max_parts: int
    is_simulated: bool

    @property
    def slots(self) -> int:
        """Tokens in a tile."""
        return tile_len(self.group)

    @property
    def step_len(self) -> int:
        """Keys multiplied at a time; what a warpgroup holds of them must fit its registers."""
        return 128 if self.head_dim <= 128 else 64

    @property
    def piece_len(self) -> int:
        """Keys fetched by one copy."""
        return min(self.page_size, self.step_len)

    @property
    def num_pieces(self) -> int:
        """Copies that fetch the keys of a step."""
        return self.step_len // self.piece_len

    @property
    def q_slots(self) -> int:
        """Tiles whose queries are in shared memory."""
        return 2 if self.head_dim <= 128 else 1

    @property
    def stages(self) -> int:
        """Steps in shared memory."""
        row = self.head_dim * jnp.dtype(self.dtype).itemsize
        left = mosaic.SHARED_BYTES - _BARRIER_BYTES - self.q_slots * _ROWS * row
        if self.max_parts:
            left -= _ROWS * (_PART_COLUMNS + 1) * 4
        return min(_MOST_STAGES, left // (2 * self.step_len * row))


def prefill_role(index: Any, num_workers: Any, refs: PrefillRefs, form: PrefillForm) -> None:
    """What CTA `index` of `num_workers` does; both may be values that the device computes."""
    width = mosaic.swizzled(form.head_dim, form.dtype)
    step = (form.stages, form.step_len, form.head_dim)
    scratch: dict[str, Any] = {
        "q": plgpu.SMEM((form.q_slots, _ROWS, form.head_dim), form.dtype, transforms=width),
        "k": plgpu.SMEM(step, form.dtype, transforms=width),
        "v": plgpu.SMEM(step, form.dtype, transforms=width),
        "q_there": plgpu.Barrier(
            num_arrivals=form.slots // GRANULE * form.group, num_barriers=form.q_slots
        ),
        "q_free": plgpu.Barrier(num_arrivals=2, num_barriers=form.q_slots),
        "k_there": plgpu.Barrier(num_arrivals=form.num_pieces, num_barriers=form.stages),
        "k_free": plgpu.Barrier(num_arrivals=2, num_barriers=form.stages),
        "v_there": plgpu.Barrier(num_arrivals=form.num_pieces, num_barriers=form.stages),
        "v_free": plgpu.Barrier(num_arrivals=2, num_barriers=form.stages),
        "v_last": plgpu.Barrier(num_arrivals=form.num_pieces),
        "turn": plgpu.Barrier(num_arrivals=2),
    }
    if form.max_parts:
        scratch["part"] = plgpu.SMEM(
            (mosaic.COMPUTE_WARPGROUPS, _HALF, _PART_COLUMNS),
            jnp.float32,
            transforms=mosaic.swizzled(_PART_COLUMNS, jnp.float32),
        )
        scratch["part_weight"] = plgpu.SMEM((mosaic.COMPUTE_WARPGROUPS, _HALF), jnp.float32)
    if form.is_simulated:
        scratch["weights"] = plgpu.SMEM(
            (mosaic.COMPUTE_WARPGROUPS, _HALF, form.step_len),
            form.dtype,
            transforms=mosaic.swizzled(form.step_len, form.dtype),
        )

    def scope(**scratch: Any) -> None:
        one = _Prefill(index, num_workers, refs, form, types.SimpleNamespace(**scratch))
        is_memory = lax.axis_index("warpgroup") == mosaic.MEMORY_WARPGROUP
        pl.when(is_memory)(one.fetch)
        pl.when(jnp.logical_not(is_memory))(one.compute)

    pl.run_scoped(scope, collective_axes="warpgroup", **scratch)


class _Item(NamedTuple):
    """One tile, or part of its keys, and KV head; all are scalars of the device."""

    tile: Any
    head: Any
    start: Any
    count: Any
    position: Any
    row: Any
    limit: Any  # keys from here on are seen by nobody
    base: Any  # first key that is fetched
    steps: Any
    edge: Any  # steps before this one cross the window's edge
    full: Any  # steps from this one on cross the diagonal
    is_whole: Any
    part: Any  # number of all parts


class _Prefill:
    """The kernel of one CTA, as it is traced; `s` is its shared memory and barriers."""

    def __init__(
        self, index: Any, num_workers: Any, refs: PrefillRefs, form: PrefillForm, s: Any
    ) -> None:
        self._index, self._num_workers = index, num_workers
        self._refs, self._form, self._s = refs, form, s
        num_items = refs.num_tiles[0] * form.num_kv_heads
        rounds = lax.div(num_items, jnp.int32(num_workers))
        is_in_last = self._place(rounds) < num_items - rounds * num_workers
        self._num_turns = jnp.where(is_in_last, rounds + 1, rounds)

    def fetch(self) -> None:
        """What the memory warpgroup does."""
        plgpu.set_max_registers(_MEMORY_REGISTERS, action="decrease")
        form, s = self._form, self._s

        def one_item(turn: Any, done: Any) -> Any:
            item = self._item(turn)
            slot = _rem(turn, form.q_slots)
            pl.when(turn >= form.q_slots)(lambda: plgpu.barrier_wait(s.q_free.at[slot]))
            self._fetch_queries(item, slot)

            def one_step(step: Any, done: Any) -> Any:
                stage = _rem(done, form.stages)
                is_reused = done >= form.stages
                pl.when(is_reused)(lambda: plgpu.barrier_wait(s.k_free.at[stage]))
                self._fetch_keys(item, step, 0, s.k.at[stage], s.k_there.at[stage])
                pl.when(is_reused)(lambda: plgpu.barrier_wait(s.v_free.at[stage]))
                self._fetch_values(item, step, s.v.at[stage], s.v_there.at[stage])
                return done + 1

            return lax.fori_loop(0, item.steps, one_step, done)

        done = lax.fori_loop(0, self._num_turns, one_item, jnp.int32(0))
        # A barrier must not end with a completion that nobody saw.
        _drain(done, form.stages, s.k_free, s.v_free)
        _drain(self._num_turns, form.q_slots, s.q_free)

    def compute(self) -> None:
        """What each of the other warpgroups does."""
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
        s = self._s

        def one_item(turn: Any, done: Any) -> Any:
            item = self._item(turn)
            slot = _rem(turn, self._form.q_slots)
            plgpu.barrier_wait(s.q_there.at[slot])
            acc, top, total = self._attend(item, slot, done)
            out = acc / lax.broadcast_in_dim(total, acc.shape, [0])
            if self._form.max_parts:
                pl.when(item.is_whole)(lambda: self._store(item, slot, out))
                is_part = jnp.logical_not(item.is_whole)
                pl.when(is_part)(lambda: self._store_part(item, out, top + jnp.log2(total)))
            else:
                self._store(item, slot, out)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(s.q_free.at[slot])
            return done + item.steps

        lax.fori_loop(0, self._num_turns, one_item, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    def _place(self, turn: Any) -> Any:
        """To and fro: who had the costliest item of one round has the cheapest of the next."""
        there = _rem(turn, 2) == 0
        return jnp.where(there, self._index, self._num_workers - 1 - self._index)

    def _item(self, turn: Any) -> _Item:
        form, refs = self._form, self._refs
        number = turn * self._num_workers + self._place(turn)
        tile, head = _div(number, form.num_kv_heads), _rem(number, form.num_kv_heads)
        position, count = refs.positions[tile], refs.counts[tile]
        limit = position + count
        base = edge = jnp.int32(0)
        if form.window is not None:
            oldest = jnp.maximum(position - (form.window - 1), 0)
            # Steps lie the same in a context wherever a chunk begins, and so do a token's sums.
            base = _div(oldest, form.step_len) * form.step_len
        steps = _div(limit - base + form.step_len - 1, form.step_len)
        if form.window is not None:
            edge = _div(limit - form.window - base + form.step_len - 1, form.step_len)
        full = _div(position + 1 - base, form.step_len)
        # Of these steps, those of the part.
        number, parts = refs.cuts[tile, 0], refs.cuts[tile, 1]
        first, end = lax.div(steps * number, parts), lax.div(steps * (number + 1), parts)
        steps = end - first
        edge = jnp.clip(edge - first, 0, steps)
        return _Item(
            tile=tile,
            head=head,
            start=refs.starts[tile],
            count=count,
            position=position,
            row=refs.rows[tile],
            limit=limit,
            base=base + first * form.step_len,
            steps=steps,
            edge=edge,
            full=jnp.clip(full - first, edge, steps),
            is_whole=parts == 1,
            part=refs.cuts[tile, 2],
        )

    def _fetch_queries(self, item: _Item, slot: Any) -> None:
        form, s = self._form, self._s
        for granule in range(form.slots // GRANULE * form.group):
            octet, member = divmod(granule, form.group)
            tokens = pl.ds(pl.multiple_of(item.start + octet * GRANULE, GRANULE), GRANULE)
            plgpu.copy_gmem_to_smem(
                self._refs.q.at[tokens, item.head * form.group + member],
                s.q.at[slot, pl.ds(granule * GRANULE, GRANULE)],
                s.q_there.at[slot],
            )

    def _fetch_keys(self, item: _Item, step: Any, which: int, to: Any, there: Any) -> None:
        """Keys (which = 0) or values (1) of a step; past the last page, that one again."""
        form, refs = self._form, self._refs
        last = _div(item.limit - 1, form.piece_len) * form.piece_len
        for piece in range(form.num_pieces):
            key = item.base + step * form.step_len + piece * form.piece_len
            key = jnp.minimum(key, last)
            page = refs.page_table[item.row, _div(key, form.page_size)]
            source = refs.pages.at[(page * 2 + which) * form.num_kv_heads + item.head]
            if form.piece_len < form.page_size:
                first = pl.multiple_of(_rem(key, form.page_size), form.piece_len)
                source = source.at[pl.ds(first, form.piece_len)]
            plgpu.copy_gmem_to_smem(
                source, to.at[pl.ds(piece * form.piece_len, form.piece_len)], there
            )

    def _fetch_values(self, item: _Item, step: Any, to: Any, there: Any) -> None:
        """Values that nobody sees become zeros: a weight of 0 is not enough, as 0 * NaN is NaN."""
        is_last = step == item.steps - 1
        last_there = self._s.v_last

        @pl.when(jnp.logical_not(is_last))
        def _() -> None:
            self._fetch_keys(item, step, 1, to, there)

        @pl.when(is_last)
        def _() -> None:
            self._fetch_keys(item, step, 1, to, last_there)
            plgpu.barrier_wait(last_there)
            self._clear(to, item.limit - item.base - step * self._form.step_len)
            plgpu.commit_smem()
            for _ in range(self._form.num_pieces):
                plgpu.barrier_arrive(there)

    def _clear(self, values: Any, first: Any) -> None:
        """Zeros from row `first` on."""
        shape = (_HALF, _CLEARED)
        for row in range(0, self._form.step_len, _HALF):

            @pl.when(first < row + _HALF)
            def _(row: int = row) -> None:
                rows = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
                for column in range(0, self._form.head_dim, _CLEARED):
                    part = values.at[pl.ds(row, _HALF), pl.ds(column, _CLEARED)]
                    kept = part[...]
                    part[...] = jnp.where(rows < first - row, kept, jnp.zeros_like(kept))

    def _attend(self, item: _Item, slot: Any, done: Any) -> tuple[Any, Any, Any]:
        """For this warpgroup's rows: sum of values by weight, largest score, sum of weights."""
        row_layout = plgpu.Layout.WGMMA.reduce(1)
        running = (
            _full((_HALF, self._form.head_dim), 0.0, plgpu.Layout.WGMMA),
            _full((_HALF,), _LOWEST, row_layout),
            _full((_HALF,), 0.0, row_layout),
        )
        warpgroup = lax.axis_index("warpgroup")

        def some(first: Any, end: Any, running: Any, *, is_masked: bool) -> Any:
            def one(step: Any, running: Any) -> Any:
                return self._step(item, slot, done, step, running, is_masked=is_masked)

            return lax.fori_loop(first, end, one, running)

        # The second warpgroup starts half a step later: it multiplies while the first one
        # exponentiates, and the other way round.
        pl.when(warpgroup == 1)(self._take_turn)
        if self._form.window is not None:
            running = some(0, item.edge, running, is_masked=True)
        running = some(item.edge, item.full, running, is_masked=False)
        running = some(item.full, item.steps, running, is_masked=True)
        pl.when(warpgroup == 0)(self._take_turn)
        return running

    def _take_turn(self) -> None:
        plgpu.barrier_arrive(self._s.turn)
        plgpu.barrier_wait(self._s.turn)

    def _step(
        self, item: _Item, slot: Any, done: Any, step: Any, running: Any, *, is_masked: bool
    ) -> Any:
        form, s = self._form, self._s
        acc, top, total = running
        stage = _rem(done + step, form.stages)
        mine = pl.ds(lax.axis_index("warpgroup") * _HALF, _HALF)
        plgpu.barrier_wait(s.k_there.at[stage])

        def multiply(scores: Any) -> Any:
            plgpu.wgmma(scores, s.q.at[slot, mine], s.k.at[stage].transpose((1, 0)))
            self._take_turn()
            return scores[...]

        scores = pl.run_scoped(multiply, plgpu.ACC((_HALF, form.step_len), jnp.float32))
        plgpu.barrier_arrive(s.k_free.at[stage])
        scores = powers(scores, scale=form.scale, softcap=form.softcap)
        if is_masked:
            scores = jnp.where(self._is_seen(item, step), scores, _LOWEST)
        new_top = jnp.maximum(top, scores.max(axis=1))
        weights = jnp.exp2(scores - lax.broadcast_in_dim(new_top, scores.shape, [0]))
        fade = jnp.exp2(top - new_top)
        acc = acc * lax.broadcast_in_dim(fade, acc.shape, [0])
        total = total * fade + weights.sum(axis=1)
        weights = weights.astype(form.dtype)
        acc, total, new_top, weights = lax.optimization_barrier((acc, total, new_top, weights))
        plgpu.barrier_arrive(s.turn)
        plgpu.barrier_wait(s.v_there.at[stage])
        plgpu.barrier_wait(s.turn)
        acc = self._mix(acc, weights, s.v.at[stage])
        plgpu.barrier_arrive(s.v_free.at[stage])
        return acc, new_top, total

    def _is_seen(self, item: _Item, step: Any) -> Any:
        form = self._form
        shape = (_HALF, form.step_len)
        row, key = (
            plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)
            for axis in (0, 1)
        )
        row = row + lax.axis_index("warpgroup") * _HALF
        octet = _div(_div(row, GRANULE), form.group)
        position = octet * GRANULE + _rem(row, GRANULE) + item.position
        key = key + (item.base + step * form.step_len)
        is_seen = key <= position
        if form.window is not None:
            is_seen = is_seen & (key > position - form.window)
        return is_seen

    def _mix(self, acc: Any, weights: Any, values: Any) -> Any:
        """What acc + weights @ values is."""
        if not self._form.is_simulated:
            add = lambda ref: plgpu.wgmma(ref, weights, values)  # noqa: E731
            return pl.run_state(add)(plgpu.ACC.init(acc))
        staged = self._s.weights.at[lax.axis_index("warpgroup")]
        staged[...] = weights
        plgpu.commit_smem()

        def product(ref: Any) -> Any:
            plgpu.wgmma(ref, staged, values)
            return ref[...]

        return acc + pl.run_scoped(product, plgpu.ACC(acc.shape, jnp.float32))

    def _store(self, item: _Item, slot: Any, out: Any) -> None:
        """Through the queries' place in shared memory, which nobody reads any more."""
        form, refs, s = self._form, self._refs, self._s
        warpgroup = lax.axis_index("warpgroup")
        s.q[slot, pl.ds(warpgroup * _HALF, _HALF)] = out.astype(form.dtype)
        plgpu.commit_smem()
        start = item.start if form.in_place else item.tile * form.slots
        for i in range(_HALF_GRANULES):
            granule = warpgroup * _HALF_GRANULES + i
            octet, member = _div(granule, form.group), _rem(granule, form.group)

            @pl.when(octet * GRANULE < item.count)
            def _(granule: Any = granule, octet: Any = octet, member: Any = member) -> None:
                tokens = pl.ds(pl.multiple_of(start + octet * GRANULE, GRANULE), GRANULE)
                plgpu.copy_smem_to_gmem(
                    s.q.at[slot, pl.ds(granule * GRANULE, GRANULE)],
                    refs.out.at[tokens, item.head * form.group + member],
                )

    def _store_part(self, item: _Item, out: Any, weight: Any) -> None:
        """The result in float32, and the logarithm to the base 2 of its sum of exponentials."""
        form, refs, s = self._form, self._refs, self._s
        warpgroup = lax.axis_index("warpgroup")
        # Parts of one granule, which are merged, follow one another.
        first = item.head * TILE_GRANULES + warpgroup * _HALF_GRANULES
        granules = [
            ((first + i) * form.max_parts + item.part, pl.ds(i * GRANULE, GRANULE))
            for i in range(_HALF_GRANULES)
        ]
        for column in range(0, form.head_dim, _PART_COLUMNS):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            s.part[warpgroup] = out[:, column : column + _PART_COLUMNS]
            plgpu.commit_smem()
            columns = pl.ds(column, _PART_COLUMNS)
            for place, rows in granules:
                plgpu.copy_smem_to_gmem(
                    s.part.at[warpgroup, rows], refs.parts.at[place, :, columns]
                )
        s.part_weight[warpgroup] = weight
        plgpu.commit_smem()
        for place, rows in granules:
            plgpu.copy_smem_to_gmem(s.part_weight.at[warpgroup, rows], refs.part_weights.at[place])


def _div(x: Any, y: int) -> Any:
    return lax.div(x, jnp.full_like(x, y))


def _rem(x: Any, y: int) -> Any:
    return lax.rem(x, jnp.full_like(x, y))


def _full(shape: tuple[int, ...], value: float, layout: Any) -> Any:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _drain(num_uses: Any, depth: int, *rings: Any) -> None:
    """Waits for the completions of a ring that were not waited for when it came round."""

    @pl.loop(jnp.maximum(num_uses - depth, 0), num_uses)
    def _(use: Any) -> None:
        for ring in rings:
            plgpu.barrier_wait(ring.at[_rem(use, depth)])
