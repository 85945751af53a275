"""How programs end: an exit code and one message, never a traceback for what a user can mend."""

import traceback
from collections.abc import Callable

import jax

WRONG_INPUT = 2  # before the work began: flags, files, model
FAILED = 1  # while it ran
INTERRUPTED = 130  # what shells report for Ctrl-C


class RunError(Exception):
    """A program's work failed after it had begun; the message says how to go on."""


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
    except MemoryError as error:
        message, code, cause = f"out of memory {error}".rstrip(), WRONG_INPUT, error
    except RunError as error:
        message, code, cause = str(error), FAILED, error
    except (ValueError, OSError) as error:
        message, code, cause = str(error), WRONG_INPUT, error
    except jax.errors.JaxRuntimeError as error:
        message, code, cause = f"{error}{_advice(str(error))}", FAILED, error
    if debug:
        say("".join(traceback.format_exception(cause)).rstrip())
    say(f"error: {message}")
    return code


def _advice(message: str) -> str:
    if "RESOURCE_EXHAUSTED" not in message:
        return ""
    return (
        "\nThe device has too little memory: use --dtype=bfloat16 or a smaller model, or lower "
        "--cache_memory_fraction, --dense_batch or --max_requests"
    )
