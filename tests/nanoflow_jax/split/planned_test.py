"""Each request runs as it was planned, and what it shows changes how the next one is planned."""

import pytest
import split_choices
import split_model
import split_runs
from split_runs import PARAMS, PROMPT

from nanoflow_jax.split import account, cut, errors, planned, transport
from nanoflow_jax.split.planning.planner import VerdictKind

_OUTER = cut.Cut(start=2, stop=4, num_layers=split_model.NUM_LAYERS)
_DEADLINES = {"ttft_s": 60.0, "tpot_s": 0.05}


@pytest.mark.parametrize(
    ("held", "of_ends", "kind"),
    [
        (split_choices.OUTER, {}, VerdictKind.SPLIT),
        (((0, 2),), {}, VerdictKind.SPLIT),
        (((4, 6),), {}, VerdictKind.SPLIT),
        (split_choices.OUTER, {"rtt_ms": 100.0}, VerdictKind.ALL_SERVER),
        (split_choices.WHOLE, {}, VerdictKind.ALL_CLIENT),
    ],
)
def test_tokens_are_those_of_one_process_whatever_is_chosen(held, of_ends, kind) -> None:
    async def body() -> None:
        async with split_runs.ends() as ends:
            chooser = split_choices.chooser(held, **of_ends)
            made = planned.PlannedClient(ends.client, chooser)
            done, told = await made.generate(PROMPT, PARAMS, **_DEADLINES)
            assert told.choice.verdict.kind is kind
            assert done.token_ids == split_model.generate(PROMPT, PARAMS)
            assert done.report.cut == told.choice.cut
            assert (told.choice.cut is None) == (kind is VerdictKind.ALL_CLIENT)
            await ends.at_baseline()

    split_runs.run(body())


def test_a_link_slower_than_promised_gives_the_next_request_another_cut() -> None:
    async def body() -> None:
        async with split_runs.ends() as ends:
            ends.proxy.delay_s = 0.1
            made = planned.PlannedClient(ends.client, split_choices.chooser())
            params = split_runs.with_params(max_tokens=4)
            first, told = await made.generate(PROMPT, params, **_DEADLINES)
            assert told.choice.cut == _OUTER
            assert first.report.tpot_s > 0.2
            assert "ms promised" in first.report.lateness
            second, told = await made.generate(PROMPT, params, **_DEADLINES)
            assert told.choice.cut == split_model.ALL_SERVER
            # Half of what was promised, and half of two delays.
            assert told.choice.ends.link.rtt_p50_s > 0.1
            assert first.token_ids == second.token_ids == split_model.generate(PROMPT, params)

    split_runs.run(body())


def test_a_link_of_less_bandwidth_than_promised_gives_the_next_prompt_another_cut() -> None:
    async def body() -> None:
        async with split_runs.ends() as ends:
            # 295 rows of 64 bytes take 1.9 s each way, and their ids a tenth of it.
            ends.proxy.bytes_per_s = 1e4
            made = planned.PlannedClient(ends.client, split_choices.chooser())
            params, prompt = split_runs.with_params(max_tokens=4), PROMPT * 5
            first, told = await made.generate(prompt, params, ttft_s=0.5)
            assert told.choice.cut == _OUTER
            assert first.report.ttft_s > 1.9
            second, told = await made.generate(prompt, params, ttft_s=0.5)
            assert told.corrections.transfer > 1000
            assert told.choice.cut == split_model.ALL_SERVER
            assert first.token_ids == second.token_ids == split_model.generate(prompt, params)

    split_runs.run(body())


def test_a_request_that_nothing_serves_in_time_is_not_sent() -> None:
    async def body() -> None:
        async with split_runs.ends() as ends:
            made = planned.PlannedClient(ends.client, split_choices.chooser(rtt_ms=100.0))
            done, told = await made.generate(PROMPT, PARAMS, ttft_s=0.01)
            assert done is None
            assert ends.gateway.counts["opened"] == 0
            said = account.text(told)
            assert said.startswith("reject: nothing runs; no placement meets the deadlines: the ")
            found = account.as_json(told)
            assert (found["server_layers"], found["rows"]) == (None, [])
            assert found["best_ms"]["ttft"] > 100

    split_runs.run(body())


def test_an_account_has_what_was_predicted_beside_what_was_measured() -> None:
    async def body() -> None:
        async with split_runs.ends() as ends:
            made = planned.PlannedClient(ends.client, split_choices.chooser())
            done, told = await made.generate(PROMPT[:17], PARAMS, **_DEADLINES)
            rows = {row["name"]: row for row in account.as_json(told)["rows"]}
            # 17 rows and one for each token but the last, of 16 numbers of two bytes.
            assert rows["sent"]["predicted"] == (17 + 23) * 32 / 1e3
            assert rows["sent"]["measured"] == done.report.up_bytes / 1e3
            assert rows["received"]["predicted"] == (17 + 23) * 32 / 1e3
            assert rows["round trips"]["predicted"] == 24
            assert rows["round trips"]["measured"] == 3 + 23  # three chunks of the prompt
            assert rows["first token"]["measured"] == done.report.ttft_s * 1e3
            # Two of six layers run at the server, where a layer takes 10 us for each token.
            assert rows["server's time"]["predicted"] == pytest.approx(2 * (17 + 23) * 0.01)
            assert rows["of it saved"]["predicted"] == pytest.approx(4 * 40 * 0.01 + 2 * 24 * 0.005)
            lines = account.text(told).splitlines()
            assert lines[0].startswith("split: client [0, 2), server [2, 4), client [4, 6); ")
            assert lines[1].split() == ["predicted", "measured"]
            assert lines[4].startswith("sent                    1.3 kB")
            assert lines[-1].startswith("planned with client x1.00, server x1.00, ")

    split_runs.run(body())


def test_a_plan_needs_the_number_of_tokens() -> None:
    async def body() -> None:
        async with split_runs.ends() as ends:
            made = planned.PlannedClient(ends.client, split_choices.chooser())
            with pytest.raises(ValueError, match="give max_tokens: plans are made for a number"):
                await made.generate(PROMPT, split_runs.with_params(max_tokens=None))

    split_runs.run(body())


def test_a_client_without_all_layers_does_not_generate_alone() -> None:
    async def body() -> None:
        endpoint = transport.Endpoint(host="127.0.0.1", port=1)
        async with split_runs.client_of(endpoint, held_layers=split_choices.OUTER) as made:
            with pytest.raises(ValueError, match=r"does not hold all 6 layers; it holds \[\(0"):
                await made.generate_alone(PROMPT, PARAMS)

    split_runs.run(body())


def test_a_client_whose_engine_fails_alone_says_so() -> None:
    async def body() -> None:
        async with split_runs.ends() as ends:
            ends.client_engine.fails = RuntimeError("out of memory")
            with pytest.raises(
                errors.SplitError, match="the client's engine: a step of the engine failed"
            ):
                await ends.client.generate_alone(PROMPT, PARAMS)
            await ends.at_baseline()

    split_runs.run(body())
