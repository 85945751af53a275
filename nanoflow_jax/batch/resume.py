"""A batch job: every row of the input answered exactly once, whatever kills it on the way.

Without jax and without grain: a server's front process runs jobs too. `job` is the offline door.
"""

import contextlib
import dataclasses
import glob
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from nanoflow_jax.batch import output, record, rows, run, source
from nanoflow_jax.tokenizer import tool_formats

# Of all lines those of process k of n, in order, each with its number.
Lines = Sequence[tuple[int, bytes]] | source.JsonlSource
ShardOf = Callable[[source.JsonlSource, int, int], Lines]

_SHARD = re.compile(r"\.[0-9]+-of-([0-9]+)$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What a job reads and writes.

    Attributes:
        input: JSONL of requests.
        output: JSONL of answers; several processes add their numbers to its name.
        defaults: For what rows leave out.
        accepts: Which rows are served; None for all that are understood.
        process_index: Number of this process, from 0.
        process_count: Processes that share the rows.
        restart: Delete what an earlier run left, and begin again.
    """

    input: Path
    output: Path
    defaults: rows.Defaults
    accepts: rows.Accepts | None = None
    process_index: int = 0
    process_count: int = 1
    restart: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.process_index < self.process_count:
            raise ValueError(
                f"--process_index={self.process_index} is not from 0 to --process_count - 1, "
                f"{self.process_count - 1}"
            )

    @property
    def shard_output(self) -> Path:
        """The file that this process writes."""
        if self.process_count == 1:
            return self.output
        return beside(self.output, f".{self.process_index}-of-{self.process_count}")


@contextlib.contextmanager
def open_job(
    options: Options, *, identify: Callable[[], record.ModelIdentity], shard_of: ShardOf
) -> Iterator["Job"]:
    """Begins a job, or goes on with one, before any weight is read.

    Args:
        options: What to read and write.
        identify: Called once, when input and output are there: which model it is.
        shard_of: Gives a process its lines.

    Raises:
        ValueError: The job cannot begin or go on; the message says what to change.
    """
    path = options.shard_output
    _check_places(options)
    with contextlib.ExitStack() as stack:
        stack.enter_context(output.locked(beside(path, ".lock")))
        lines = stack.enter_context(contextlib.closing(source.JsonlSource(options.input)))
        found = _begin(options, identify(), lines)
        k, n = options.process_index, options.process_count
        is_mine = ~lines.blank_lines()
        is_mine &= np.arange(len(lines)) % n == k
        answers = output.OutputFile(path, job=found.job, is_mine=is_mine)
        stack.enter_context(contextlib.closing(answers))
        yield Job(options, found, lines, answers, is_mine, shard_of(lines, k, n))


def _begin(
    options: Options, model: record.ModelIdentity, lines: source.JsonlSource
) -> record.JobRecord:
    """The record of the job: the one that is there, or a new one, which is then written."""
    identity = record.Identity(
        input=f"{lines.num_bytes} bytes with sha256 {lines.sha256}",
        model=model.model,
        tokenizer=model.tokenizer,
        dtype=model.dtype,
        max_context_len=model.max_context_len,
        sampling=dict(options.defaults.sampling),
        seed=options.defaults.seed,
        shard=f"{options.process_index} of {options.process_count}",
    )
    path = options.shard_output
    place = beside(path, ".job")
    found = record.try_read(place)
    if found is None and path.exists() and path.stat().st_size:
        raise ValueError(
            f"{path} is there and was not written by a batch job (there is no {place.name} beside "
            "it); move it away, or give another --output"
        )
    if found is not None and not options.restart:
        found.check_same(identity, path)
        return found
    # In this order a kill between the two leaves a job that can go on from its beginning.
    path.unlink(missing_ok=True)
    made = record.JobRecord.begin(identity, created=int(time.time()), model_name=model.name)
    made.write(place)
    return made


class Job:
    """A job whose output is locked and whose finished rows are known."""

    def __init__(
        self,
        options: Options,
        job_record: record.JobRecord,
        lines: source.JsonlSource,
        answers: output.OutputFile,
        is_mine: Bool[np.ndarray, "lines"],
        shard: Lines,
    ) -> None:
        self._options = options
        self._record = job_record
        self._lines = lines
        self._answers = answers
        self._shard = shard
        self._num_rows = int(is_mine.sum())
        self._num_before = answers.totals.num_rows
        self._todo = np.flatnonzero(is_mine & ~answers.done)
        self._repeats = source.repeated_ids(lines) if len(self._todo) else {}

    @property
    def path(self) -> Path:
        """The file that holds the answers."""
        return self._answers.path

    @property
    def num_rows(self) -> int:
        """Rows of this process."""
        return self._num_rows

    @property
    def num_done(self) -> int:
        """Rows of this process that are answered."""
        return self._answers.totals.num_rows

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing left to do."""
        return self.num_done == self._num_rows

    def state(self) -> run.State:
        """How far the job is, before a run."""
        return run.State(
            num_rows=self._num_rows,
            num_before=self._num_before,
            totals=self._answers.totals,
            tokens=0,
            seconds=0.0,
        )

    def run(
        self,
        model: run.Model,
        *,
        lookahead: int,
        report: Callable[[run.State], None],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> run.State:
        """Answers the rows that are left.

        Args:
            model: Idle; nobody else feeds it meanwhile.
            lookahead: Choices that are handed to the engine ahead of need. Bounds memory.
            report: Called after every step and every row.
            should_stop: Asked before every step; True ends the run early, with its finished
                rows kept and the others left for a later run.

        Returns:
            The last state.

        Raises:
            OSError: Writing or reading failed, as on a full disk. Finished rows are kept.
        """
        current = run.Run(self._record, self._answers, model, state=self.state(), report=report)
        try:
            current.work(
                self._read_rows(model.tool_style), lookahead=lookahead, should_stop=should_stop
            )
        except Exception:
            current.drop_pending()
            raise
        current.drop_pending()
        self._answers.sync()
        return current.state()

    def _read_rows(self, tool_style: tool_formats.ToolStyle) -> Iterator[rows.Row | rows.BadRow]:
        """The rows that are left, read one at a time when they are needed."""
        k, n = self._options.process_index, self._options.process_count
        # By random access: a job that goes on does not read what is done. Element i of the shard
        # is line k + i n.
        for line in self._todo.tolist():
            number, data = self._shard[(line - k) // n]
            assert number == line, f"the shard has line {number} in the place of {line}"
            yield rows.read(
                line,
                data,
                self._options.defaults,
                repeats=self._repeats.get(line),
                accepts=self._options.accepts,
                tool_style=tool_style,
            )


def beside(path: Path, ending: str) -> Path:
    """A file of a job by the name of its output: `.job` its record, `.lock` its lock."""
    return path.with_name(path.name + ending)


def _check_places(options: Options) -> None:
    """Refuses an output that cannot be one, before anything is written."""
    source.check_plain_file(options.input)
    folder, path = options.output.parent, options.output
    if not folder.is_dir():
        raise ValueError(f"--output={path}: there is no folder {folder}; make it first")
    if path.exists() and not path.is_file():
        raise ValueError(f"--output={path} is not a plain file; give the name of a new one")
    if path.exists() and path.samefile(options.input):
        raise ValueError(f"--output={path} is the input itself; give another file")
    if options.process_count > 1 and beside(path, ".job").exists():
        raise ValueError(
            f"{path} belongs to a job of one process; go on with --process_count=1, or give "
            "another --output"
        )
    for other in folder.glob(f"{glob.escape(path.name)}.*-of-*"):
        found = _SHARD.search(other.name)
        if found is not None and int(found[1]) != options.process_count:
            raise ValueError(
                f"{other} belongs to a job of {found[1]} processes and --process_count is "
                f"{options.process_count}: rows would be answered twice; go on with the same "
                "count, or give another --output"
            )
