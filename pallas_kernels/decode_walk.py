"""How a worker of decode attention goes along its range of a plan, as the device computes it.

The plan, and what segments, items and parts are: see `work_list`.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_kernels.work_list import WORKERS_PER_CTA


class Place(NamedTuple):
    """Where in the line a worker is.

    Attributes:
        segment: The one it is in.
        offset: Tiles of the plan before it, in that segment.
        left: Tiles of the plan that it has yet to do.
    """

    segment: Any
    offset: Any
    left: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """What a worker reads of one segment in one go; values that the device computes.

    Attributes:
        request: Whose context it is.
        head: Which kv head.
        first_tile: In the context.
        num_tiles: How many.
        is_whole: Whether it is all of the segment.
        length: Tokens of the context.
        after: Where the worker is next.
    """

    request: Any
    head: Any
    first_tile: Any
    num_tiles: Any
    is_whole: Any
    length: Any
    after: Place


@dataclasses.dataclass(frozen=True, kw_only=True)
class Walk:
    """Reads a plan.

    Attributes:
        live: Ref of the plan's requests, [R, 4].
        workers: Ref of its workers, [W, 5].
        context_lens: Ref, [R].
        num_kv_heads: K.
        tiles_each: Tiles that the kernel makes of a tile of the plan.
    """

    live: Any
    workers: Any
    context_lens: Any
    num_kv_heads: int
    tiles_each: int = 1

    def planned_ctas(self, index: Any, num_ctas: Any) -> Any:
        """How many CTAs of the plan CTA `index` stands for: index, index + num_ctas, ..."""
        planned = self.workers.shape[0] // WORKERS_PER_CTA
        return lax.div(planned - index + num_ctas - 1, jnp.int32(num_ctas))

    def begin(self, worker: Any) -> tuple[Place, Any, Any]:
        """Where a worker begins, its number of items, and of the first of them that is a part."""
        segment, offset, size, num_items, part = (self.workers[worker, i] for i in range(5))
        return Place(segment, offset, size), num_items, part

    def item(self, place: Place) -> Item:
        """The item that begins there; anything if nothing is left."""
        live = lax.div(place.segment, jnp.int32(self.num_kv_heads))
        request, first, end, most = (self.live[live, i] for i in range(4))
        num_tiles = jnp.minimum(jnp.minimum(end - first - place.offset, place.left), most)
        is_last = first + place.offset + num_tiles == end
        return Item(
            request=request,
            head=lax.rem(place.segment, jnp.int32(self.num_kv_heads)),
            first_tile=(first + place.offset) * self.tiles_each,
            num_tiles=num_tiles * self.tiles_each,
            is_whole=(place.offset == 0) & is_last,
            length=self.context_lens[request],
            after=Place(
                jnp.where(is_last, place.segment + 1, place.segment),
                jnp.where(is_last, 0, place.offset + num_tiles),
                place.left - num_tiles,
            ),
        )
