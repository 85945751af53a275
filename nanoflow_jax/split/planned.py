"""Requests of a client, each planned with what those before it showed."""

from collections.abc import Sequence

from nanoflow_jax import request as request_lib
from nanoflow_jax.split import account, driver, report
from nanoflow_jax.split import client as client_lib
from nanoflow_jax.split.planning import choosing
from nanoflow_jax.split.planning.asked import Request
from nanoflow_jax.split.planning.planner import Plan


class PlannedClient:
    """Plans each request, runs it so, and learns from it."""

    def __init__(self, client: client_lib.SplitClient, chooser: choosing.Chooser) -> None:
        """Nothing ran yet.

        Args:
            client: Runs what is chosen.
            chooser: Plans with the borders of its gateway and the layers that it holds.
        """
        self._client, self._chooser = client, chooser

    async def generate(
        self,
        prompt_ids: Sequence[int],
        params: request_lib.SamplingParams,
        *,
        ttft_s: float | None = None,
        tpot_s: float | None = None,
        e2e_s: float | None = None,
    ) -> tuple[driver.Generation | None, account.Account]:
        """Generates one choice as it is planned.

        Args:
            prompt_ids: Token ids, at least one.
            params: How to draw, with `max_tokens`.
            ttft_s: Deadline of the first token; None is none, here and below.
            tpot_s: Of each further one.
            e2e_s: Of the whole answer.

        Returns:
            What came, None if the request was rejected; and its account.

        Raises:
            ValueError: It cannot be asked or planned so.
            SplitError: It failed, and says why.
        """
        if params.max_tokens is None:
            raise ValueError("give max_tokens: plans are made for a number of tokens")
        corrections = self._chooser.corrections
        choice = self._chooser.choose(
            Request(
                prompt_len=len(prompt_ids),
                output_len=params.max_tokens,
                ttft_s=ttft_s,
                tpot_s=tpot_s,
                e2e_s=e2e_s,
            )
        )
        done = await self._run(choice, prompt_ids, params)
        if done is not None:
            shown = account.measured(done)
            if shown is not None:
                self._chooser.learn(choice, shown)
        return done, account.Account(
            choice=choice,
            corrections=corrections,
            report=None if done is None else done.report,
            num_tokens=0 if done is None else len(done.token_ids),
        )

    async def _run(
        self,
        choice: choosing.Choice,
        prompt_ids: Sequence[int],
        params: request_lib.SamplingParams,
    ) -> driver.Generation | None:
        plan = choice.verdict.plan
        if plan is None:
            return None
        if choice.cut is None:
            return await self._client.generate_alone(prompt_ids, params)
        return await self._client.generate(
            prompt_ids, params, choice.cut, promise=_promise(choice, plan)
        )


def _promise(choice: choosing.Choice, plan: Plan) -> report.Promise:
    return report.Promise(ttft_s=plan.ttft_s, tpot_s=plan.tpot_s, rtt_s=choice.ends.link.rtt_p95_s)
