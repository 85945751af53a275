"""Keeps a line that a library writes past Python from standard output."""

import contextlib
import ctypes
import os
import sys
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def without(line: str) -> Iterator[None]:
    """Leaves a line out of all that the process writes to standard output meanwhile.

    Everything else is written when the block ends, however it ends. Libraries in C write to the
    file descriptor and not to `sys.stdout`, and have a buffer of their own.

    Args:
        line: The whole line, without its end.
    """
    sys.stdout.flush()
    c_library = ctypes.CDLL(None)
    c_library.fflush(None)
    kept = os.dup(1)
    with tempfile.TemporaryFile() as meanwhile:
        os.dup2(meanwhile.fileno(), 1)
        try:
            yield
        finally:
            sys.stdout.flush()
            c_library.fflush(None)
            os.dup2(kept, 1)
            os.close(kept)
            meanwhile.seek(0)
            for one in meanwhile.read().splitlines(keepends=True):
                if one.rstrip(b"\r\n") != line.encode():
                    os.write(1, one)
