"""A gateway answers whatever a client says, frees what it holds, and harms no other session."""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import split_model
import split_raw
import split_runs

from nanoflow_jax.split import codecs, frames, gateway, messages
from nanoflow_jax.split.messages import Code

Raw = split_raw.RawClient


@contextlib.asynccontextmanager
async def _served(
    engine: split_model.ToyEngine | None = None, **limits: Any
) -> AsyncIterator[tuple[gateway.Gateway, Callable[[], Raw]]]:
    """A gateway and a maker of clients; afterwards nothing may be left of any session."""
    engine = engine or split_model.ToyEngine()
    async with (
        split_runs.serving(engine, **({"lease_s": 0.1} | limits)) as served,
        split_raw.channel(served.port) as make,
    ):
        yield served, make
        await split_runs.until(lambda: served.num_sessions == 0 and not engine.open_pieces)
        await split_runs.until(lambda: served.waiting_bytes == 0)


def _run(body: Callable[[], Awaitable[None]]) -> None:
    async def coroutine() -> None:
        await body()

    split_runs.run(coroutine())


def _expect(
    wrong: Callable[[Raw], Awaitable[None]], code: Code, detail: str, **opened: Any
) -> None:
    """After a good step a wrong thing is said: the session ends so, another goes on."""

    async def body() -> None:
        async with _served() as (served, make):
            other = make()
            await other.open()
            client = make()
            await client.open(**opened)
            if opened.get("start", 2):
                await client.act(1, 0, split_raw.rows(0, 4))
            await wrong(client)
            error = await client.hear_error()
            assert error.code is code
            assert detail in error.detail
            assert await client.hear_any() is None
            assert served.counts[f"failed: {code}"] == 1
            await other.act(1, 0, split_raw.rows(0, 8))
            assert (await other.hear(messages.Act)).num_rows == 8
            await other.ask(messages.Close(), messages.Close)

    _run(body)


def test_rows_come_back_with_the_number_of_their_step() -> None:
    async def body() -> None:
        async with _served() as (_, make):
            client = make()
            welcome = await client.open()
            assert (welcome.position, welcome.codec) == (0, codecs.Codec.F32)
            for step in (1, 2, 3):
                await client.act(step, step - 1, split_raw.rows(step - 1))
                answer = await client.hear(messages.Act)
                assert (answer.step, answer.position, answer.border) == (step, step - 1, 4)
            await client.ask(messages.Close(), messages.Close)

    _run(body)


def test_duplicate_of_the_last_step_is_answered_again_and_not_computed_again() -> None:
    async def body() -> None:
        async with _served() as (_, make):
            client = make()
            await client.open()
            await client.act(1, 0, split_raw.rows(0, 2))
            first = await client.hear(messages.Act)
            await client.act(1, 0, split_raw.rows(0, 2))
            assert await client.hear(messages.Act) == first
            await client.act(2, 2, split_raw.rows(2))
            assert (await client.hear(messages.Act)).position == 2
            await client.ask(messages.Close(), messages.Close)

    _run(body)


def test_late_duplicate_of_an_earlier_step_is_passed_over() -> None:
    async def body() -> None:
        async with _served() as (_, make):
            client = make()
            await client.open()
            for step in (1, 2, 3):
                await client.act(step, step - 1, split_raw.rows(step - 1))
                await client.hear(messages.Act)
            await client.act(1, 0, split_raw.rows(0))
            await client.act(4, 3, split_raw.rows(3))
            assert (await client.hear(messages.Act)).step == 4
            await client.ask(messages.Close(), messages.Close)

    _run(body)


def test_reordered_steps_end_the_stream_and_the_session_can_be_resumed() -> None:
    async def body() -> None:
        async with _served(lease_s=60.0) as (served, make):
            client = make()
            welcome = await client.open()
            await client.act(1, 0, split_raw.rows(0, 2))
            await client.hear(messages.Act)
            await client.act(3, 3, split_raw.rows(3))
            await client.act(2, 2, split_raw.rows(2))
            error = await client.hear_error()
            assert (error.code, error.retryable) == (Code.BAD_STEP, True)
            assert error.detail == "step 3 came after step 1: what is between is missing"
            again = make()
            welcome = await again.open(resume=_resume(welcome, 2))
            assert welcome.position == 2
            assert served.counts["resumed"] == 1
            await again.act(1, 2, split_raw.rows(2))
            assert (await again.hear(messages.Act)).position == 2
            await again.ask(messages.Close(), messages.Close)

    _run(body)


