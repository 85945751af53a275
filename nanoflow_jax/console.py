"""How programs begin and end: flags, an exit code and one message.

What a user can mend never ends in a traceback. Exit codes of every program: 0 done (and --help),
1 failed while it ran, 2 wrong flags or files, 130 interrupted.
"""

import contextlib
import signal
import sys
import traceback
import types
from collections.abc import Callable, Iterator

from absl import app, flags

WRONG_INPUT = 2  # before the work began: flags, files, model
FAILED = 1  # while it ran
INTERRUPTED = 130  # what shells report for Ctrl-C


class RunError(Exception):
    """A program's work failed after it had begun; the message says how to go on."""


def start(main: Callable[[list[str]], int]) -> None:
    """Reads the flags, runs a program, and ends the process with its exit code.

    Args:
        main: Called with the program's name and the arguments that are no flags.
    """
    app.run(main, flags_parser=parse_flags)


def parse_flags(argv: list[str]) -> list[str]:
    """Sets `absl.flags.FLAGS`; ends the process for flags that are wrong, and for --help.

    Returns:
        The arguments that are no flags.
    """
    try:
        return list(flags.FLAGS(argv))
    except flags.Error as error:
        message = str(error).strip().removeprefix("ERROR:: ")  # absl's own, for a flagfile
        sys.stderr.write(f"error: {message}\n--help lists all flags\n")
        sys.exit(WRONG_INPUT)
    except SystemExit:
        sys.exit(0)  # absl has shown the help and would end as if that were an error.


def run(program: Callable[[], int], *, say: Callable[[str], None], debug: bool) -> int:
    """Runs a program and turns errors into messages.

    Args:
        program: Returns its exit code.
        say: Shows a line to the user.
        debug: Show where errors came from.

    Returns:
        The exit code.
    """
    try:
        return program()
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED
    except _expected_errors() as error:
        if debug:
            say("".join(traceback.format_exception(error)).rstrip())
        say(f"error: {_message(error)}")
        is_late = not isinstance(error, ValueError | OSError | MemoryError)
        return FAILED if is_late else WRONG_INPUT


@contextlib.contextmanager
def interrupt_flag() -> Iterator[Callable[[], bool]]:
    """Makes the first Ctrl-C or SIGTERM a question to ask between steps; the next is as ever."""
    asked = False

    def on_signal(number: int, frame: types.FrameType | None) -> None:
        nonlocal asked
        asked = True
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    wanted = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, on_signal) for number in wanted}
    try:
        yield lambda: asked
    finally:
        restore()


def _expected_errors() -> tuple[type[Exception], ...]:
    """What a user can mend. jax is not imported for its own: programs without it start sooner."""
    jax = sys.modules.get("jax")
    of_devices = () if jax is None else (jax.errors.JaxRuntimeError,)
    return (RunError, ValueError, OSError, MemoryError, *of_devices)


def _message(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return f"out of memory {error}".rstrip() + "; use a smaller model or --dtype=bfloat16"
    return f"{error}{_advice(str(error))}"


def _advice(message: str) -> str:
    if "RESOURCE_EXHAUSTED" not in message:  # XLA's word for a device without room
        return ""
    return (
        "\nThe device has too little memory: use --dtype=bfloat16 or a smaller model, or lower "
        "--cache_memory_fraction, --dense_batch or --max_requests"
    )
