"""A client takes nothing from a gateway but what was agreed on, and waits for none for ever."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import split_model
import split_raw
import split_runs
from split_runs import PARAMS, PROMPT

from nanoflow_jax.split import codecs, errors, frames, messages, remote, settings, transport
from nanoflow_jax.split.messages import Code

_WELCOME = messages.Welcome(
    session_id="s",
    token="t",
    epoch="e",
    minor=0,
    codec=codecs.Codec.F32,
    credits=4,
    max_rows=64,
    heartbeat_s=60.0,
    lease_s=1.0,
    position=0,
)
_ACT = messages.Act(step=1, border=4, position=0, num_rows=1, width=16, codec=codecs.Codec.F32)
_ROW = split_raw.rows(0).tobytes()
_Script = Callable[[transport.ServerStream], Awaitable[None]]


@contextlib.asynccontextmanager
async def _scripted(script: _Script) -> AsyncIterator[int]:
    """The port of a gateway that does what a script says with each stream."""
    endpoint = transport.Endpoint(host="127.0.0.1", port=0)
    limit = frames.FrameLimits().frame_bytes
    server, port = await transport.listen(
        endpoint, {transport.SESSION: script, transport.PROBE: script}, max_frame_bytes=limit
    )
    try:
        yield port
    finally:
        await server.stop(grace=None)


def _says(*parts: tuple[messages.Message, bytes] | bytes) -> _Script:
    """Welcomes the client, says things, and waits until it leaves."""

    async def script(stream: transport.ServerStream) -> None:
        await stream.read()
        await stream.write(messages.to_frame(_WELCOME))
        for part in parts:
            await stream.write(part if isinstance(part, bytes) else messages.to_frame(*part))
        while (data := await stream.read()) is not None:
            if messages.from_frame(data, frames.FrameLimits())[0] == messages.Close(
                reason="the client gives up"
            ):
                return

    return script


async def _silent(stream: transport.ServerStream) -> None:
    while await stream.read() is not None:
        pass


async def _generate(script: _Script, **knobs: Any) -> None:
    async with (
        _scripted(script) as port,
        split_runs.client_of(
            transport.Endpoint(host="127.0.0.1", port=port), **({"max_attempts": 1} | knobs)
        ) as made,
    ):
        await made.generate(PROMPT[:8], PARAMS, split_model.MIDDLE)


@pytest.mark.parametrize(
    ("part", "code", "detail"),
    [
        ((msgspec.structs.replace(_ACT, border=3), _ROW), Code.BAD_ACT, "rows for layer 3, 16 wi"),
        ((msgspec.structs.replace(_ACT, width=8), _ROW), Code.BAD_ACT, "for layer 4, 8 wide, in"),
        (
            (msgspec.structs.replace(_ACT, codec=codecs.Codec.BF16), _ROW),
            Code.BAD_ACT,
            "wide, in bf16; 4, 16 and f32 were agreed on",
        ),
        (
            (msgspec.structs.replace(_ACT, position=3), _ROW),
            Code.BAD_STEP,
            "rows from 3 came; those from 0 are due",
        ),
        ((_ACT, _ROW[:8]), Code.BAD_FRAME, "1 rows of 16 values in f32 are 64 bytes; 8 came"),
        (
            (_ACT, np.full(16, np.inf, np.float32).tobytes()),
            Code.BAD_FRAME,
            "row 0 of hidden states has a value that is not finite",
        ),
        (b"not a frame at all", Code.BAD_FRAME, "a frame begins with b'not '"),
        ((_WELCOME, b""), Code.PROTOCOL, "Welcome is nothing that a gateway says here"),
        (
            (messages.Err(code=Code.ENGINE, detail="out of pages", retryable=False), b""),
            Code.ENGINE,
            "out of pages",
        ),
    ],
)
def test_what_a_gateway_may_not_say_fails_the_request(
    part: tuple[messages.Message, bytes] | bytes, code: Code, detail: str
) -> None:
    async def body() -> None:
        with pytest.raises(errors.SplitError) as error:
            await _generate(_says(part))
        assert error.value.code is code
        assert detail in error.value.detail

    split_runs.run(body())


def test_gateway_that_answers_a_greeting_with_something_else_fails_the_request() -> None:
    async def script(stream: transport.ServerStream) -> None:
        await stream.read()
        await stream.write(messages.to_frame(messages.Credit(steps=1)))

    async def body() -> None:
        with pytest.raises(errors.SplitError, match="the gateway answers Hello with Credit"):
            await _generate(script)

    split_runs.run(body())


def test_gateway_that_ends_a_greeted_stream_fails_the_request() -> None:
    async def script(stream: transport.ServerStream) -> None:
        await stream.read()

    async def body() -> None:
        with pytest.raises(errors.SplitError, match="ended the stream without an answer"):
            await _generate(script)

    split_runs.run(body())


def test_gateway_that_does_not_answer_a_greeting_fails_the_request() -> None:
    async def body() -> None:
        with pytest.raises(errors.SplitError, match=r"the gateway did not answer in 0\.1 s"):
            await _generate(_silent, connect_timeout_s=0.1)

    split_runs.run(body())


def test_gateway_that_gives_no_result_fails_the_request() -> None:
    async def body() -> None:
        with pytest.raises(errors.SplitError, match=r"the server gave no result for 0\.1 s"):
            await _generate(_says(), step_timeout_s=0.1, connect_timeout_s=0.1)

    split_runs.run(body())


def test_gateway_of_which_nothing_is_heard_fails_the_request() -> None:
    async def script(stream: transport.ServerStream) -> None:
        await stream.read()
        welcome = msgspec.structs.replace(_WELCOME, heartbeat_s=0.05)
        await stream.write(messages.to_frame(welcome))
        await _silent(stream)

    async def body() -> None:
        with pytest.raises(errors.SplitError, match="nothing was heard of the gateway for"):
            await _generate(script)

    split_runs.run(body())


def test_no_gateway_at_all_fails_the_request() -> None:
    async def body() -> None:
        async with _scripted(_silent) as port:
            pass
        endpoint = transport.Endpoint(host="127.0.0.1", port=port)
        async with split_runs.client_of(endpoint, max_attempts=2) as made:
            with pytest.raises(errors.SplitError, match="attempt 2 of 2, 0 tokens drawn"):
                await made.generate(PROMPT, PARAMS, split_model.MIDDLE)
            with pytest.raises(errors.SplitError, match="unavailable: "):
                await made.probe()

    split_runs.run(body())


def test_gateway_that_ends_a_probe_fails_it() -> None:
    async def script(stream: transport.ServerStream) -> None:
        await stream.read()

    async def body() -> None:
        async with (
            _scripted(script) as port,
            split_runs.client_of(transport.Endpoint(host="127.0.0.1", port=port)) as made,
        ):
            with pytest.raises(errors.SplitError, match="the gateway ended the probe"):
                await made.probe()

    split_runs.run(body())


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (messages.to_frame(messages.Pong(sent_s=0.0)), "the gateway answers Ask with Pong"),
        (b"no frame", "bad_frame: "),
        (None, "the gateway ended the probe"),
    ],
)
def test_gateway_that_does_not_say_what_it_offers_is_an_error(
    answer: bytes | None, message: str
) -> None:
    async def script(stream: transport.ServerStream) -> None:
        await stream.read()
        if answer is not None:
            await stream.write(answer)

    async def body() -> None:
        async with (
            _scripted(script) as port,
            split_runs.client_of(transport.Endpoint(host="127.0.0.1", port=port)) as made,
        ):
            with pytest.raises(errors.SplitError, match=message):
                await made.ask()

    split_runs.run(body())


def test_gateway_that_is_silent_is_not_waited_for() -> None:
    gone = asyncio.Event()

    async def script(stream: transport.ServerStream) -> None:
        await gone.wait()

    async def body() -> None:
        async with (
            _scripted(script) as port,
            split_runs.client_of(
                transport.Endpoint(host="127.0.0.1", port=port), connect_timeout_s=0.05
            ) as made,
        ):
            with pytest.raises(errors.SplitError, match=r"the gateway did not answer in 0\.05 s"):
                await made.ask()
            gone.set()

    split_runs.run(body())


def test_token_other_than_the_one_that_stands_there_fails_the_request() -> None:
    wrong = messages.Tok(step=1, position=3, token_ids=(90,))

    async def body() -> None:
        with pytest.raises(
            errors.SplitError, match=r"token 90 was drawn for position 4, where \[5\] stands"
        ):
            await _generate(_says((wrong, b"")))

    split_runs.run(body())


def test_client_rolls_a_session_back_and_goes_on() -> None:
    async def body() -> None:
        engine = split_model.ToyEngine()
        async with split_runs.serving(engine) as served, split_raw.channel(served.port) as make:
            events: list[remote.Event] = []
            straight = make()
            await straight.open()
            await straight.act(1, 0, split_raw.rows(0, 3))
            session = remote.Remote(
                make.channel,
                token=split_runs.TOKEN,
                hello=split_raw.HELLO,
                knobs=settings.ClientSection(),
                on_event=events.append,
            )

            def arrived() -> list[remote.Arrived]:
                return [event for event in events if isinstance(event, remote.Arrived)]

            assert await session.open() == 0
            session.send(0, hidden=np.concatenate([split_raw.rows(0), split_raw.rows(9, 4)]))
            await split_runs.until(arrived)
            await session.truncate(1)
            num_before = len(arrived())
            session.send(1, hidden=split_raw.rows(1, 2))
            await split_runs.until(lambda: len(arrived()) > num_before)
            expected = codecs.decode(
                await straight.hear_payload(),
                codecs.Codec.F32,
                num_rows=3,
                width=split_model.WIDTH,
                dtype="float32",
            )
            np.testing.assert_array_equal(arrived()[-1].hidden, expected[1:])
            await session.close()
            with pytest.raises(errors.SplitError, match="there is no stream"):
                await session.truncate(0)
            await straight.ask(messages.Close(), messages.Close)
            await split_runs.until(lambda: not engine.open_pieces)
            assert not any(isinstance(event, remote.Lost) for event in events)

    split_runs.run(body())


def test_lost_stream_fails_a_roll_back() -> None:
    async def script(stream: transport.ServerStream) -> None:
        await stream.read()
        await stream.write(messages.to_frame(_WELCOME))
        while (data := await stream.read()) is not None:
            if isinstance(messages.from_frame(data, frames.FrameLimits())[0], messages.Trunc):
                return

    async def body() -> None:
        async with _scripted(script) as port, split_raw.channel(port) as make:
            session = remote.Remote(
                make.channel,
                token="",
                hello=split_raw.HELLO,
                knobs=settings.ClientSection(),
                on_event=lambda event: None,
            )
            await session.open()
            with pytest.raises(errors.SplitError) as error:
                await session.truncate(0)
            assert (error.value.code, error.value.retryable) == (Code.LINK, True)
            await session.close()

    split_runs.run(body())


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        (settings.GatewaySection, {"credits": 0}, r"--split_credits=0 is not in \[1, 1024\]"),
        (settings.ClientSection, {"chunk_len": 0}, "--split_client_chunk_len=0 is not in"),
    ],
)
def test_knob_out_of_bounds_is_named(section: Any, changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        section(**changes)
