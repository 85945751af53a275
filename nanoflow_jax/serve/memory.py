"""How much memory the processes of a server hold."""

import os
import pathlib


def resident_bytes(pid: int) -> int | None:
    """Memory of a process that is in RAM; None where the system does not tell, or it is gone."""
    try:
        pages = pathlib.Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]
    except OSError:
        return None
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def of_server(engine_pid: int | None) -> dict[str, int]:
    """Resident bytes of engine and front, as far as they are known.

    Args:
        engine_pid: None while there is no engine.
    """
    pids = {"engine": engine_pid, "front": os.getpid()}
    found = {name: resident_bytes(pid) for name, pid in pids.items() if pid is not None}
    return {name: value for name, value in found.items() if value is not None}
