"""Generates text: `python -m nanoflow_jax.generate --prompt="..."`, or --input and --output.

Exit codes: 0 all rows have an answer (an error row is one), 1 failed while running, 2 wrong flags
or files, 130 interrupted. A batch job that did not finish goes on when it is run again.
"""

import sys
from typing import Any

from absl import flags

from nanoflow_jax import config as config_lib
from nanoflow_jax import console, start_up
from nanoflow_jax import flags as knob_flags
from nanoflow_jax.engine import build
from nanoflow_jax.generate import command_line, prompt
from nanoflow_jax.parallel import peers, processes
from nanoflow_jax.request import SamplingParams


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _run(values: flags.FlagValues, arguments: list[str]) -> int:
    if arguments:
        raise ValueError(f"unknown argument {arguments[0]!r}; flags begin with --")
    config = knob_flags.engine_config(values)
    sampling = command_line.sampling(values)
    given = command_line.prompt(values)
    about = command_line.shared(values)
    with processes.joined(config.processes, about, say=_say) as group:
        if group is not None and not group.is_lead:
            with console.interrupt_flag():  # sent to all, it is process 0 that finishes its steps
                build.follow(config, group, start_up.reports(_say))
            return 0
        if given is None:
            return _run_batch(values, config, sampling, group)
        return _run_prompt(given, SamplingParams(**sampling, seed=values.seed), config, group)


def _run_prompt(
    given: str | list[int],
    params: SamplingParams,
    config: config_lib.EngineConfig,
    group: peers.Group | None,
) -> int:
    speed = prompt.run(
        config, given, params, write=_write, reports=start_up.reports(_say), group=group
    )
    _say(
        f"{speed.prompt_tokens} tokens in, {speed.output_tokens} out, "
        f"{speed.output_tokens / max(speed.seconds, 1e-9):.1f} tokens/s"
    )
    return 0


def _run_batch(
    values: flags.FlagValues,
    config: config_lib.EngineConfig,
    sampling: dict[str, Any],
    group: peers.Group | None,
) -> int:
    # Here and not above: a prompt with random weights must run without grain and templates.
    from nanoflow_jax.generate import batch_run

    return batch_run.run(values, config, sampling, say=_say, group=group)


def main(argv: list[str]) -> int:
    """Runs the program; returns its exit code."""
    code = console.run(lambda: _run(flags.FLAGS, argv[1:]), say=_say, debug=flags.FLAGS.debug)
    return processes.leave(code)


if __name__ == "__main__":
    command_line.define(flags.FLAGS)
    console.start(main)
