"""Converts a model in child processes that are killed, the last one excepted.

    python killed_conversion.py STORE SOURCE OUTPUT PART_BYTES POINT...

STORE is the module whose `convert` is run. A POINT is N@TEXT, for kill -9 just before the N-th
change (from 0) that the child makes to a path under OUTPUT with TEXT in it, or a number, for kill
-9 after that many seconds. Prints a line "begun BYTES" for each child that came to copying, with
the bytes already copied before it, and "killed" or "finished" for each child.
"""

import importlib
import itertools
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from types import ModuleType

from checkpoints.folder import ModelFolder

_CHANGES = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")


def _kill_at_change(output: Path, point: str) -> None:
    """Kill this process before the Python code in it makes the change that the point says."""
    number, _, text = point.partition("@")
    seen = itertools.count()

    def hook(event: str, args: tuple[object, ...]) -> None:
        if event not in _CHANGES or (event == "open" and args[1] in (None, "r", "rb")):
            return
        path = str(args[0]) if isinstance(args[0], str | os.PathLike) else ""
        if path.startswith(str(output)) and text in path and next(seen) == int(number):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _convert(store: ModuleType, source: Path, output: Path, part_bytes: int, point: str) -> None:
    begun: list[int] = []

    def progress(done: int, total: int) -> None:
        if not begun:
            begun.append(done)
            os.write(1, f"begun {done}\n".encode())

    if "@" in point:
        _kill_at_change(output, point)
    store.convert(ModelFolder.open(source), output, progress=progress, part_bytes=part_bytes)


def main() -> None:
    """Fork a child for each point, since importing takes longer than converting."""
    store = importlib.import_module(sys.argv[1])
    source, output, part_bytes = Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    warnings.simplefilter("ignore")  # JAX warns of forks; nothing has used it here yet.
    for point in [*sys.argv[5:], ""]:
        child = os.fork()
        if child == 0:
            _convert(store, source, output, part_bytes, point)
            os._exit(0)
        if point and "@" not in point:
            time.sleep(float(point))
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code not in (0, -signal.SIGKILL):
            sys.exit(f"the child that was to be killed at {point!r} failed: {code}")
        os.write(1, b"killed\n" if code else b"finished\n")


if __name__ == "__main__":
    main()
