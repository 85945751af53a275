"""Processes whose devices one program runs on: jax is told of the others, and of their end."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping

import jax

from nanoflow_jax.config import ProcessesSection
from nanoflow_jax.parallel import peers

# Longer than `peers` waits, whose message is the better one.
_HEARTBEAT_S = 100
_SHUTDOWN_S = 30


@contextlib.contextmanager
def joined(
    section: ProcessesSection, about: Mapping[str, str], *, say: Callable[[str], None]
) -> Iterator[peers.Group | None]:
    """Shares devices with other processes inside; to be entered before jax has any.

    Args:
        section: The knobs.
        about: What must be the same for all processes, by name.
        say: Shows a line.

    Returns:
        The processes; None for one by itself.

    Raises:
        ValueError: See `peers.join`.
        RunError: See `peers.join`.
    """
    if section.num_processes == 1:
        yield None
        return
    group = peers.join(section, {"jax": jax.__version__, **about}, say=say)
    try:
        with _own_stdout():
            _tell_jax(section, group.port)
            yield group
    except BaseException as error:
        group.fail(str(error) or type(error).__name__)
        raise
    group.part()
    jax.distributed.shutdown()
    group.close()


@contextlib.contextmanager
def _own_stdout() -> Iterator[None]:
    """Keeps stdout for what Python writes: gloo, by which CPUs add up, tells there what it does."""
    before = sys.stdout
    before.flush()
    real = os.dup(1)
    os.dup2(2, 1)
    try:
        with open(os.dup(real), "w", encoding=before.encoding, errors=before.errors) as sys.stdout:
            yield
    finally:
        sys.stdout = before
        os.dup2(real, 1)
        os.close(real)


def leave(code: int) -> int:
    """Ends this process at once if it failed among others; otherwise gives back its exit code.

    At a usual end jax would wait for all processes, of which some are gone.
    """
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _tell_jax(section: ProcessesSection, port: int) -> None:
    host = section.address[0]
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    jax.distributed.initialize(
        coordinator_address=address,
        # By default it would listen at every address of the machine.
        coordinator_bind_address=address,
        num_processes=section.num_processes,
        process_id=section.process_id,
        cluster_detection_method="deactivate",
        heartbeat_timeout_seconds=_HEARTBEAT_S,
        shutdown_timeout_seconds=_SHUTDOWN_S,
    )
