"""A batch job as the command line runs it: messages, progress, signals."""

import contextlib
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from absl import flags

from nanoflow_jax import config as config_lib
from nanoflow_jax import console, llm, meter, start_up
from nanoflow_jax.batch import job, resume, rows
from nanoflow_jax.batch import run as run_lib
from nanoflow_jax.engine import build
from nanoflow_jax.generate import command_line
from nanoflow_jax.parallel import peers

# Requests that wait while others run, as a multiple of those: the next is always at hand.
_LOOKAHEAD = 2


def run(
    values: flags.FlagValues,
    config: config_lib.EngineConfig,
    sampling: dict[str, Any],
    *,
    say: Callable[[str], None],
    stream: TextIO | None = None,
    group: peers.Group | None = None,
) -> int:
    """Runs the job that the flags describe.

    Args:
        values: The flags.
        config: The engine's knobs.
        sampling: Defaults of rows that do not say.
        say: Shows a line.
        stream: Where progress is shown; stderr if not given.
        group: The processes that share the model, if there are several.

    Returns:
        The exit code.

    Raises:
        ValueError: The job cannot begin.
        RunError: It failed while it ran.
    """
    options = resume.Options(
        input=command_line.input_path(values.input),
        output=pathlib.Path(values.output),
        defaults=rows.Defaults(sampling=sampling, seed=values.seed),
        process_index=values.process_index,
        process_count=values.process_count,
        restart=values.restart,
    )
    with _open(options, config) as opened:
        if opened.num_done:
            say(f"{opened.path}: {opened.num_done} of {opened.num_rows} rows are there already")
        if opened.is_finished:
            say(f"{_summary(opened.state())}; nothing is left to do (--restart begins again)")
            return 0
        state = _answer(opened, config, say, stream or sys.stderr, group)
        say(_summary(state))
        if state.other_model is not None:
            say(
                f"note: rows name other models, such as {state.other_model!r}; all were answered "
                "by the model of this job"
            )
        if not opened.is_finished:
            say(
                f"interrupted: {opened.num_done} of {opened.num_rows} rows are in {opened.path}; "
                "run the same command again to go on"
            )
            return console.INTERRUPTED
        say(f"answers are in {opened.path}")
    return 0


@contextlib.contextmanager
def _open(options: resume.Options, config: config_lib.EngineConfig) -> Iterator[resume.Job]:
    with contextlib.ExitStack() as stack:
        try:
            opened = stack.enter_context(job.open_job(options, config.model))
        except OSError as error:
            raise ValueError(_trouble(options, error)) from error
        yield opened


def _trouble(options: resume.Options, error: OSError) -> str:
    """What kept a job from being opened; a full disk, unlike a missing folder, names no file."""
    place = pathlib.Path(error.filename or options.shard_output)
    if place == options.input or options.output.parent not in (place, place.parent):
        return f"{place} cannot be read ({error.strerror}); check its permissions and the disk"
    return (
        f"--output={options.output}: {place} cannot be used ({error.strerror}); mend that, or give "
        "another --output"
    )


def _answer(
    opened: resume.Job,
    config: config_lib.EngineConfig,
    say: Callable[[str], None],
    stream: TextIO,
    group: peers.Group | None,
) -> run_lib.State:
    chosen: list[build.Settings] = []
    reports = start_up.reports(say, also_settings=chosen.append)
    with (
        llm.LLM.from_config(config, reports, group) as model,
        console.interrupt_flag() as should_stop,
    ):
        shown = meter.Meter(opened.num_rows, unit="row", stream=stream, first=opened.num_done)
        try:
            return opened.run(
                model,
                lookahead=_LOOKAHEAD * chosen[0].max_requests,
                report=lambda state: shown.update(
                    state.totals.num_rows, f"{state.tokens_per_s:.1f} tokens/s"
                ),
                should_stop=should_stop,
            )
        except (OSError, MemoryError) as error:
            raise console.RunError(
                f"{opened.path}: {error or 'out of memory'}; {opened.num_done} of "
                f"{opened.num_rows} rows are done and kept. Mend that (make room, if the disk is "
                "full) and run the same command again to go on"
            ) from error
        finally:
            shown.close()


def _summary(state: run_lib.State) -> str:
    totals = state.totals
    text = (
        f"rows: {totals.num_ok} ok, {totals.num_failed} failed; "
        f"tokens: {totals.prompt_tokens} in, {totals.output_tokens} out"
    )
    if state.num_before and totals.num_rows > state.num_before:
        text += f" ({totals.num_rows - state.num_before} rows in this run)"
    if state.tokens:
        text += f"; {state.tokens_per_s:.1f} tokens/s in {state.seconds:.1f} s, not counting start"
    return text
