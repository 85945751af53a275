"""Starts the server as its users do, for tests that speak HTTP to it."""

import contextlib
import dataclasses
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

_ROOT = pathlib.Path(__file__).parents[1]
_START_S = 240.0
_STOP_S = 60.0
# Small programs: a server starts in seconds once the test cache holds them.
SMALL = ("--max_requests=4", "--dense_batch=64", "--max_context_len=256")


@dataclasses.dataclass(eq=False, kw_only=True)
class Served:
    """A running server.

    Attributes:
        process: The front; the engine is its child.
        log_path: What it printed.
    """

    process: subprocess.Popen[bytes]
    log_path: pathlib.Path

    @property
    def log(self) -> str:
        """What it has printed so far."""
        return self.log_path.read_text(encoding="utf-8")

    @property
    def url(self) -> str:
        """Its root, once it is bound and ready."""
        found = re.findall(r"^ready: .* at (http://\S+)$", self.log, flags=re.MULTILINE)
        assert found, self.log
        return str(found[0])

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.url.rsplit(":", 1)[1])

    def wait_ready(self) -> None:
        """Waits until it serves."""
        deadline = time.monotonic() + _START_S
        while "\nready: " not in self.log:
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.05)

    def stop(self) -> int:
        """Ends it as a supervisor does; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=_STOP_S)


def launch(folder: pathlib.Path, *flags: str, **environment: str) -> Served:
    """Starts a server and returns at once.

    Args:
        folder: Of the test: takes the log, and uploaded files unless a flag says otherwise.
        flags: Of the program; the port is a free one.
        environment: Further variables.
    """
    log_path = folder / "server.log"
    cache = os.environ.get("NANOFLOW_TEST_CACHE", "/tmp/nanoflow-test-cache")
    command = [sys.executable, "-m", "nanoflow_jax.serve", "--port=0", f"--data_dir={folder}/data"]
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [*command, f"--compile_cache_dir={cache}", *flags],
            stdout=log,
            stderr=log,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(_ROOT), **environment},
        )
    return Served(process=process, log_path=log_path)


@contextlib.contextmanager
def start(folder: pathlib.Path, *flags: str, **environment: str) -> Iterator[Served]:
    """A server that is ready, and is ended afterwards; see `launch`."""
    served = launch(folder, *flags, **environment)
    try:
        served.wait_ready()
        yield served
    finally:
        if served.process.poll() is None:
            served.process.terminate()
            try:
                served.process.wait(timeout=_STOP_S)
            except subprocess.TimeoutExpired:
                served.process.kill()
                served.process.wait()
