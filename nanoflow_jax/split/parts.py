"""The parts of a model: its embedding, each of its layers, and its head with the last norm."""

EMBEDDING, HEAD = "embedding", "head"


def layer_name(layer: int) -> str:
    """The part that is a layer."""
    return f"layer {layer}"


def every(num_layers: int) -> tuple[str, ...]:
    """All parts, in the order in which a token meets them."""
    return (EMBEDDING, *map(layer_name, range(num_layers)), HEAD)


def of_layers(start: int, stop: int, *, num_layers: int) -> tuple[str, ...]:
    """The parts that layers [start, stop) are, with what the first and the last of all need."""
    found = tuple(map(layer_name, range(start, stop)))
    if start < stop and start == 0:
        found = (EMBEDDING, *found)
    return (*found, HEAD) if start < stop == num_layers else found
