"""Writes a result folder while a benchmark runs; what was written survives kill -9."""

import datetime
import gzip
import hashlib
import os
from collections.abc import Mapping
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
    """

    def __init__(self, root: Path, run: Run, *, project: Path = provenance.PROJECT) -> None:
        """Makes the folder.

        Args:
            root: Of all results, such as configs/results.
            run: What will be done.
            project: The checkout whose code runs.

        Raises:
            ValueError: The folder is there already, the name is none of a folder, or there is no
                such kind or kernel.
        """
        run.check()
        self._kind = kinds.find(run.kind)
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        origin = provenance.collect(run.kernels, project=project)
        self._manifest = Manifest(run=run, origin=origin, date=today)
        self._before: Mapping[str, float] | None = None
        self._after: Mapping[str, float] | None = None
        self.path = root / self._manifest.folder
        try:
            self.path.mkdir(parents=True)
        except FileExistsError as error:
            raise ValueError(
                f"{self.path} is there already; give the result another name, or delete it"
            ) from error
        self._manifest = manifest.write(self._manifest, self.path)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._samples: int | None = os.open(self.path / _OPEN_SAMPLES, flags, 0o644)

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
            self.fail(said)

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

    def set_ceilings(
        self,
        *,
        before: Mapping[str, float] | None = None,
        after: Mapping[str, float] | None = None,
    ) -> None:
        """Notes what the device reached at most, before the first sample or after the last."""
        self._before = before if before is not None else self._before
        self._after = after if after is not None else self._after

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


def close(path: Path) -> Manifest:
    """Makes a failed result of a run that was cut off, as by kill -9, with the samples it took.

    Raises:
        ValueError: The run has ended by itself.
        ResultError: The manifest cannot be read.
    """
    found = manifest.read(path)
    if found.status != "running":
        raise ValueError(f"{path}: the run has ended: its status is {found.status}")
    return _seal(path, found, "the run was cut off")


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
