"""`client --profiles=DIR`: requests whose cut is planned, one after the other."""

import asyncio
import contextlib
import json
import pathlib
from collections.abc import Callable, Sequence

from absl import flags as absl_flags

from nanoflow_jax import config as config_lib
from nanoflow_jax import console
from nanoflow_jax import flags as knob_flags
from nanoflow_jax import request as request_lib
from nanoflow_jax.engine import model_source
from nanoflow_jax.split import (
    account,
    client_ends,
    command_flags,
    planned,
    profile_files,
    settings,
    transport,
)
from nanoflow_jax.split import client as client_lib
from nanoflow_jax.split.planning import choosing, plan_command
from nanoflow_jax.split.planning.costs import Accounting, Model

_ONLY_PLANNED = ("ttft_ms", "tpot_ms", "e2e_ms", "report")


def define(values: absl_flags.FlagValues) -> None:
    """Defines the flags of planning."""
    common = knob_flags.of_program(values)
    absl_flags.DEFINE_string(
        "profiles",
        None,
        "Folder that `profile` wrote. Which layers run here is then planned for each request, so "
        "that the server is charged least within the deadlines.",
        **common,
    )
    plan_command.define_deadlines(values)
    plan_command.define_judgement(values, accounting=Accounting.AVERAGE, least_saving=0.1)
    absl_flags.DEFINE_string(
        "report", None, "Also write what was predicted and measured, a JSON line each.", **common
    )


def check(values: absl_flags.FlagValues) -> None:
    """Raises ValueError if flags of planning are given without profiles."""
    given = [name for name in _ONLY_PLANNED if values[name].value is not None]
    if given and not values.profiles:
        raise ValueError(
            f"--{given[0]} is of requests that are planned; give --profiles=DIR, which "
            "python -m nanoflow_jax.split profile writes"
        )


def run(
    values: absl_flags.FlagValues,
    where: transport.Endpoint,
    ours: tuple[config_lib.EngineConfig, model_source.ModelSource],
    layers: Sequence[tuple[int, int]],
    *,
    knobs: settings.ClientSection,
    asked: tuple[Sequence[Sequence[int]], request_lib.SamplingParams],
    show: Callable[[Sequence[int]], None],
    runner: asyncio.Runner,
) -> int:
    """Generates over cuts that are planned; returns the exit code.

    Args:
        values: The flags.
        where: The gateway.
        ours: The knobs and the opened model.
        layers: Ranges that may run here; none given are all.
        knobs: Of the client.
        asked: Token ids of each prompt, and how to draw.
        show: Shows the tokens of an answer.
        runner: Of the event loop of all that is asked.

    Raises:
        SplitError: A request failed.
        ValueError: Profiles are missing or not of this model, or a request cannot be planned.
        RunError: A request was rejected.
    """
    config, source = ours
    held = tuple(layers) or ((0, source.config.num_layers),)
    model = Model(profile_files.model_name(config.model), source.config)
    ends = profile_files.read(pathlib.Path(values.profiles), model)
    plan_command.judged(values)  # what is wrong is said before anything is loaded
    written = _Report(values.report)

    def tell(token_ids: Sequence[int], one: account.Account) -> None:
        if one.report is not None:
            show(token_ids)
        command_flags.tell(account.text(one))
        written.add(one)

    async def serve() -> int:
        offer = await client_ends.ask(where, ours, knobs)
        policy = plan_command.judged(values, borders=offer.borders, held_layers=held)
        chooser = choosing.Chooser(ends, policy)
        with contextlib.closing(
            client_ends.build_engine(config, source, held, grid=offer.borders[1:-1])
        ) as engine:
            made = client_ends.make_client(where, ours, knobs, engine=engine, layers=held)
            return await _generate(values, made, chooser, asked, tell)

    num_rejected = runner.run(serve())
    if num_rejected:
        raise console.RunError(
            f"{num_rejected} of {len(asked[0])} requests were rejected: no cut meets their "
            "deadlines; give longer ones, or --best_effort"
        )
    return 0


class _Report:
    """The file of --report, if there is one."""

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._write("w", "")

    def add(self, one: account.Account) -> None:
        """One more line."""
        self._write("a", json.dumps(account.as_json(one)) + "\n")

    def _write(self, mode: str, text: str) -> None:
        if self._path is None:
            return
        try:
            with open(self._path, mode, encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise ValueError(
                f"--report={self._path} cannot be written: {error.strerror}"
            ) from error


async def _generate(
    values: absl_flags.FlagValues,
    client: client_lib.SplitClient,
    chooser: choosing.Chooser,
    asked: tuple[Sequence[Sequence[int]], request_lib.SamplingParams],
    tell: Callable[[Sequence[int], account.Account], None],
) -> int:
    """Runs the requests one after the other; returns how many were rejected."""
    prompts, params = asked
    made, num_rejected = planned.PlannedClient(client, chooser), 0
    async with client:
        for prompt_ids in prompts:
            done, one = await made.generate(prompt_ids, params, **plan_command.deadlines(values))
            num_rejected += done is None
            tell(() if done is None else done.token_ids, one)
    return num_rejected
