"""Takes other plans while an engine runs: read again, compiled beside the steps, then taken over.

Between two steps only the forwards of some buckets change hands, with what the host writes for
them: pages, tokens and programs that draw know nothing of plans.
"""

import logging
import threading
from collections.abc import Callable
from pathlib import Path

import jax

from nanoflow_jax import config as config_lib
from nanoflow_jax.engine import inputs, runner, step_choice

_LOG = logging.getLogger(__name__)
_PERIOD_S = 1.0


class WatchedFile:
    """A file that is looked at now and then.

    Invariant: what was last seen is remembered; a file that cannot be looked at has not changed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen = self._look()

    def _look(self) -> tuple[int, int, int] | None:
        try:
            found = self.path.stat()
        except OSError:  # between two files of that name
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def has_changed(self) -> bool:
        """Whether it is another than when this was asked last, or when this was made."""
        found = self._look()
        if found is None or found == self._seen:
            return False
        self._seen = found
        return True


def watched(config: config_lib.EngineConfig) -> WatchedFile | None:
    """The file of plans that is to be read again when it changes; None if none is.

    Raises:
        ValueError: There is none to watch, or several processes would have to agree when.
    """
    section, count = config.plans, config.processes.num_processes
    if not section.plan_watch:
        return None
    if count > 1:
        raise ValueError(
            f"--plan_watch takes other plans in one process, and --num_processes={count}; leave it "
            "out, and start all of them again for other plans"
        )
    if section.plan in config_lib.NAMED_PLANS:
        raise ValueError(
            f"--plan_watch reads a file of plans again, and --plan={section.plan} is none; "
            "name a file, or leave --plan_watch out"
        )
    return WatchedFile(Path(section.plan))


class PlanSwap:
    """Hands an engine the plans of a file whenever it has changed.

    A file that is refused changes nothing: what is wrong with it is logged as an error.

    Invariant: the forwards of the runner belong to the plans that `turn` handed out last.
    """

    def __init__(
        self,
        file: WatchedFile,
        step_runner: runner.Runner,
        *,
        choose: Callable[[], step_choice.Chosen],
        period_s: float = _PERIOD_S,
    ) -> None:
        """Starts to watch.

        Args:
            file: As it was before the plans that run were read.
            step_runner: That runs them.
            choose: Reads the file; ValueError if what it says cannot run with what was loaded.
            period_s: Between two looks at the file.
        """
        self._file, self._runner = file, step_runner
        self._choose = choose
        self._period_s = period_s
        self._ready: runner.Forwards | None = None
        self._lock, self._ends = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="plans", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ends.wait(self._period_s):
            if self._file.has_changed():
                self._prepare()

    def _prepare(self) -> None:
        path = self._file.path
        try:
            chosen = self._choose()
            _LOG.warning("%s has changed; its plans are compiled beside the steps", path)
            with self._lock:  # it is compared with what runs, which must not change meanwhile
                self._ready = None
            forwards = self._runner.compile_forwards(
                chosen.plans, chosen.ways, gives_up=self._ends.is_set
            )
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            _LOG.error("the plans that run are kept: %s", error)
            return
        with self._lock:
            self._ready = forwards

    def turn(self, builder: inputs.StepBuilder) -> inputs.StepBuilder:
        """What writes the inputs of the next step: another one where other plans are ready.

        Args:
            builder: Of the last step.
        """
        with self._lock:
            forwards, self._ready = self._ready, None
        if forwards is None:
            return builder
        assert isinstance(builder, inputs.InputBuilder), "segments keep their plans"
        self._runner.take(forwards)
        _LOG.warning(
            "plans of %s run from now on: %s",
            self._file.path,
            ", ".join(f"{bucket} by {plan.name}" for bucket, plan in forwards.plans.items()),
        )
        return builder.with_sizes(forwards.sizes)

    def close(self) -> None:
        """Ends the watch; a program that is being compiled is waited for."""
        self._ends.set()
        self._thread.join()
