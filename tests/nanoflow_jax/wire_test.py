import socket

import msgspec
import pytest

from nanoflow_jax import request as request_lib
from nanoflow_jax import wire
from nanoflow_jax.engine_process import messages


def _submit() -> messages.Submit:
    params = request_lib.SamplingParams(
        seed=7,
        stop=("a", "b"),
        logit_bias={5: 1.5},
        logprobs=3,
        allowed_token_ids=(1, 2),
        grammar=request_lib.Grammar(kind=request_lib.GrammarKind.REGEX, text="[0-9]+"),
    )
    return messages.Submit(
        request_id="r", prompt_ids=(1, 2), params=params, priority=3, stream=True, sent_s=1.5
    )


def test_a_message_comes_out_as_it_went_in():
    ours, its = socket.socketpair()
    with ours, its:
        ours.sendall(wire.Codec(messages.FromEngine).frame(_submit()))
        data = wire.read_frame(its)
        assert data is not None
        assert wire.Codec(messages.ToEngine).decode(data) == _submit()


def test_the_end_of_the_socket_is_no_message_even_in_the_middle_of_one():
    for cut in (0, 2, wire.HEADER_BYTES, wire.HEADER_BYTES + 5):
        ours, its = socket.socketpair()
        with its:
            ours.sendall(wire.Codec(messages.FromEngine).frame(_submit())[:cut])
            ours.close()
            assert wire.read_frame(its) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 129),
        ("max_tokens", 2**31),
        ("stop", ["a"] * 17),
        ("stop_token_ids", [1] * 129),
        ("allowed_token_ids", [1] * 8193),
        ("logit_bias", dict.fromkeys(range(301), 1.0)),
        ("logprobs", 21),
        ("prompt_logprobs", 21),
        ("grammar", {"kind": "regex", "text": "a" * 65537}),
    ],
)
def test_c5_what_is_out_of_bounds_does_not_get_into_the_engine_either(field, value):
    frame = wire.Codec(messages.FromEngine).frame(_submit())
    sent = msgspec.msgpack.decode(frame[wire.HEADER_BYTES :], strict=False)
    sent["params"][field] = value
    with pytest.raises(msgspec.ValidationError, match=field):
        wire.Codec(messages.ToEngine).decode(msgspec.msgpack.encode(sent))


def test_results_keep_their_kinds():
    delta = request_lib.Delta(
        request_id="r",
        index=0,
        text="x",
        token_ids=(1,),
        logprobs=(request_lib.TokenLogprobs(token_id=1, logprob=-0.5, rank=1, top=((1, -0.5),)),),
        finish_reason=request_lib.FinishReason.STOP,
        stop_reason="\n",
    )
    sent = messages.Stepped(
        scored=(), deltas=(delta,), completions=(), times=(), load=messages.Load(running=1)
    )
    frame = wire.Codec(messages.ToEngine).frame(sent)
    assert wire.Codec(messages.FromEngine).decode(frame[wire.HEADER_BYTES :]) == sent
