"""Ways of splitting a layer's operations, among which a search chooses."""

from collections.abc import Iterator

from nanoflow_jax.nanobatch import operations
from nanoflow_jax.nanobatch.plan import TokenRange, cut_at
from nanoflow_jax.search.pipeline import Split

_PARTS = (2, 4)  # of the operations before attention
# Of the dense batch, where the first nano-batch ends.
_FIRST = (1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4)


def splits(
    shape: operations.LayerShape, *, num_tokens: int, granule: int, mixes_ways: bool = False
) -> Iterator[tuple[str, Split]]:
    """Each way, with a name: two nano-batches, of which attention may be cut once more.

    Args:
        shape: Of a layer.
        num_tokens: Of the dense batch.
        granule: Ranges begin at its multiples.
        mixes_ways: Also those in which o is summed for some tokens and gathered for others, as in
            the paper; its weight is then held in two layouts.
    """
    firsts = sorted({round(share * num_tokens / granule) * granule for share in _FIRST})
    for first in firsts:
        if not 0 < first < num_tokens:
            continue
        halves = cut_at((0, first, num_tokens))
        for parts in _PARTS:
            fine = halves if parts == len(halves) else _cut_each(halves, granule)
            if fine is None:
                continue
            for way, chosen in _ways(shape, halves, mixes_ways=mixes_ways):
                ranges = {
                    **dict.fromkeys(("norm_kqv", "rope", "append", "decode_attention"), fine),
                    **dict.fromkeys(("prefill_attention", "norm", "route", "up_gate"), halves),
                    **chosen,
                }
                known = operations.layer_graph(shape).by_name
                split = Split(
                    shape=shape,
                    num_tokens=num_tokens,
                    ranges={name: found for name, found in ranges.items() if name in known},
                    granule=granule,
                )
                yield f"{first} + {num_tokens - first}, attention in {parts}{way}", split


def _cut_each(halves: tuple[TokenRange, ...], granule: int) -> tuple[TokenRange, ...] | None:
    borders = [0]
    for half in halves:
        middle = half.start + half.length // 2 // granule * granule
        if middle == half.start:
            return None
        borders += [middle, half.stop]
    return cut_at(borders)


def _ways(
    shape: operations.LayerShape, halves: tuple[TokenRange, ...], *, mixes_ways: bool
) -> Iterator[tuple[str, dict[str, tuple[TokenRange, ...]]]]:
    """How o and down go over several devices: by sum or by columns."""
    down = {"down": halves}
    if shape.num_devices == 1:
        yield "", {"o": halves, **down}
        return
    down["down_reduce"] = halves
    first, second = halves[:1], halves[1:]
    gathers = ("attention_gather", "o_columns", "o_gather")
    yield ", o reduced", {"o": halves, "o_reduce": halves, **down}
    yield ", o gathered", {**dict.fromkeys(gathers, halves), **down}
    if mixes_ways:
        mixed = {**dict.fromkeys(gathers, first), "o": second, "o_reduce": second}
        yield ", o of the first gathered", {**mixed, **down}
