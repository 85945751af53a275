"""What breaks between the ends costs at most the request that it happens to."""

import asyncio
import contextlib
from collections.abc import Callable, Sequence

import pytest
import split_model
import split_runs
from split_runs import PARAMS, PROMPT

from nanoflow_jax.split import cut as cut_lib
from nanoflow_jax.split import driver, errors, report
from nanoflow_jax.split.messages import Code

LONG = tuple(1 + i % 90 for i in range(400))
_kinds = pytest.mark.parametrize("cut", split_model.KINDS, ids=str)


def _at_token(number: int, action: Callable[[], None]) -> Callable[[Sequence[int]], None]:
    """Does something once, when so many tokens have come."""
    count = 0

    def on_tokens(token_ids: Sequence[int]) -> None:
        nonlocal count
        before, count = count, count + len(token_ids)
        if before < number <= count:
            action()

    return on_tokens


_BREAKS: dict[str, Callable[[split_runs.Ends], None]] = {
    "reset": lambda ends: ends.proxy.cut(),
    "half-closed": lambda ends: ends.proxy.half_close(),
}


@_kinds
@pytest.mark.parametrize("how", list(_BREAKS))
def test_link_broken_while_tokens_are_drawn_is_taken_up_with_the_same_tokens(
    cut: cut_lib.Cut, how: str
) -> None:
    async def body() -> None:
        # A server that draws by itself may be finished before anything breaks.
        limits = {"lease_s": 0.5} if cut.is_all_server else {}
        engine = split_model.ToyEngine(rows_per_step=1)
        async with split_runs.ends(engine=engine, **limits) as ends:
            on_tokens = _at_token(5, lambda: _BREAKS[how](ends))
            result = await ends.client.generate(PROMPT, PARAMS, cut, on_tokens=on_tokens)
            assert result.token_ids == split_model.generate(PROMPT, PARAMS)
            if not cut.is_all_server:
                assert (result.report.num_resumes, result.report.num_replays) == (1, 0)
            await ends.at_baseline()

    split_runs.run(body())


@_kinds
def test_link_broken_while_the_prompt_travels_is_taken_up_with_the_same_tokens(
    cut: cut_lib.Cut,
) -> None:
    async def body() -> None:
        async with split_runs.ends() as ends:
            ends.proxy.cut_after(up=3000)
            cuts_at_first_token: list[int] = []
            on_tokens = _at_token(1, lambda: cuts_at_first_token.append(ends.proxy.num_cuts))
            result = await ends.client.generate(LONG, PARAMS, cut, on_tokens=on_tokens)
            assert cuts_at_first_token == [1]
            assert result.token_ids == split_model.generate(LONG, PARAMS)
            assert result.report.num_resumes == 1
            await ends.at_baseline()

    split_runs.run(body())


@_kinds
def test_link_broken_many_times_is_taken_up_each_time(cut: cut_lib.Cut) -> None:
    async def body() -> None:
        async with split_runs.ends(engine=split_model.ToyEngine(rows_per_step=1)) as ends:
            count = 0

            def cut_often(token_ids: Sequence[int]) -> None:
                nonlocal count
                count += len(token_ids)
                if count < 20:
                    ends.proxy.cut()

            result = await ends.client.generate(PROMPT, PARAMS, cut, on_tokens=cut_often)
            assert result.token_ids == split_model.generate(PROMPT, PARAMS)
            await ends.at_baseline()

    split_runs.run(body())


