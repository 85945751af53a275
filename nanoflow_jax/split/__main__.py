"""Shares a model's layers between a client and a server.

`python -m nanoflow_jax.split plan --model=llama-3-8b --client=FILE --server=FILE --link=FILE
    --prompt_len=512 --output_len=128 --ttft_ms=500 --tpot_ms=50 [--plot=FILE.svg]`

Each command has flags of its own: `plan --help` lists those of plan.
Exit codes: 0 done, 1 failed while it ran, 2 wrong flags or files, 130 interrupted.
"""

import importlib
import sys
from collections.abc import Mapping
from typing import Protocol

from absl import flags as absl_flags

from nanoflow_jax import console

_FLAGS = absl_flags.FLAGS


class Command(Protocol):
    """A module that is one command."""

    def define(self, values: absl_flags.FlagValues) -> None:
        """Defines its flags."""

    def run(self, values: absl_flags.FlagValues) -> int:
        """Does it; returns the exit code."""


# By name, so that a command loads what it needs alone: planning needs no jax.
_COMMANDS: Mapping[str, str] = {
    "plan": "nanoflow_jax.split.planning.plan_command",
}


def command(argv: list[str]) -> Command | None:
    """The command that a program's arguments begin with; None if they name none."""
    name = argv[1] if len(argv) > 1 else ""
    if name not in _COMMANDS:
        return None
    found: Command = importlib.import_module(_COMMANDS[name])
    return found


def _run(arguments: list[str], chosen: Command | None, values: absl_flags.FlagValues) -> int:
    if chosen is None or len(arguments) != 1:
        raise ValueError(
            f"say what to do first: one of {', '.join(_COMMANDS)}; got "
            f"{' '.join(arguments) or 'nothing'}"
        )
    return chosen.run(values)


def main(argv: list[str], chosen: Command | None, values: absl_flags.FlagValues) -> int:
    """Runs the program; returns its exit code.

    Args:
        argv: The program's name and the arguments that are no flags.
        chosen: The command, whose flags are set.
        values: The flags.
    """
    return console.run(
        lambda: _run(argv[1:], chosen, values),
        say=lambda text: print(text, file=sys.stderr),
        debug=False,
    )


def _start() -> None:
    chosen = command(sys.argv)
    if chosen is not None:
        chosen.define(_FLAGS)
    console.start(lambda argv: main(argv, chosen, _FLAGS))


if __name__ == "__main__":
    _start()
