"""Tokens of a split request are those of one process, for every way to split it."""

import asyncio
from typing import Any

import msgspec
import pytest
import split_model
import split_runs
from split_runs import PARAMS, PROMPT

from nanoflow_jax import request
from nanoflow_jax.split import cut as cut_lib
from nanoflow_jax.split import errors, report, transport
from nanoflow_jax.split.codecs import Codec


@pytest.mark.parametrize("cut", split_model.CUTS, ids=str)
def test_split_tokens_are_those_of_one_process(cut: cut_lib.Cut) -> None:
    async def body() -> None:
        async with split_runs.ends() as ends:
            result = await ends.client.generate(PROMPT, PARAMS, cut)
            assert result.token_ids == split_model.generate(PROMPT, PARAMS)
            assert result.finish_reason is request.FinishReason.LENGTH
            assert result.report.cut == cut
            await ends.at_baseline()

    split_runs.run(body())


def test_requests_of_all_kinds_share_the_steps_of_one_engine() -> None:
    async def body() -> None:
        async with split_runs.ends() as ends:
            prompts = [PROMPT[: 3 + 5 * i] for i in range(8)]
            results = await asyncio.gather(
                *(
                    ends.client.generate(prompt, PARAMS, split_model.CUTS[3 * i % 21])
                    for i, prompt in enumerate(prompts)
                )
            )
            for prompt, result in zip(prompts, results, strict=True):
                assert result.token_ids == split_model.generate(prompt, PARAMS)
            assert max(ends.engine.steps) > 1
            await ends.at_baseline()

    split_runs.run(body())


@pytest.mark.parametrize("codec", list(Codec), ids=str)
def test_rows_travel_in_the_codec_that_was_agreed_on(codec: Codec) -> None:
    async def body() -> None:
        async with split_runs.ends(codecs=(codec,)) as ends:
            result = await ends.client.generate(PROMPT, PARAMS, split_model.MIDDLE)
            assert result.report.codec == codec
            assert len(result.token_ids) == PARAMS.max_tokens

    split_runs.run(body())


def test_request_ends_with_the_token_that_ends_it() -> None:
    async def body() -> None:
        params = request.SamplingParams(max_tokens=60, temperature=4.0, seed=8)
        expected = split_model.generate(PROMPT, params)
        assert expected[-1] == split_model.EOS and len(expected) == 56
        async with split_runs.ends() as ends:
            for cut in split_model.KINDS:
                result = await ends.client.generate(PROMPT, params, cut)
                assert result.token_ids == expected
                assert result.finish_reason is request.FinishReason.STOP
            await ends.at_baseline()

    split_runs.run(body())


def test_report_counts_what_the_streams_carried() -> None:
    async def body() -> None:
        async with split_runs.ends() as ends:
            result = await ends.client.generate(
                PROMPT[:17], PARAMS, split_model.MIDDLE, promise=report.Promise(ttft_s=60.0)
            )
            counted = result.report
            # Three chunks of the prompt, and each token but the last.
            assert counted.num_steps == counted.num_results == 3 + 23
            rows_bytes = (17 + 23) * split_model.WIDTH * 4
            assert counted.up_bytes > rows_bytes and counted.down_bytes > rows_bytes
            assert counted.up_bytes < ends.proxy.up_bytes
            assert counted.down_bytes < ends.proxy.down_bytes
            assert counted.ttft_s is not None and counted.tpot_s is not None
            assert 0 < counted.ttft_s < counted.total_s
            assert 0 < counted.server_s < counted.total_s
            assert counted.rtt_p50_s is not None and counted.rtt_p50_s > 0
            assert (counted.num_resumes, counted.num_replays) == (0, 0)
            assert counted.lateness is None

    split_runs.run(body())


def test_prompt_travels_while_its_end_is_still_computed() -> None:
    async def body() -> None:
        async with split_runs.ends(client_engine=split_model.ToyEngine(rows_per_step=8)) as ends:
            with ends.client_engine.paused(after=3):
                task = asyncio.create_task(ends.client.generate(PROMPT, PARAMS, split_model.MIDDLE))
                await split_runs.until(lambda: ends.engine.num_rows == 24)
            result = await task
            assert result.token_ids == split_model.generate(PROMPT, PARAMS)

    split_runs.run(body())


def test_tokens_are_told_as_they_come() -> None:
    async def body() -> None:
        async with split_runs.ends() as ends:
            told: list[int] = []
            result = await ends.client.generate(
                PROMPT, PARAMS, split_model.CLIENT_FIRST, on_tokens=told.extend
            )
            assert tuple(told) == result.token_ids

    split_runs.run(body())


def test_client_that_finds_no_room_comes_again_until_there_is() -> None:
    async def body() -> None:
        knobs = {"max_attempts": 1000, "backoff_s": 0.0}
        async with split_runs.ends(max_sessions=1, retry_after_s=0.01, knobs=knobs) as ends:
            results = await asyncio.gather(
                *(ends.client.generate(PROMPT, PARAMS, split_model.MIDDLE) for _ in range(3))
            )
            assert {r.token_ids for r in results} == {split_model.generate(PROMPT, PARAMS)}
            assert ends.gateway.counts["refused: overloaded"] > 0

    split_runs.run(body())