def _resume(welcome: messages.Welcome, position: int, **changes: Any) -> messages.Resume:
    fields = {
        "session_id": welcome.session_id,
        "token": welcome.token,
        "epoch": welcome.epoch,
        "position": position,
    }
    return messages.Resume(**(fields | changes))


def _bytes_of(position: int) -> bytes:
    message = messages.Act(
        step=2, border=2, position=position, num_rows=1, width=16, codec=codecs.Codec.F32
    )
    return messages.to_frame(message, split_raw.rows(position).tobytes())


def _changed(data: bytes) -> bytes:
    return data[:-20] + bytes([data[-20] ^ 4]) + data[-19:]


@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (_bytes_of(4)[:-9], "it was cut or joined"),
        (_bytes_of(4)[:7], "a frame of 7 bytes is truncated"),
        (_changed(_bytes_of(4)), "a frame's checksum does not fit"),
        (b"GET / HTTP/1.1\r\n\r\n", "a frame begins with b'GET '"),
        (frames.pack(b"\xc1"), "a frame's header is no message"),
    ],
)
def test_frame_that_is_truncated_or_corrupt_ends_its_stream(data: bytes, detail: str) -> None:
    _expect(lambda client: client.say_bytes(data), Code.BAD_FRAME, detail)


_NAN = np.full((1, 16), np.nan, np.float32)


@pytest.mark.parametrize(
    ("hidden", "changes", "detail"),
    [
        (_NAN, {}, "step 2: row 0 of hidden states has a value that is not finite"),
        (split_raw.rows(4), {"border": 3}, "step 2 has hidden states for layer 3, 16 wide, in f32"),
        (split_raw.rows(4)[:, :8], {}, "hidden states for layer 2, 16 wide, in f32 are wanted"),
        (split_raw.rows(4), {"codec": codecs.Codec.BF16}, "for layer 2, 16 wide, in bf16;"),
        (split_raw.rows(4), {"num_rows": 2}, "2 rows of 16 values in f32 are 128 bytes; 64 came"),
        (split_raw.rows(4), {"position": 5}, "step 2 has rows [5, 6); 1 to 256 rows from 4"),
        (split_raw.rows(4), {"position": 3}, "step 2 has rows [3, 4); 1 to 256 rows from 4"),
    ],
)
def test_rows_of_the_wrong_form_fail_their_session(
    hidden: np.ndarray, changes: dict[str, Any], detail: str
) -> None:
    position = changes.pop("position", 4)
    _expect(lambda client: client.act(2, position, hidden, **changes), Code.BAD_ACT, detail)


def test_rows_past_what_was_agreed_on_fail_their_session() -> None:
    _expect(
        lambda client: client.act(2, 4, split_raw.rows(4, 29)),
        Code.LIMIT,
        "step 2 has rows [4, 33); 32 were agreed on",
    )


def test_token_ids_where_hidden_states_are_wanted_fail_their_session() -> None:
    wrong = messages.Tok(step=2, position=4, token_ids=(1,))
    _expect(
        lambda client: client.say(wrong), Code.BAD_ACT, "step 2 has token ids (1,); hidden states"
    )


def test_hidden_states_where_token_ids_are_wanted_fail_their_session() -> None:
    _expect(
        lambda client: client.act(1, 0, split_raw.rows(0), border=0),
        Code.BAD_ACT,
        "token ids below 97 are wanted",
        start=0,
    )


def test_token_outside_the_vocabulary_fails_its_session() -> None:
    wrong = messages.Tok(step=1, position=0, token_ids=(97,))
    _expect(
        lambda client: client.say(wrong), Code.BAD_ACT, "token ids (97,); token ids below", start=0
    )


def test_tokens_after_the_prompt_of_a_session_that_draws_by_itself_fail_it() -> None:
    wrong = messages.Tok(step=1, position=0, token_ids=(1,) * 9)
    _expect(
        lambda client: client.say(wrong),
        Code.LIMIT,
        "step 1 has rows [0, 9); 8 were agreed on",
        start=0,
        stop=6,
    )


def test_message_that_no_client_says_fails_its_session() -> None:
    _expect(
        lambda client: client.say(messages.Credit(steps=9)),
        Code.PROTOCOL,
        "Credit is nothing that a client says here",
    )


def test_roll_back_past_what_came_fails_its_session() -> None:
    _expect(
        lambda client: client.say(messages.Trunc(step=2, position=5)),
        Code.BAD_STEP,
        "step 2 truncates to 5, but only 4 rows came",
    )


def test_roll_back_of_a_session_that_draws_by_itself_fails_it() -> None:
    _expect(
        lambda client: client.say(messages.Trunc(step=1, position=0)),
        Code.BAD_STEP,
        "a session whose layers are all the server's is not rolled back",
        start=0,
        stop=6,
    )


