"""What any benchmark of a device does around its measurements: a folder, ceilings, progress."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import jax
import msgspec

from nanoflow_jax import console, meter
from nanoflow_jax.bench import ceilings, device_check
from nanoflow_jax.bench import clock as clock_lib
from nanoflow_jax.results import folder, kind, manifest, writer
from nanoflow_jax.results.writer import ResultWriter

_MOST_FOLDERS = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reports:
    """Whom to tell.

    Attributes:
        say: Takes a line.
        progress: Takes what is done, all there is to do, and how the last one went.
        clock: Seconds.
    """

    say: Callable[[str], None]
    progress: Callable[[int, int, str], None] = lambda done, total, note: None
    clock: Callable[[], float] = time.monotonic


class Measured:
    """A benchmark that measures into a result folder.

    Attributes:
        result: The folder.
    """

    def __init__(
        self,
        result: ResultWriter,
        reports: Reports,
        clock: clock_lib.Clock,
        checked: device_check.Checked,
    ) -> None:
        self.result = result
        self._reports, self._clock, self._checked = reports, clock, checked

    def note(self, line: str) -> None:
        """Says a line and keeps it."""
        self._reports.say(line)
        self.result.add_log(line)

    def finish(self) -> manifest.Manifest:
        """Measures the ceilings again, for which the device's memory must be free, and ends.

        Returns:
            The manifest of the folder.
        """
        if self._checked.ceilings:
            after = ceilings.measure(self._clock)
            self.result.set_ceilings(after=after)
            self.note(device_check.drift_finding(self._checked.ceilings, after).line)
        if self._checked.driver:
            self.result.add_file(manifest.DRIVER, self._checked.driver.encode())
        return self.result.finish()


@contextlib.contextmanager
def begin(
    root: Path, planned: manifest.Run, reports: Reports, clock: clock_lib.Clock
) -> Iterator[Measured]:
    """Looks whether the device is fit, and opens the folder of what is planned.

    A run that was killed is gone on with, if it was to do the same by the same code. One that is
    interrupted keeps its samples and fails.

    Args:
        root: Of all results.
        planned: What will be done; its name gets a number if there is such a result of today.
        reports: Whom to tell.
        clock: To measure with.

    Raises:
        ValueError: There are too many results of today.
    """
    checked = device_check.check(clock)
    with open_result(root, planned, say=reports.say) as result:
        reports.say(f"results: {result.path}")
        made = Measured(result, reports, clock, checked)
        for finding in checked.findings:
            made.note(finding.line)
        result.add_unfit(checked.unfit)
        if checked.ceilings:
            result.set_ceilings(before=checked.ceilings)
        try:
            yield made
        except KeyboardInterrupt:
            result.fail("interrupted")
            raise


def open_result(root: Path, planned: manifest.Run, *, say: Callable[[str], None]) -> ResultWriter:
    """The folder of a run: one that was cut off and can be gone on with, or a new one.

    Args:
        root: Of all results.
        planned: What will be done.
        say: Takes why a run that was cut off is not gone on with.

    Raises:
        ValueError: There are too many results of today.
    """
    for number in range(1, _MOST_FOLDERS):
        name = planned.name if number == 1 else f"{planned.name}-{number}"
        wanted = msgspec.structs.replace(planned, name=name)
        path = writer.folder_of(root, wanted)
        if not path.exists():
            return ResultWriter(root, wanted)
        try:
            if manifest.read(path).status != "running":
                continue
            return ResultWriter(root, wanted, resume=True)
        except ValueError as error:
            say(f"not gone on with: {error}")
    raise ValueError(f"there are {_MOST_FOLDERS} results of today in {root}; move some away")


def conclude(
    result: folder.Result, *, say: Callable[[str], None], on_cpu: str, is_wrong: bool = False
) -> int:
    """Says last what may not be claimed.

    Args:
        result: That has ended.
        say: Takes a line.
        on_cpu: What to say of a run without a GPU.
        is_wrong: Whether something else failed that the result does not know of.

    Returns:
        The exit code: failed if so, or if nothing may be claimed of the result.
    """
    found = result.manifest
    if not kind.is_gpu(found.run):
        say(f"{on_cpu}: these times say nothing about a GPU")
    if found.status != "done":
        say(f"FAILED: nothing may be claimed from {result.path}: {found.message}")
    return console.FAILED if is_wrong or found.status != "done" else 0


def is_on_gpu() -> bool:
    """Whether the default device is one."""
    return jax.devices()[0].platform == "gpu"


class Bar:
    """Shows how much is done, with rate and time left."""

    def __init__(self, stack: contextlib.ExitStack, stream: TextIO, *, unit: str) -> None:
        self._stack, self._stream, self._unit = stack, stream, unit
        self._meter: meter.Meter | None = None

    def __call__(self, done: int, total: int, note: str) -> None:
        """Shows how much is done of all, and how the last one went."""
        if self._meter is None:
            # What was done in a run before this one took no time of this one.
            self._meter = meter.Meter(total, unit=self._unit, stream=self._stream, first=done - 1)
            self._stack.callback(self._meter.close)
        self._meter.update(done, note)
