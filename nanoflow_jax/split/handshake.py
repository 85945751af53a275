"""What a gateway checks before it opens a session."""

import dataclasses

from nanoflow_jax.split import errors, messages, parts, settings
from nanoflow_jax.split.codecs import Codec
from nanoflow_jax.split.messages import Code

_HASHES = {
    "config_sha256": "config (sizes, RoPE, norms, scaling or quantisation)",
    "tokenizer_sha256": "tokenizer",
}
_SHAPES = ("num_layers", "hidden_size", "vocab_size", "hidden_dtype")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Terms:
    """What a gateway offers.

    Attributes:
        identity: Its model.
        borders: Layers at which a session may enter or leave, 0 and L included.
        codecs: How hidden states may be written.
        settings: Its limits.
    """

    identity: messages.Identity
    borders: frozenset[int]
    codecs: tuple[Codec, ...]
    settings: settings.GatewaySection


def check_hello(hello: messages.Hello, terms: Terms) -> Codec:
    """Whether a session can be opened; how its hidden states are to be written.

    Raises:
        RefusedError: It cannot; the reason says what differs and what to change.
    """
    check_version(hello)
    _check_identity(hello.identity, terms.identity)
    _check_layers(hello, terms)
    _check_sampling(hello, terms)
    _check_lengths(hello, terms.settings)
    for name in hello.codecs:
        if name in terms.codecs:
            return Codec(name)
    raise errors.RefusedError(
        Code.PROTOCOL,
        f"the client's codecs ({', '.join(hello.codecs)}) and the server's "
        f"({', '.join(terms.codecs)}) have none in common",
    )


def check_version(hello: messages.Hello | messages.AskBlobs) -> None:
    """Raises RefusedError if an end speaks another version of the protocol."""
    if hello.major != messages.PROTOCOL_MAJOR:
        raise errors.RefusedError(
            Code.PROTOCOL,
            f"the client speaks version {hello.major}.{hello.minor} of the protocol and the server "
            f"{messages.PROTOCOL_MAJOR}.{messages.PROTOCOL_MINOR}; update the older one",
        )


def _check_identity(theirs: messages.Identity, ours: messages.Identity) -> None:
    for name, what in _HASHES.items():
        _check_hash(f"the {what}", getattr(theirs, name), getattr(ours, name), theirs, ours)
    for name in _SHAPES:
        if getattr(theirs, name) != getattr(ours, name):
            raise errors.RefusedError(
                Code.MODEL,
                f"{name} is {getattr(theirs, name)} at the client and {getattr(ours, name)} at "
                "the server; both ends must run the model alike",
            )
    known = dict(ours.parts)
    for part, found in theirs.parts:
        _check_hash(part, found, known.get(part, "none"), theirs, ours)


def _check_hash(
    what: str, theirs: str, ours: str, client: messages.Identity, server: messages.Identity
) -> None:
    if theirs != ours:
        raise errors.RefusedError(
            Code.MODEL,
            f"{what} of the client's model {client.model!r} and the server's {server.model!r} "
            f"differ ({theirs:.12} against {ours:.12}); both ends must load the same files",
        )


def _check_layers(hello: messages.Hello, terms: Terms) -> None:
    start, stop, num_layers = hello.start, hello.stop, terms.identity.num_layers
    if not 0 <= start < stop <= num_layers:
        raise errors.RefusedError(
            Code.LAYERS, f"[{start}, {stop}) is no range of layers of a model with {num_layers}"
        )
    for border in (start, stop):
        if border not in terms.borders:
            raise errors.RefusedError(
                Code.LAYERS,
                f"sessions enter and leave at layers {sorted(terms.borders)}; "
                f"[{start}, {stop}) was asked for",
            )
    for low, high in ((0, start), (stop, num_layers)):
        if low < high and not any(a <= low and high <= b for a, b in hello.client_layers):
            raise errors.RefusedError(
                Code.LAYERS,
                f"the server would run [{start}, {stop}), but the client does not hold "
                f"[{low}, {high})",
            )
    _check_shown(hello, num_layers)


def _check_shown(hello: messages.Hello, num_layers: int) -> None:
    shown = {name for name, _ in hello.identity.parts}
    ranges = [pair for pair in ((0, hello.start), (hello.stop, num_layers)) if pair[0] < pair[1]]
    # Whether the head uses the embedding is the model's config, which is compared by itself.
    needed = parts.of_layers(ranges, num_layers=num_layers, tied_embeddings=False)
    for name in needed:
        if name not in shown:
            raise errors.RefusedError(
                Code.MODEL, f"the client runs {name} and did not say the hash of its weights"
            )


def _check_sampling(hello: messages.Hello, terms: Terms) -> None:
    if hello.stop < terms.identity.num_layers:
        return
    if hello.start > 0 and hello.params.repetition_penalty != 1.0:
        raise errors.RefusedError(
            Code.REFUSED,
            "repetition_penalty needs the prompt, which a server that begins at layer "
            f"{hello.start} never sees; keep the last layers at the client",
        )


def _check_lengths(hello: messages.Hello, limits: settings.GatewaySection) -> None:
    if hello.prompt_len > hello.max_len:
        raise errors.RefusedError(
            Code.LIMIT,
            f"a prompt of {hello.prompt_len} tokens is longer than max_len={hello.max_len}",
        )
    if hello.max_len > limits.max_len:
        raise errors.RefusedError(
            Code.LIMIT,
            f"a session of {hello.max_len} positions was asked for; {limits.max_len} are most here",
        )
