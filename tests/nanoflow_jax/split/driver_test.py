"""Tokens of a split request are those of one process, for every way to split it."""

import asyncio

import pytest
import split_model
import split_runs
from split_runs import PARAMS, PROMPT

from nanoflow_jax import request
from nanoflow_jax.split import cut as cut_lib


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
