"""Writes a result folder while a benchmark runs; what was written survives kill -9."""

import datetime
import fcntl
import gzip
import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from checkpoints import files
from nanoflow_jax.results import checks, folder, kinds, manifest, provenance
from nanoflow_jax.results.figures import Ceilings
from nanoflow_jax.results.kind import Tokens
from nanoflow_jax.results.manifest import Manifest, Run

_OPEN_SAMPLES = "samples.jsonl"  # until the run ends


class ResultWriter:
    """The folder of a run that goes on.

    Used as a context: an exception makes it a failed result and goes on.

        with ResultWriter(root, Run(kind="kernels", name="gemm", ...)) as result:
            result.set_ceilings(before={"copy_bytes_per_s": 3.9e12})
            result.add_sample({"case": "4096", "round": 0, "seconds": 1e-3})
            result.set_ceilings(after={"copy_bytes_per_s": 3.9e12})
            found = result.finish()

    Invariant: every sample that `add_sample` has taken is a whole line of samples.jsonl until
    `finish` or `fail` has made it samples.jsonl.gz.

    Attributes:
        path: The folder.
        origin: The code that runs.
    """

    def __init__(
        self, root: Path, run: Run, *, project: Path = provenance.PROJECT, resume: bool = False
    ) -> None:
        """Makes the folder, or goes on with one.

        Args:
            root: Of all results, such as configs/results.
            run: What will be done.
            project: The checkout whose code runs.
            resume: Go on with the run in this folder, which was cut off, as by kill -9. Its samples
                stay; ceilings are to be set anew.

        Raises:
            ValueError: The folder is there already, the name is none of a folder, or there is no
                such kind or kernel. To go on: the run has ended, still goes on, or was to do
                something else, or by other code.
        """
        run.check()
        self._kind = kinds.find(run.kind)
        self._project = project
        self.origin = provenance.collect(run.kernels, project=project)
        load = round(os.getloadavg()[0], 2)
        self._manifest = Manifest(run=run, origin=self.origin, date=_today(), load=load)
        self._before: Mapping[str, float] | None = None
        self._after: Mapping[str, float] | None = None
        self.path = root / self._manifest.folder
        if resume:
            self._manifest = _same(manifest.read(self.path), self._manifest, self.path)
        else:
            try:
                self.path.mkdir(parents=True)
            except FileExistsError as error:
                raise ValueError(
                    f"{self.path} is there already; give the result another name, or delete it"
                ) from error
            self._manifest = manifest.write(self._manifest, self.path)
        self._samples: int | None = _open_samples(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._manifest.status == "running":
            said = (
                f"{type(error).__name__}: {error}" if error is not None else "it was not finished"
            )
            self.fail(said.removesuffix(": "))

    def add_sample(self, sample: Mapping[str, Any]) -> None:
        """Appends a sample; it is in the file once this returns.

        Args:
            sample: The fields of the kind's sample.

        Raises:
            ValueError: It is not one of that kind, or holds a number that is not finite.
        """
        try:
            line = msgspec.json.encode(sample)
            msgspec.json.decode(line, type=self._kind.sample)  # NaN is written as null
        except (msgspec.MsgspecError, TypeError) as error:
            raise ValueError(f"no sample of kind {self._kind.name}: {error}: {sample}") from error
        assert self._samples is not None, "the run has ended"
        data = memoryview(line + b"\n")
        while data:
            data = data[os.write(self._samples, data) :]

    def samples(self) -> tuple[Any, ...]:
        """All samples so far, of the kind's type, those from before it was cut off among them."""
        lines = manifest.read_bytes(self.path / _OPEN_SAMPLES).splitlines()
        return tuple(
            manifest.decode(line, self._kind.sample, path=self.path / _OPEN_SAMPLES)
            for line in lines
        )

    def set_ceilings(
        self,
        *,
        before: Mapping[str, float] | None = None,
        after: Mapping[str, float] | None = None,
    ) -> None:
        """Notes what the device reached at most, before the first sample or after the last."""
        self._before = before if before is not None else self._before
        self._after = after if after is not None else self._after

    def add_unfit(self, found: Iterable[str]) -> None:
        """Notes that somebody looked whether the device is fit to be measured.

        It is in the manifest once this returns, and stays there if the run is killed and gone on
        with: samples from before were taken on the device as it was.

        Args:
            found: What makes it unfit; empty if nothing.
        """
        unfit = tuple(dict.fromkeys((*(self._manifest.unfit or ()), *found)))
        self._manifest = msgspec.structs.replace(self._manifest, unfit=unfit)
        manifest.write(self._manifest, self.path)

    def set_plan(self, plan: Mapping[str, Any], *, kernels: Iterable[str] = ()) -> None:
        """Notes what is run, where it is known only once an engine has been built.

        Args:
            plan: As in `Run`.
            kernels: Modules of pallas_kernels that are used beside those of the `Run`.

        Raises:
            ValueError: There is no such kernel.
        """
        run = self._manifest.run
        used = tuple(sorted({*run.kernels, *kernels}))
        sources = provenance.kernel_sources(used, project=self._project)
        self.origin = msgspec.structs.replace(self.origin, kernel_sources=sources)
        run = msgspec.structs.replace(run, plan=dict(plan), kernels=used)
        self._manifest = msgspec.structs.replace(self._manifest, run=run, origin=self.origin)

    def add_log(self, text: str) -> None:
        """Appends a line to log.txt; it is in the file once this returns."""
        with open(self.path / manifest.LOG, "a", encoding="utf-8") as log:
            log.write(f"{text}\n")

    def add_file(self, name: str, data: bytes) -> None:
        """Adds one of `manifest.FILES`, whole; not the samples.

        Raises:
            ValueError: A result has no file of that name.
        """
        allowed = [known for known in manifest.FILES if known != manifest.SAMPLES]
        if name not in allowed:
            raise ValueError(f"a result has no file {name!r} to add; it has {', '.join(allowed)}")
        files.write_atomic(self.path / name, data)

    def set_tokens(self, tokens: Tokens) -> None:
        """Adds tokens.json."""
        self.add_file(manifest.TOKENS, msgspec.json.format(msgspec.json.encode(tokens)) + b"\n")

    def finish(self) -> Manifest:
        """Ends the run, and works out what it comes to.

        Returns:
            The manifest: its figures, or status "failed" and why nothing may be claimed.
        """
        return self._end(None)

    def fail(self, message: str) -> Manifest:
        """Ends a run that failed; what it has measured is kept.

        Args:
            message: Why.
        """
        return self._end(message)

    def _end(self, message: str | None) -> Manifest:
        if self._samples is not None:
            os.close(self._samples)
            self._samples = None
        found = self._manifest
        if self._before is not None or self._after is not None:
            ceilings = Ceilings(before=dict(self._before or {}), after=dict(self._after or {}))
            found = msgspec.structs.replace(found, ceilings=ceilings)
        self._manifest = _seal(self.path, found, message)
        return self._manifest


def folder_of(root: Path, run: Run) -> Path:
    """Where the result of a run that begins today lies."""
    return root / run.device.folder / f"{_today()}-{run.name}"


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def _same(found: Manifest, wanted: Manifest, path: Path) -> Manifest:
    """The manifest of a run to go on with, if that is what is wanted; commands may differ."""
    if found.status != "running":
        raise ValueError(f"{path}: the run has ended: its status is {found.status}")
    # As JSON has them, in which tuples are lists.
    sides = [
        msgspec.json.decode(msgspec.json.encode(one.run))
        | msgspec.json.decode(msgspec.json.encode(one.origin))
        for one in (found, wanted)
    ]
    changed = [name for name in sides[0] if sides[0][name] != sides[1][name]]
    if changed := sorted(set(changed) - {"command"}):
        raise ValueError(f"{path}: the run that was cut off had other {', '.join(changed)}")
    return found


def _open_samples(path: Path) -> int:
    """The samples to append to, without what a kill has left half written."""
    file = os.open(path / _OPEN_SAMPLES, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(file)
        raise ValueError(f"{path}: another process is measuring into it") from error
    text = (path / _OPEN_SAMPLES).read_bytes()
    os.ftruncate(file, text.rfind(b"\n") + 1)
    return file


def close(path: Path) -> Manifest:
    """Makes a failed result of a run that was cut off, as by kill -9, with the samples it took.

    Raises:
        ValueError: The run has ended by itself, or still goes on.
        ResultError: The manifest cannot be read.
    """
    found = manifest.read(path)
    if found.status != "running":
        raise ValueError(f"{path}: the run has ended: its status is {found.status}")
    samples = _open_samples(path)
    try:
        return _seal(path, found, "the run was cut off")
    finally:
        os.close(samples)


def _seal(path: Path, found: Manifest, message: str | None) -> Manifest:
    """Compresses the samples, and notes hashes, figures and status in the manifest."""
    kind = kinds.find(found.run.kind)
    samples = _compress(path)
    there = sorted(file.name for file in path.iterdir() if file.name in manifest.FILES)
    digests = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in there}
    found = msgspec.structs.replace(found, files=digests, num_samples=samples)
    if message is None:
        result = folder.read_as(path, found)
        wrong = [*checks.complaints(kind, result.evidence, result.tokens)]
        wrong += [f"{name} is missing" for name in sorted(kind.files(found.run) - set(digests))]
        if not wrong:
            figures = checks.derive(kind, result.evidence)
            found = msgspec.structs.replace(found, status="done", figures=figures)
        message = "; ".join(wrong)
    if found.status != "done":
        found = msgspec.structs.replace(found, status="failed", message=message)
    written = manifest.write(found, path)
    (path / _OPEN_SAMPLES).unlink(missing_ok=True)
    return written


def _compress(path: Path) -> int:
    """Makes samples.jsonl.gz of the whole lines of samples.jsonl; returns how many there are."""
    text = manifest.read_bytes(path / _OPEN_SAMPLES)
    whole = text[: text.rfind(b"\n") + 1]  # a kill may have cut the last line
    files.write_atomic(path / manifest.SAMPLES, gzip.compress(whole, mtime=0))
    return whole.count(b"\n")
