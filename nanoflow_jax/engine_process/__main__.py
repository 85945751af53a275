"""The engine's process; only the front starts it: `python -m nanoflow_jax.engine_process FD`."""

import signal
import socket
import sys

from nanoflow_jax.engine_process import worker


def main() -> int:
    """Runs the engine on the socket whose descriptor is the only argument."""
    # Ctrl-C goes to all processes of a terminal; the front decides when the engine ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return worker.run(socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    sys.exit(main())
