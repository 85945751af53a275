"""What splitting and overlap cost each operation of a layer, from its times in traced steps.

A split product reads its weights once for each nano-batch, and is smaller: both show where nothing
overlaps. What an operation loses beside another, to fewer SMs and shared memory bandwidth, shows
in an overlapped mode beside the one that only splits.
"""

from collections.abc import Collection, Iterator, Mapping

from nanoflow_jax.results import figures

# Operations with weights: what `nanobatch.operations` says of layers on one device.
_PRODUCTS = ("norm_kqv", "o", "up_gate", "down")

Seconds = Mapping[str, Mapping[str, float]]


def slowdowns(
    case: str, times: Seconds, *, best: str, split: Collection[str], overlapped: Collection[str]
) -> Iterator[figures.Figure]:
    """How many times as long operations of each mode take, and what splitting products costs.

    Args:
        case: Workload.
        times: Seconds of a step, by mode and in it by operation.
        best: The best mode that splits nothing.
        split: Modes that split and do not overlap.
        overlapped: Modes that overlap.
    """
    for mode in (*split, *overlapped):
        for other in (best, *(split if mode in overlapped else ())):
            for operation in _alike(times.get(mode, {}), times.get(other, {})):
                longer = times[mode][operation] / times[other][operation]
                yield figures.summarise(slowdown(case, mode, operation, other), "x", [longer])
    for mode in split:
        whole, parts = times.get(best, {}), times.get(mode, {})
        products = [name for name in _PRODUCTS if name in _alike(parts, whole)]
        if products:
            more = sum(parts[name] - whole[name] for name in products) / sum(whole.values())
            yield figures.summarise(cost_of_splitting(case, mode, best), "x", [more])


def slowdown(case: str, mode: str, operation: str, other: str) -> str:
    """Name of the figure that says how many times as long an operation takes as in another mode."""
    return f"{case}: {operation} of {mode}, times as long as of {other}"


def cost_of_splitting(case: str, mode: str, best: str) -> str:
    """Name of the figure that says what split products take longer, as a share of all there is."""
    return f"{case}: products of {mode}, longer by this share of {best}"


def _alike(one: Mapping[str, float], other: Mapping[str, float]) -> list[str]:
    """Operations of two modes that can be compared: none of their parts is joined with another."""
    joined = {name for names in (*one, *other) if "+" in names for name in names.split("+")}
    return [name for name in one if other.get(name) and name not in joined and "+" not in name]
