"""How long each operation of the layers takes while a mode runs, from a trace of its steps."""

import contextlib
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jax

from nanoflow_jax.bench import steady_state, xplane
from nanoflow_jax.bench.ablation_device import Stage
from nanoflow_jax.bench.ablation_programs import Programs

_OPERATION = re.compile(r"\blayer_\d+/(\w+)\.\d+(?=/|$)")
_NS_PER_S = 1e9


class TraceError(Exception):
    """A trace that is not to be had, and why: somebody else makes one, or the disk is full."""


def operation_seconds(
    stage: Stage, programs: Programs, mode: str, steps: Sequence[steady_state.Step]
) -> dict[str, float]:
    """Seconds of a step in which each operation ran.

    Args:
        stage: The device.
        programs: Compiled ones, where `engine.step_trace` has traces know them.
        mode: Which of them.
        steps: What to run and trace.

    Raises:
        TraceError: There is no trace to be had.
    """
    with tempfile.TemporaryDirectory() as folder:
        with _tracing(folder):
            stage.run(programs, mode, steps)
        busy = busy_seconds(xplane.read(Path(folder)))
    return {name: seconds / len(steps) for name, seconds in busy.items()}


@contextlib.contextmanager
def _tracing(folder: str) -> Iterator[None]:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with _telling():
        jax.profiler.start_trace(folder, profiler_options=options)
    try:
        yield
    finally:
        with _telling():
            jax.profiler.stop_trace()


@contextlib.contextmanager
def _telling() -> Iterator[None]:
    """Tells errors of the profiler from those of what it watches."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        raise TraceError(str(error)) from error


def busy_seconds(events: Iterable[xplane.Event]) -> dict[str, float]:
    """Seconds in which each operation of the layers ran, in any layer or nano-batch of them.

    What runs at once counts once, so that neither threads nor events inside each other do twice.
    What several operations share, such as a kernel that is attention and a product, has the names
    of all of them, with `+` between.
    """
    spans: dict[str, list[tuple[float, float]]] = {}
    for event in events:
        if names := _OPERATION.findall(event.scope):
            spans.setdefault("+".join(names), []).append((event.start_ns, event.end_ns))
    return {name: _union(found) / _NS_PER_S for name, found in spans.items()}


def _union(spans: Iterable[tuple[float, float]]) -> float:
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
