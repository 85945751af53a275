"""Shares a model's layers between a client and a server.

`python -m nanoflow_jax.split plan --model=llama-3-8b --client=FILE --server=FILE --link=FILE
    --prompt_len=512 --output_len=128 --ttft_ms=500 --tpot_ms=50 [--plot=FILE.png]`
`python -m nanoflow_jax.split study [--profiles=configs/split]`
`python -m nanoflow_jax.split serve --model=DIR --grid=8,16,24`
`python -m nanoflow_jax.split client --model=DIR --layers=0:8 --prompt="..."`
`python -m nanoflow_jax.split profile --model=DIR --out=profiles`
`python -m nanoflow_jax.split client --model=DIR --profiles=profiles --tpot_ms=50 --prompt="..."`

Each command has flags of its own: `plan --help` lists those of plan.
Exit codes: 0 done, 1 failed while it ran, 2 wrong flags or files, 130 interrupted.
"""

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Protocol

from absl import flags as absl_flags

from nanoflow_jax import console

_FLAGS = absl_flags.FLAGS


class Command(Protocol):
    """A module that is one command."""

    def define(self, values: absl_flags.FlagValues) -> None:
        """Defines its flags."""

    def run(self, values: absl_flags.FlagValues, say: Callable[[str], None]) -> int:
        """Does it; returns the exit code.

        Args:
            values: The flags.
            say: Shows lines of the answer.
        """


# Each loads what it needs alone: planning needs no jax, and a client no gateway.
def _client() -> Command:
    from nanoflow_jax.split import client_command

    return client_command


def _plan() -> Command:
    from nanoflow_jax.split.planning import plan_command

    return plan_command


def _profile() -> Command:
    from nanoflow_jax.split import profile_command

    return profile_command


def _serve() -> Command:
    from nanoflow_jax.split import serve_command

    return serve_command


def _study() -> Command:
    from nanoflow_jax.split.planning import study_command

    return study_command


_COMMANDS: Mapping[str, Callable[[], Command]] = {
    "client": _client,
    "plan": _plan,
    "profile": _profile,
    "serve": _serve,
    "study": _study,
}
# Packages that only the extra `split` installs.
_OF_EXTRA = ("grpc", "google_crc32c")


def command(argv: list[str]) -> Command | None:
    """The command that a program's arguments begin with; None if they name none.

    Raises:
        ValueError: It needs a package that is not here.
    """
    name = argv[1] if len(argv) > 1 else ""
    if name not in _COMMANDS:
        return None
    try:
        return _COMMANDS[name]()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _OF_EXTRA:
            raise
        raise ValueError(
            f"{name} needs the package {error.name}: pip install 'nanoflow_jax[split]', or "
            "pip install -e '.[split]' in a clone"
        ) from None


def _run(arguments: list[str], chosen: Command | None, values: absl_flags.FlagValues) -> int:
    if chosen is None or len(arguments) != 1:
        raise ValueError(
            f"say what to do first: one of {', '.join(_COMMANDS)}; got "
            f"{' '.join(arguments) or 'nothing'}"
        )
    return chosen.run(values, lambda text: print(text, flush=True))


def main(argv: list[str], chosen: Command | None, values: absl_flags.FlagValues) -> int:
    """Runs the program; returns its exit code.

    Args:
        argv: The program's name and the arguments that are no flags.
        chosen: The command, whose flags are set.
        values: The flags.
    """
    return console.run(
        lambda: _run(argv[1:], chosen, values),
        say=_complain,
        debug=False,
    )


def _refuse(error: ValueError) -> int:
    raise error


def _complain(text: str) -> None:
    print(text, file=sys.stderr)


def _start() -> None:
    try:
        chosen = command(sys.argv)
    except ValueError as error:
        sys.exit(console.run(functools.partial(_refuse, error), say=_complain, debug=False))
    if chosen is not None:
        chosen.define(_FLAGS)
    console.start(lambda argv: main(argv, chosen, _FLAGS))


if __name__ == "__main__":
    _start()