def test_client_with_another_model_is_told_so() -> None:
    async def body() -> None:
        other = msgspec.structs.replace(split_model.IDENTITY, parts=(("layer 0", "f" * 64),))
        async with split_runs.ends(identity=other) as ends:
            with pytest.raises(errors.RefusedError, match="both ends must load the same files"):
                await ends.client.generate(PROMPT, PARAMS, split_model.MIDDLE)
            await ends.at_baseline()

    split_runs.run(body())


def test_trial_says_what_a_session_would_be_told_and_opens_none() -> None:
    async def body() -> None:
        engine = split_model.ToyEngine()
        async with (
            split_runs.serving(engine, borders=(2, 4)) as served,
            split_runs.client_of(
                transport.Endpoint(host="127.0.0.1", port=served.port, token=split_runs.TOKEN)
            ) as client,
        ):
            await client.check(PROMPT, PARAMS, split_model.MIDDLE)
            off_grid = cut_lib.Cut(start=1, stop=4, num_layers=split_model.NUM_LAYERS)
            for ask in (client.check, client.generate):
                with pytest.raises(errors.RefusedError, match=r"leave at layers \[0, 2, 4"):
                    await ask(PROMPT, PARAMS, off_grid)
            assert served.num_sessions == served.counts["opened"] == 0

    split_runs.run(body())


def test_trial_of_a_gateway_that_is_not_there_is_tried_again_and_then_told() -> None:
    async def body() -> None:
        nowhere = transport.Endpoint(host="127.0.0.1", port=1)
        async with split_runs.client_of(nowhere, max_attempts=2) as client:
            with pytest.raises(errors.SplitError, match=r"\(attempt 2 of 2, nothing was loaded"):
                await client.check(PROMPT, PARAMS, split_model.MIDDLE)

    split_runs.run(body())


def test_client_with_a_wrong_token_is_told_so() -> None:
    async def body() -> None:
        async with split_runs.ends(token="guess") as ends:
            with pytest.raises(errors.RefusedError, match="the token is not one of the server's"):
                await ends.client.generate(PROMPT, PARAMS, split_model.MIDDLE)
            with pytest.raises(errors.RefusedError, match="the token is not one of the server's"):
                await ends.client.probe()

    split_runs.run(body())


def test_a_client_connects_over_a_link_of_long_round_trips() -> None:
    async def body() -> None:
        async with split_runs.ends() as ends:
            ends.proxy.delay_s = 0.3
            assert (await ends.client.ask()).borders[0] == 0
            assert ends.proxy.num_taken == 1

    split_runs.run(body())


def test_probe_measures_the_delay_and_the_bandwidth_of_a_link() -> None:
    async def body() -> None:
        async with split_runs.ends() as ends:
            ends.proxy.delay_s = 0.02
            ends.proxy.bytes_per_s = 4e6
            measured = await ends.client.probe(num_bytes=400_000)
            # A loaded machine adds to times, and takes nothing away.
            assert 0.04 <= measured.rtt_p50_s <= measured.rtt_p95_s
            assert measured.up_bytes_per_s < 5e6
            assert measured.down_bytes_per_s < 5e6

    split_runs.run(body())


@pytest.mark.parametrize(
    ("changes", "prompt", "max_len", "message"),
    [
        ({}, (), None, "the prompt has no token"),
        ({"n": 2}, PROMPT, None, "n is not for split requests"),
        ({"stop": ("x",)}, PROMPT, None, "stop is not for split requests"),
        ({"prompt_logprobs": 1}, PROMPT, None, "prompt_logprobs is not for split requests"),
        ({"seed": None}, PROMPT, None, "a split request needs a seed"),
        ({"max_tokens": None}, PROMPT, None, "give max_tokens or max_len"),
        ({}, PROMPT, 59, "max_len=59 leaves no room after a prompt of 59 tokens"),
    ],
)
def test_request_that_cannot_be_split_is_refused_before_it_travels(
    changes: dict[str, Any], prompt: tuple[int, ...], max_len: int | None, message: str
) -> None:
    async def body() -> None:
        async with split_runs.ends() as ends:
            with pytest.raises(ValueError, match=message):
                await ends.client.generate(
                    prompt,
                    split_runs.with_params(**changes),
                    split_model.MIDDLE,
                    max_len=max_len,
                )
            assert ends.proxy.up_bytes == 0

    split_runs.run(body())


def test_client_without_the_layers_of_a_cut_says_which_it_lacks() -> None:
    async def body() -> None:
        endpoint = transport.Endpoint(host="127.0.0.1", port=1)
        async with split_runs.client_of(endpoint, held_layers=((0, 2),)) as made:
            with pytest.raises(ValueError, match=r"this client does not hold \[4, 6\)"):
                await made.generate(PROMPT, PARAMS, split_model.MIDDLE)

    split_runs.run(body())


@pytest.mark.parametrize(("start", "stop"), [(3, 3), (-1, 2), (0, 7)])
def test_cut_outside_the_model_is_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="is no range of layers of a model with 6 layers"):
        cut_lib.Cut(start=start, stop=stop, num_layers=6)
