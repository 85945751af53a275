"""Records some steps of an engine for xprof, once, after the steps that warm it up.

Events of a trace name operations of compiled programs; the trace holds the programs too, in which
each operation has the scope that it came from: `layer_0/norm_kqv.0/...`, the plan's own names.
"""

import contextlib
import logging
import math
from collections.abc import Iterator

import jax

from nanoflow_jax import config as config_lib

_LOG = logging.getLogger(__name__)


@contextlib.contextmanager
def programs_that_traces_know(is_wanted: bool) -> Iterator[None]:
    """Where a trace is wanted, compiles what is compiled inside anew.

    jax's cache gives any program that computes the same, with the names of whoever made it; and a
    trace describes it by another number than the one in its events.
    """
    if not is_wanted:
        yield
        return
    # Keys with names are nobody else's, and nothing is kept under them.
    chosen = {
        "jax_compilation_cache_include_metadata_in_key": True,
        "jax_persistent_cache_min_compile_time_secs": math.inf,
    }
    before = {name: getattr(jax.config, name) for name in chosen}
    for name, value in chosen.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


class StepTrace:
    """The trace that the knobs ask for.

    Invariant: jax records, if nobody else made it, from `begin` to `end` and at no other time.
    """

    def __init__(self, section: config_lib.ProfileSection) -> None:
        self._folder = section.dir
        self._first, self._end = section.after, section.after + section.steps
        self._is_recording = False
        self._is_done = not section.steps

    def is_due(self, num_steps: int) -> bool:
        """Whether it begins or ends now, with so many steps launched: none may be under way."""
        return not self._is_done and num_steps >= self._border

    @property
    def _border(self) -> int:
        return self._end if self._is_recording else self._first

    def turn(self) -> None:
        """Begins or ends it, whichever comes next; a trace that is not to be had is logged."""
        try:
            if self._is_recording:
                self._stop()
            else:
                self._start()
        except (RuntimeError, OSError) as error:  # somebody else records, or the disk is full
            _LOG.error("--profile_steps: no trace in %s: %s", self._folder, error)
            self._is_recording, self._is_done = False, True

    def _start(self) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # calls of Python would be most of the trace
        jax.profiler.start_trace(self._folder, profiler_options=options)
        self._is_recording = True

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._is_recording, self._is_done = False, True
        _LOG.warning("a trace of steps %d to %d is in %s", self._first, self._end, self._folder)

    def close(self) -> None:
        """Writes what was recorded of an engine that ends before its time."""
        if self._is_recording:
            self.turn()
        elif not self._is_done:
            _LOG.warning(
                "--profile_steps: no more than %d steps ran, after which a trace was to begin; "
                "lower --profile_after",
                self._first,
            )
        self._is_done = True
