"""How many connections the system lets this process have."""

import resource

# Beside connections: the listener, the engine, logs, uploads, batches, files of the page.
_OTHERS = 256


def connection_room(wanted: int) -> int:
    """Has the system allow so many connections, or as many as it may; how many that is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + _OTHERS
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY:
        return wanted
    return max(1, min(wanted, soft - _OTHERS))
