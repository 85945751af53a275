"""The folder that a server owns: uploads, batches and their results. One server at a time."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from nanoflow_jax.openai.errors import ApiError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Path]:
    """Makes the folder if need be and holds it alone; kill -9 lets go of it.

    Args:
        path: `--data_dir`.

    Yields:
        The folder, absolute.

    Raises:
        ValueError: It cannot be made or written, or another server has it.
    """
    path = path.absolute()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ValueError(
            f"--data_dir={path} cannot be used ({error}); give a folder that can be written"
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"--data_dir={path} is in use by another server; give each server its own"
            ) from error
        yield path
    finally:
        os.close(descriptor)


def storage_error(error: OSError) -> ApiError:
    """What a client is told when the server's disk refuses; no path is shown."""
    if error.errno in _FULL:
        return ApiError(
            "the server's disk is full; nothing was stored. Delete files that are not needed, or "
            "try again later",
            code="disk_full",
            status_code=507,
        )
    return ApiError(
        f"the server's storage fails ({os.strerror(error.errno or errno.EIO)}); nothing was stored",
        code="storage_unavailable",
        status_code=503,
    )
