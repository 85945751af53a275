"""Ways of splitting a layer's operations, among which a search chooses."""

import dataclasses
from collections.abc import Iterator, Mapping

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
            for chosen in _ways(shape, halves, mixes_ways=mixes_ways):
                ranges = {
                    **dict.fromkeys(("norm_kqv", "rope", "append", "decode_attention"), fine),
                    **dict.fromkeys(("prefill_attention", "norm", "route", "up_gate"), halves),
                    **chosen,
                }
                known = operations.layer_graph(shape).by_name
                split = Split(
                    shape=shape,
                    num_tokens=num_tokens,
                    ranges={op: found for op, found in ranges.items() if op in known},
                    granule=granule,
                )
                yield name(split), split


def near(split: Split) -> Iterator[tuple[str, Split]]:
    """Ways in which one border is elsewhere between those before and after it, on any granule."""
    ranges = split.ranges.values()
    borders = sorted({border for found in ranges for tokens in found for border in tokens})
    for before, border, after in zip(borders, borders[1:], borders[2:], strict=False):
        for moved in range(before + split.granule, after, split.granule):
            if moved != border:
                other = dataclasses.replace(split, ranges=_moved(split, {border: moved}))
                yield name(other), other


def _moved(split: Split, moves: Mapping[int, int]) -> dict[str, tuple[TokenRange, ...]]:
    return {
        operation: tuple(TokenRange(*(moves.get(one, one) for one in tokens)) for tokens in found)
        for operation, found in split.ranges.items()
    }


def name(split: Split) -> str:
    """What a way of splitting is called: its sizes, and how o goes over several devices."""
    halves, fine = split.ranges["up_gate"], split.ranges["decode_attention"]
    parts = str(len(fine))
    if fine not in (halves, _cut_each(halves, split.granule)):
        parts = " + ".join(str(tokens.length) for tokens in fine)
    way = ""
    if "o_columns" in split.ranges:
        way = ", o of the first gathered" if "o" in split.ranges else ", o gathered"
    elif "o_reduce" in split.ranges:
        way = ", o reduced"
    sizes = " + ".join(str(tokens.length) for tokens in halves)
    return f"{sizes}, attention in {parts}{way}"


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
) -> Iterator[dict[str, tuple[TokenRange, ...]]]:
    """How o and down go over several devices: by sum or by columns."""
    down = {"down": halves}
    if shape.num_devices == 1:
        yield {"o": halves, **down}
        return
    down["down_reduce"] = halves
    first, second = halves[:1], halves[1:]
    gathers = ("attention_gather", "o_columns", "o_gather")
    yield {"o": halves, "o_reduce": halves, **down}
    yield {**dict.fromkeys(gathers, halves), **down}
    if mixes_ways:
        mixed = {**dict.fromkeys(gathers, first), "o": second, "o_reduce": second}
        yield {**mixed, **down}