def test_rows_after_a_roll_back_are_computed_as_if_the_others_had_not_been() -> None:
    async def body() -> None:
        async with _served() as (_, make):
            straight, client = make(), make()
            await straight.open()
            await straight.act(1, 0, split_raw.rows(0, 3))
            await straight.hear(messages.Act)
            await client.open()
            await client.act(1, 0, np.concatenate([split_raw.rows(0, 2), split_raw.rows(9, 3)]))
            await client.hear(messages.Act)
            rolled = await client.ask(messages.Trunc(step=2, position=2), messages.Trunc)
            assert (rolled.step, rolled.position) == (2, 2)
            await client.act(3, 2, split_raw.rows(2))
            await client.hear(messages.Act)
            for step, one in ((2, straight), (4, client)):
                await one.act(step, 3, split_raw.rows(3))
            answers = [await one.hear_payload() for one in (straight, client)]
            assert answers[0] == answers[1]
            for one in (straight, client):
                await one.ask(messages.Close(), messages.Close)

    _run(body)


def test_step_without_credit_fails_its_session() -> None:
    async def body() -> None:
        engine = split_model.ToyEngine()
        async with _served(engine, credits=2) as (_, make):
            with engine.paused():
                client = make()
                await client.open()
                await client.act(1, 0, split_raw.rows(0, 2))
                # The engine has them, and takes nothing more before its step ends.
                await client.hear(messages.Credit)
                for step in range(2, 5):
                    await client.act(step, step, split_raw.rows(step))
                error = await client.hear_error()
            assert error.code is Code.LIMIT
            assert error.detail == "step 4 came without credit: 2 may be under way"

    _run(body)


def test_result_of_one_row_brings_its_credit_and_said_again_it_brings_none() -> None:
    async def body() -> None:
        async with _served(credits=1) as (_, make):
            client = make()
            await client.open()
            for step in range(1, 4):
                await client.act(step, step - 1, split_raw.rows(step - 1))
                answer = await client.hear_any()
                assert isinstance(answer, messages.Act)
                assert (answer.step, answer.credits) == (step, 1)
            await client.act(3, 2, split_raw.rows(2))
            again = await client.hear_any()
            assert again == msgspec.structs.replace(answer, credits=0)
            await client.ask(messages.Close(), messages.Close)

    _run(body)


def test_roll_back_gives_the_credit_of_rows_that_it_forgets() -> None:
    async def body() -> None:
        engine = split_model.ToyEngine()
        async with _served(engine, credits=3) as (_, make):
            client = make()
            await client.open()
            with engine.paused():
                await client.act(1, 0, split_raw.rows(0, 2))
                await client.hear(messages.Credit)
                await client.act(2, 2, split_raw.rows(2))
                await client.say(messages.Trunc(step=3, position=2))
            # That of the roll back, and of the row unless it was computed and gave its own before.
            given = 0
            while given < 2:
                message = await client.hear_any()
                if isinstance(message, messages.Credit):
                    given += message.steps
                elif isinstance(message, messages.Act):
                    given += message.credits
            await client.act(4, 2, split_raw.rows(7))
            assert (await client.hear(messages.Act)).credits == 1
            await client.ask(messages.Close(), messages.Close)

    _run(body)


def test_reader_that_does_not_read_is_dropped_and_others_are_served() -> None:
    async def body() -> None:
        engine = split_model.ToyEngine(rows_per_step=256)
        limits = {"credits": 1024, "max_outbox_bytes": 1 << 15, "heartbeat_s": 60.0}
        async with _served(engine, write_timeout_s=0.2, **limits) as (served, make):
            slow, other = make(), make()
            await slow.open(max_len=8192)
            for step in range(1, 33):
                position = 256 * (step - 1)
                await slow.act(step, position, split_raw.rows(position, 256))
            await split_runs.until(lambda: served.counts["lost"])
            # Rows waited while results did.
            assert engine.num_rows < 8192
            await other.open()
            await other.act(1, 0, split_raw.rows(0))
            assert (await other.hear(messages.Act)).step == 1
            await other.ask(messages.Close(), messages.Close)

    _run(body)


def test_stream_without_a_greeting_is_refused() -> None:
    async def body() -> None:
        async with _served(heartbeat_s=0.1) as (_, make):
            reject = await make().ask(messages.Close(), messages.Reject)
            assert reject.reason == "a stream begins with Hello; Close came"
            silent = make()
            reject = await silent.hear(messages.Reject)
            assert (reject.code, reject.reason) == (Code.PROTOCOL, "no Hello came for 0.2 s")
            garbage = make()
            await garbage.say_bytes(b"\x00" * 40)
            assert (await garbage.hear(messages.Reject)).code is Code.BAD_FRAME

    _run(body)