async def _dies(ends: split_runs.Ends, task: "asyncio.Task[driver.Generation]") -> None:
    """Ends a client of which nothing comes through any more; its lease frees what it held."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    await ends.at_baseline()
    assert ends.gateway.counts["expired"] == 1


@_kinds
def test_rows_of_a_client_that_dies_while_its_prompt_travels_are_freed(cut: cut_lib.Cut) -> None:
    async def body() -> None:
        async with split_runs.ends(lease_s=0.1) as ends:
            ends.proxy.cut_after(up=3000)
            task = asyncio.create_task(ends.client.generate(LONG, PARAMS, cut))
            await split_runs.until(lambda: ends.proxy.num_cuts)
            ends.proxy.is_open = False
            await _dies(ends, task)

    split_runs.run(body())


@_kinds
def test_rows_of_a_client_that_dies_while_tokens_are_drawn_are_freed(cut: cut_lib.Cut) -> None:
    async def body() -> None:
        async with split_runs.ends(
            engine=split_model.ToyEngine(rows_per_step=1), lease_s=0.1
        ) as ends:
            died = asyncio.Event()

            def die() -> None:
                ends.proxy.is_open = False
                ends.proxy.cut()
                died.set()

            task = asyncio.create_task(
                ends.client.generate(PROMPT, PARAMS, cut, on_tokens=_at_token(3, die))
            )
            await died.wait()
            await _dies(ends, task)

    split_runs.run(body())


@_kinds
def test_client_that_cannot_come_back_says_so(cut: cut_lib.Cut) -> None:
    async def body() -> None:
        async with split_runs.ends(
            engine=split_model.ToyEngine(rows_per_step=1),
            lease_s=0.1,
            knobs={"max_attempts": 3},
        ) as ends:

            def leave() -> None:
                ends.proxy.is_open = False
                ends.proxy.cut()

            with pytest.raises(errors.SplitError, match=r"attempt 3 of 3, \d+ tokens drawn") as e:
                await ends.client.generate(PROMPT, PARAMS, cut, on_tokens=_at_token(3, leave))
            assert e.value.code is Code.LINK
            await ends.at_baseline()

    split_runs.run(body())


@_kinds
def test_session_whose_lease_expired_is_told_anew_with_the_same_tokens(cut: cut_lib.Cut) -> None:
    async def body() -> None:
        async with split_runs.ends(
            engine=split_model.ToyEngine(rows_per_step=1),
            lease_s=0.05,
            knobs={"max_attempts": 100, "backoff_s": 0.001},
        ) as ends:
            ends.engine.holds_at = 3

            def leave() -> None:
                ends.proxy.is_open = False
                ends.proxy.cut()

            task = asyncio.create_task(
                ends.client.generate(PROMPT, PARAMS, cut, on_tokens=_at_token(3, leave))
            )
            await split_runs.until(lambda: ends.gateway.counts["expired"])
            ends.engine.holds_at = None
            ends.proxy.is_open = True
            result = await task
            assert result.token_ids == split_model.generate(PROMPT, PARAMS)
            assert result.report.num_replays == 1
            await ends.at_baseline()

    split_runs.run(body())


@_kinds
@pytest.mark.parametrize("number", [0, 5], ids=["prompt", "tokens"])
def test_server_that_is_started_anew_is_told_anew_with_the_same_tokens(
    cut: cut_lib.Cut, number: int
) -> None:
    async def body() -> None:
        other = split_model.ToyEngine()
        async with (
            split_runs.ends(engine=split_model.ToyEngine(rows_per_step=1)) as ends,
            split_runs.serving(other) as successor,
        ):

            def restart() -> None:
                ends.proxy.target_port = successor.port
                ends.proxy.cut()

            ends.engine.holds_at = 5
            if number == 0:
                ends.proxy.cut_after(up=3000)
                ends.proxy.target_after_cut = successor.port
            prompt = PROMPT if number else LONG
            result = await ends.client.generate(
                prompt, PARAMS, cut, on_tokens=_at_token(number, restart)
            )
            assert result.token_ids == split_model.generate(prompt, PARAMS)
            assert result.report.num_replays == 1
            await split_runs.until(lambda: not other.open_pieces)

    split_runs.run(body())


def test_server_that_stops_says_so_and_another_goes_on() -> None:
    async def body() -> None:
        stopping = asyncio.Event()

        async def serve_until_told(ends: split_runs.Ends, engine: split_model.ToyEngine) -> None:
            async with split_runs.serving(engine) as first:
                ends.proxy.target_port = first.port
                await stopping.wait()
                ends.proxy.target_port = ends.gateway.port
            assert first.num_sessions == 0
            assert not engine.open_pieces

        async with split_runs.ends() as ends:
            port = ends.gateway.port
            engine = split_model.ToyEngine(rows_per_step=1)
            first = asyncio.create_task(serve_until_told(ends, engine))
            await split_runs.until(lambda: ends.proxy.target_port != port)
            result = await ends.client.generate(
                PROMPT, PARAMS, split_model.MIDDLE, on_tokens=_at_token(3, stopping.set)
            )
            await first
            assert result.token_ids == split_model.generate(PROMPT, PARAMS)
            assert result.report.num_replays == 1
            await ends.at_baseline()

    split_runs.run(body())


def test_request_whose_penalties_a_new_session_would_not_know_fails() -> None:
    async def body() -> None:
        params = split_runs.with_params(presence_penalty=1.0)
        async with (
            split_runs.ends(engine=split_model.ToyEngine(rows_per_step=1)) as ends,
            split_runs.serving(split_model.ToyEngine()) as successor,
        ):

            def restart() -> None:
                ends.proxy.target_port = successor.port
                ends.proxy.cut()

            with pytest.raises(errors.SplitError, match="penalties, bad_words and grammars depend"):
                await ends.client.generate(
                    PROMPT, params, split_model.CLIENT_FIRST, on_tokens=_at_token(3, restart)
                )

    split_runs.run(body())


def test_silent_link_is_noticed_by_both_ends_and_taken_up() -> None:
    async def body() -> None:
        async with split_runs.ends(
            engine=split_model.ToyEngine(rows_per_step=1),
            heartbeat_s=0.2,
            knobs={"max_attempts": 100, "connect_timeout_s": 0.5},
        ) as ends:
            task = asyncio.create_task(
                ends.client.generate(
                    PROMPT, PARAMS, split_model.MIDDLE, on_tokens=_at_token(3, ends.proxy.stall)
                )
            )
            # Nothing tells the gateway but that it hears nothing.
            await split_runs.until(lambda: ends.gateway.counts["lost"])
            ends.proxy.cut()
            ends.proxy.flow()
            result = await task
            assert result.token_ids == split_model.generate(PROMPT, PARAMS)
            assert result.report.num_resumes >= 1
            await ends.at_baseline()

    split_runs.run(body())


@pytest.mark.parametrize(
    ("cut", "direction"),
    [
        (split_model.CLIENT_FIRST, "up"),
        (split_model.MIDDLE, "up"),
        (split_model.MIDDLE, "down"),
        (split_model.SERVER_FIRST, "down"),
    ],
    ids=str,
)
def test_rows_changed_on_their_way_are_noticed_and_sent_again(
    cut: cut_lib.Cut, direction: str
) -> None:
    async def body() -> None:
        async with split_runs.ends() as ends:
            ends.proxy.spoil = direction
            result = await ends.client.generate(PROMPT, PARAMS, cut)
            assert ends.proxy.spoil is None
            assert result.token_ids == split_model.generate(PROMPT, PARAMS)
            assert result.report.num_resumes == 1
            assert ends.gateway.counts["failed: bad_frame"] == (direction == "up")
            await ends.at_baseline()

    split_runs.run(body())


def test_link_slower_than_promised_is_named_in_the_report() -> None:
    async def body() -> None:
        async with split_runs.ends() as ends:
            ends.proxy.delay_s = 0.01
            promise = report.Promise(ttft_s=1e-3, tpot_s=2e-3, rtt_s=3e-3)
            result = await ends.client.generate(
                PROMPT[:8], PARAMS, split_model.MIDDLE, promise=promise
            )
            assert result.token_ids == split_model.generate(PROMPT[:8], PARAMS)
            lateness = result.report.lateness or ""
            assert "ms, 1.0 ms promised" in lateness
            assert "time per token" in lateness and "ms, 2.0 ms promised" in lateness
            assert "round trip" in lateness and "ms, 3.0 ms promised" in lateness
            assert result.report.tpot_s is not None and result.report.tpot_s >= 0.02

    split_runs.run(body())


def test_request_past_its_deadline_says_what_the_link_did() -> None:
    async def body() -> None:
        async with split_runs.ends(lease_s=0.1, knobs={"connect_timeout_s": 0.2}) as ends:
            stalled = _at_token(2, ends.proxy.stall)
            with pytest.raises(
                errors.SplitError,
                match=r"not finished in 0\.5 s: \d+ tokens came; round trip .*3\.0 ms promised",
            ):
                await ends.client.generate(
                    PROMPT[:8],
                    PARAMS,
                    split_model.MIDDLE,
                    promise=report.Promise(rtt_s=3e-3),
                    deadline_s=0.5,
                    on_tokens=stalled,
                )
            ends.proxy.flow()
            await ends.at_baseline()

    split_runs.run(body())


def test_narrow_link_does_not_change_tokens() -> None:
    async def body() -> None:
        async with split_runs.ends() as ends:
            ends.proxy.bytes_per_s = 200_000
            result = await ends.client.generate(PROMPT, PARAMS, split_model.MIDDLE)
            assert result.token_ids == split_model.generate(PROMPT, PARAMS)

    split_runs.run(body())


@_kinds
def test_failed_step_of_the_server_fails_its_requests_and_no_later_one(cut: cut_lib.Cut) -> None:
    async def body() -> None:
        async with split_runs.ends(engine=split_model.ToyEngine(rows_per_step=1)) as ends:
            ends.engine.fails = RuntimeError("the device is gone")
            with pytest.raises(
                errors.SplitError, match="a step of the engine failed: the device is gone"
            ):
                await ends.client.generate(PROMPT, PARAMS, cut)
            await ends.at_baseline()
            result = await ends.client.generate(PROMPT, PARAMS, cut)
            assert result.token_ids == split_model.generate(PROMPT, PARAMS)

    split_runs.run(body())


def test_failed_step_of_the_client_fails_its_request_and_frees_the_server() -> None:
    async def body() -> None:
        async with split_runs.ends() as ends:
            ends.client_engine.fails = RuntimeError("out of memory")
            with pytest.raises(
                errors.SplitError, match="the client's engine: a step of the engine failed: out of"
            ):
                await ends.client.generate(PROMPT, PARAMS, split_model.MIDDLE)
            await ends.at_baseline()

    split_runs.run(body())


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [("engine", "the engine's row 7 of hidden"), ("client_engine", "this end's row 7 of hidden")],
)
def test_engine_that_gives_values_that_are_not_finite_fails_the_request(
    spoilt: str, message: str
) -> None:
    async def body() -> None:
        async with split_runs.ends() as ends:
            getattr(ends, spoilt).spoils = True
            with pytest.raises(
                errors.SplitError, match=f"{message} states has a value that is not"
            ):
                await ends.client.generate(PROMPT, PARAMS, split_model.MIDDLE)
            await ends.at_baseline()

    split_runs.run(body())
