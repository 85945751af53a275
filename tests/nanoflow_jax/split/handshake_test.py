"""A gateway opens a session only for a client that runs the same model in layers that fit."""

from typing import Any

import msgspec
import pytest
import split_model
import split_raw
import split_runs

from nanoflow_jax.split import errors, handshake, messages, settings
from nanoflow_jax.split.codecs import Codec
from nanoflow_jax.split.messages import Code

_TERMS = handshake.Terms(
    identity=split_model.IDENTITY,
    borders=frozenset({0, 2, 4, 6}),
    codecs=(Codec.BF16, Codec.F32),
    settings=settings.GatewaySection(max_len=64),
)


def _identity(**changes: Any) -> messages.Identity:
    return msgspec.structs.replace(split_model.IDENTITY, **changes)


def _with_parts(changes: dict[str, str]) -> messages.Identity:
    return _identity(parts=tuple((dict(split_model.IDENTITY.parts) | changes).items()))


def _without(*names: str) -> messages.Identity:
    return _identity(parts=tuple(p for p in split_model.IDENTITY.parts if p[0] not in names))


def test_client_needs_no_more_of_the_model_than_it_runs() -> None:
    handshake.check_hello(split_raw.hello(identity=_without("layer 2", "layer 3")), _TERMS)
    partial = _without("embedding", "layer 0", "layer 1")
    handshake.check_hello(split_raw.hello(identity=partial, start=0), _TERMS)
    handshake.check_hello(split_raw.hello(identity=_identity(parts=()), start=0, stop=6), _TERMS)


def test_client_of_the_same_model_gets_the_first_codec_that_both_know() -> None:
    hello = split_raw.hello(codecs=("of the future", "f32", "bf16"))
    assert handshake.check_hello(hello, _TERMS) is Codec.F32


def test_client_of_a_later_minor_version_is_taken() -> None:
    handshake.check_hello(split_raw.hello(minor=7), _TERMS)


@pytest.mark.parametrize(
    ("changes", "code", "reason"),
    [
        ({"major": 1}, Code.PROTOCOL, "the client speaks version 1.0 of the protocol and the serv"),
        (
            {"identity": _with_parts({"layer 4": "d" * 64, "layer 1": "e" * 64})},
            Code.MODEL,
            "layer 1 of the client's model 'toy' and the server's 'toy' differ (eeeeeeeeeeee "
            "against aaaaaaaaaaaa); both ends must load the same files",
        ),
        (
            {"identity": _identity(parts=(*split_model.IDENTITY.parts, ("layer 6", "d" * 64)))},
            Code.MODEL,
            "layer 6 of the client's model 'toy' and the server's 'toy' differ (dddddddddddd "
            "against none)",
        ),
        (
            {"identity": _without("layer 1")},
            Code.MODEL,
            "the client runs layer 1 and did not say the hash of its weights",
        ),
        (
            {"identity": _without("embedding")},
            Code.MODEL,
            "the client runs embedding and did not say the hash of its weights",
        ),
        (
            {"identity": _without("head")},
            Code.MODEL,
            "the client runs head and did not say the hash of its weights",
        ),
        (
            {"identity": _identity(config_sha256="d" * 64)},
            Code.MODEL,
            "the config (sizes, RoPE, norms, scaling or quantisation) of the client's",
        ),
        (
            {"identity": _identity(tokenizer_sha256="d" * 64)},
            Code.MODEL,
            "the tokenizer of the client's",
        ),
        ({"identity": _identity(num_layers=8)}, Code.MODEL, "num_layers is 8 at the client and 6"),
        ({"identity": _identity(hidden_size=8)}, Code.MODEL, "hidden_size is 8 at the client"),
        ({"identity": _identity(vocab_size=8)}, Code.MODEL, "vocab_size is 8 at the client"),
        (
            {"identity": _identity(hidden_dtype="bfloat16")},
            Code.MODEL,
            "hidden_dtype is bfloat16 at the client and float32 at the server",
        ),
        ({"start": 4, "stop": 4}, Code.LAYERS, "[4, 4) is no range of layers of a model with 6"),
        ({"stop": 7}, Code.LAYERS, "[2, 7) is no range of layers of a model with 6"),
        ({"start": 1}, Code.LAYERS, "enter and leave at layers [0, 2, 4, 6]; [1, 4) was asked"),
        ({"stop": 5}, Code.LAYERS, "enter and leave at layers [0, 2, 4, 6]; [2, 5) was asked"),
        (
            {"client_layers": ((0, 2),)},
            Code.LAYERS,
            "the server would run [2, 4), but the client does not hold [4, 6)",
        ),
        (
            {"client_layers": ((1, 6),)},
            Code.LAYERS,
            "the server would run [2, 4), but the client does not hold [0, 2)",
        ),
        (
            {"stop": 6, "params": split_runs.with_params(repetition_penalty=1.1)},
            Code.REFUSED,
            "repetition_penalty needs the prompt, which a server that begins at layer 2 never",
        ),
        ({"prompt_len": 33}, Code.LIMIT, "a prompt of 33 tokens is longer than max_len=32"),
        ({"max_len": 65}, Code.LIMIT, "a session of 65 positions was asked for; 64 are most here"),
        (
            {"codecs": ("int8o",)},
            Code.PROTOCOL,
            "the client's codecs (int8o) and the server's (bf16, f32) have none in common",
        ),
    ],
)
def test_refusal_says_what_differs(changes: dict[str, Any], code: Code, reason: str) -> None:
    with pytest.raises(errors.RefusedError) as refusal:
        handshake.check_hello(split_raw.hello(**changes), _TERMS)
    assert refusal.value.code is code
    assert reason in refusal.value.detail
    assert refusal.value.retry_after_s is None