def test_client_that_falls_silent_is_dropped() -> None:
    async def body() -> None:
        async with _served(heartbeat_s=0.1) as (served, make):
            client = make()
            await client.open()
            await split_runs.until(lambda: served.counts["expired"])

    _run(body)


@pytest.mark.parametrize(
    ("changes", "opened", "code", "reason"),
    [
        ({"token": "guess"}, {}, Code.UNAUTHORIZED, "the resume token is not that of session"),
        ({"epoch": "old"}, {}, Code.EPOCH, "the server was started anew since this session"),
        ({"session_id": "none"}, {}, Code.SESSION, "session none is not here: it was closed"),
        ({"position": 7}, {}, Code.SESSION, "the client has results of 7 rows; 0 were given"),
        ({}, {"start": 3}, Code.LAYERS, "runs [2, 4); [3, 4) was asked for"),
    ],
)
def test_resume_that_does_not_fit_the_session_is_refused(
    changes: dict[str, Any], opened: dict[str, Any], code: Code, reason: str
) -> None:
    async def body() -> None:
        async with _served(lease_s=0.2) as (_, make):
            client = make()
            welcome = await client.open()
            position = changes.get("position", 0)
            fields = {name: value for name, value in changes.items() if name != "position"}
            resume = _resume(welcome, position, **fields)
            reject = await make().ask(split_raw.hello(resume=resume, **opened), messages.Reject)
            assert reject.code is code
            assert reason in reject.reason
            client.vanish()

    _run(body)


def test_second_stream_of_a_session_takes_it_over_from_the_first() -> None:
    async def body() -> None:
        async with _served() as (served, make):
            first = make()
            welcome = await first.open()
            second = make()
            await second.open(resume=_resume(welcome, 0))
            assert await first.hear_any() is None
            assert served.num_sessions == 1
            served.check()
            await second.act(1, 0, split_raw.rows(0))
            await second.hear(messages.Act)
            await second.ask(messages.Close(), messages.Close)

    _run(body)


def test_drawn_tokens_that_the_client_missed_come_again() -> None:
    async def body() -> None:
        async with _served(lease_s=60.0) as (served, make):
            first = make()
            welcome = await first.open(start=0, stop=6)
            await first.say(messages.Tok(step=1, position=0, token_ids=tuple(range(1, 9))))
            tokens = [await first.hear(messages.Tok) for _ in range(3)]
            first.vanish()
            await split_runs.until(lambda: served.counts["lost"])
            again = make()
            welcome = await again.open(start=0, stop=6, resume=_resume(welcome, 8))
            assert welcome.position == 8
            assert [
                (token.position, token.token_ids)
                for token in [await again.hear(messages.Tok) for _ in range(2)]
            ] == [(token.position, token.token_ids) for token in tokens[1:]]
            await again.ask(messages.Close(), messages.Close)

    _run(body)


def test_gateway_without_room_says_when_to_come_again() -> None:
    async def body() -> None:
        async with _served(max_sessions=1, retry_after_s=2.5) as (_, make):
            first = make()
            await first.open()
            reject = await make().ask(split_raw.HELLO, messages.Reject)
            assert reject == messages.Reject(
                code=Code.OVERLOADED,
                reason="1 sessions are open; no more are taken",
                retry_after_s=2.5,
            )
            await first.ask(messages.Close(), messages.Close)

    _run(body)


def test_piece_that_the_engine_refuses_is_refused() -> None:
    async def body() -> None:
        engine = split_model.ToyEngine(max_pieces=1)
        async with _served(engine) as (_, make):
            first = make()
            await first.open()
            reject = await make().ask(split_raw.HELLO, messages.Reject)
            assert reject.code is Code.REFUSED
            assert reject.reason == "1 pieces are open; there is no room for another"
            await first.ask(messages.Close(), messages.Close)

    _run(body)


@pytest.mark.parametrize(
    ("token", "reason"),
    [("a wrong token", "the token is not one of the server's"), ("", "no token was shown")],
)
def test_wrong_token_opens_nothing(token: str, reason: str) -> None:
    async def body() -> None:
        async with (
            split_runs.serving(split_model.ToyEngine()) as served,
            split_raw.channel(served.port, token) as make,
        ):
            reject = await make().ask(split_raw.HELLO, messages.Reject)
            assert (reject.code, reject.reason) == (Code.UNAUTHORIZED, reason)
            assert served.num_sessions == 0

    _run(body)
