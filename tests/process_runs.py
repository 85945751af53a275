"""Several processes of a program that share a model, each with two devices."""

import contextlib
import pathlib
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import batch_runs

# For what needs seconds: it is said when it has not happened, not measured.
LIMIT_S = 240.0


def free_address() -> str:
    """An address of this machine at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"127.0.0.1:{probe.getsockname()[1]}"


def start(folder: pathlib.Path, name: int, *arguments: str) -> "subprocess.Popen[bytes]":
    """A process of `generate`; what it writes is in `out.NAME` and `err.NAME` of the folder."""
    flags = re.sub(r"device_count=\d+", "device_count=2", batch_runs.environment()["XLA_FLAGS"])
    with open(folder / f"out.{name}", "wb") as out, open(said(folder, name), "wb") as err:
        return subprocess.Popen(
            [sys.executable, "-m", "nanoflow_jax.generate", *arguments],
            env=batch_runs.environment(XLA_FLAGS=flags),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
        )


@contextlib.contextmanager
def started(
    folder: pathlib.Path, arguments: Sequence[str], *, second: Sequence[str] = ()
) -> Iterator[list["subprocess.Popen[bytes]"]]:
    """Two of them, the second with further arguments; none is left over."""
    common = (*arguments, f"--coordinator={free_address()}", "--num_processes=2")
    processes = [
        start(folder, i, *common, f"--process_id={i}", *more) for i, more in enumerate(((), second))
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def said(folder: pathlib.Path, name: int) -> pathlib.Path:
    """The file of what a process writes to stderr."""
    return folder / f"err.{name}"


def wait_until(condition: Callable[[], bool], *, tell: Callable[[], str]) -> None:
    """Waits for something that must happen.

    Args:
        condition: Whether it has.
        tell: What to show if it does not.
    """
    until = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < until, tell()
        time.sleep(0.05)
