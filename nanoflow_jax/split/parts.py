"""The parts of a model: its embedding, each of its layers, and its head with the last norm."""

from collections.abc import Iterable, Sequence

from nanoflow_jax.split import cut

EMBEDDING, HEAD = "embedding", "head"


def layer_name(layer: int) -> str:
    """The part that is a layer."""
    return f"layer {layer}"


def every(num_layers: int) -> tuple[str, ...]:
    """All parts, in the order in which a token meets them."""
    return (EMBEDDING, *map(layer_name, range(num_layers)), HEAD)


def of_layers(
    layers: Iterable[tuple[int, int]], *, num_layers: int, tied_embeddings: bool
) -> tuple[str, ...]:
    """The parts that some layers need, in the order in which a token meets them.

    Args:
        layers: Ranges [start, stop) of them, none of which is empty.
        num_layers: L.
        tied_embeddings: Whether the head uses the embedding.
    """
    needed: set[str] = set()
    for start, stop in layers:
        needed.update(map(layer_name, range(start, stop)))
        if start == 0 or (stop == num_layers and tied_embeddings):
            needed.add(EMBEDDING)
        if stop == num_layers:
            needed.add(HEAD)
    return tuple(name for name in every(num_layers) if name in needed)


def shared(texts: Sequence[str], num_layers: int) -> frozenset[str]:
    """The parts that --share_weights names.

    Args:
        texts: Each `all`, `embed`, `head` or START:STOP.
        num_layers: L.

    Raises:
        ValueError: One is something else, or no range of this model's layers.
    """
    found: set[str] = set()
    named = {"all": every(num_layers), "embed": (EMBEDDING,), "head": (HEAD,)}
    for text in texts:
        layers = cut.try_range(text)
        if text in named:
            found.update(named[text])
        elif layers is not None and 0 <= layers[0] < layers[1] <= num_layers:
            found.update(map(layer_name, range(*layers)))
        else:
            raise ValueError(
                f"--share_weights={','.join(texts)}: {text!r} is none of all, embed, head and a "
                f"range START:STOP of the model's {num_layers} layers, such as 0:2"
            )
    return frozenset(found)
