"""manifest.json: what was run, where, with what, and what came of it."""

import datetime
import hashlib
import re
from pathlib import Path
from typing import Any, Literal

import msgspec

from checkpoints import files
from nanoflow_jax.results.figures import Ceilings, Figure

FORMAT = 1
MANIFEST = "manifest.json"
SAMPLES = "samples.jsonl.gz"
TOKENS = "tokens.json"
CURVES = "curves.svg"
LOG = "log.txt"
DRIVER = "smi.csv"
# All that a folder may hold besides the manifest; no kind has all of them.
FILES = (
    SAMPLES,
    "kernels.csv.gz",
    "ctas.npz",
    "program.tar.gz",
    DRIVER,
    TOKENS,
    CURVES,
    LOG,
)
_NAME = re.compile(r"[a-z0-9]+([-_.][a-z0-9]+)*")


class ResultError(ValueError):
    """A result folder that cannot be read; the message names the file."""


class Device(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was measured.

    Attributes:
        platform: "cpu" or "gpu", as jax says.
        name: Of the product, such as "NVIDIA H200".
        count: How many of them, or how many cores of a CPU.
    """

    platform: Literal["cpu", "gpu"]
    name: str
    count: int = 1

    @property
    def folder(self) -> str:
        """Its name as a folder's: `nvidia-h200`, `cpu-amd-epyc-x2`."""
        plain = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        prefix = "cpu-" if self.platform == "cpu" else ""
        return f"{prefix}{plain}" + (f"-x{self.count}" if self.count > 1 else "")


class Run(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a benchmark sets out to do.

    Attributes:
        kind: One of `kinds.KINDS`: which files and samples there are, and what they come to.
        name: Of the measurement; the same again on another day repeats it.
        device: What is measured.
        command: The command line.
        seed: Of inputs, weights and caches.
        num_samples: How many samples will be taken; None if it is not known before.
        model: Its shape.
        plan: What is run on it: buckets, nano-batches, caps.
        setting: All else that the figures depend on.
        compiler_options: Given to XLA beside the environment's XLA_FLAGS.
        kernels: Modules of pallas_kernels that are used, such as "gemm".
        measured_by: Who measured, if it was not this project.
    """

    kind: str
    name: str
    device: Device
    command: tuple[str, ...]
    seed: int | None = None
    num_samples: int | None = None
    model: dict[str, Any] = {}
    plan: dict[str, Any] = {}
    setting: dict[str, Any] = {}
    compiler_options: dict[str, Any] = {}
    kernels: tuple[str, ...] = ()
    measured_by: str | None = None

    def check(self) -> None:
        """Refuses a name that is not one of a folder.

        Raises:
            ValueError: The name has other characters than a-z, 0-9 and single - _ . between them.
        """
        if _NAME.fullmatch(self.name) is None:
            raise ValueError(
                f"a result's name has letters a-z, digits and single - _ . between them, got "
                f"{self.name!r}"
            )


class Origin(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the code was that ran.

    Attributes:
        commit: Of the checkout; None if there was none.
        is_clean: Whether the tree had no change beside it, results apart.
        kernel_sources: SHA-256 of every file of pallas_kernels that was used, by path.
        versions: Of Python, packages and the driver.
        environment: Variables that jax and XLA read.
    """

    commit: str | None
    is_clean: bool
    kernel_sources: dict[str, str]
    versions: dict[str, str]
    environment: dict[str, str]


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of manifest.json.

    Attributes:
        run: What was to be done.
        origin: By which code.
        date: Day of its beginning, in UTC, as YYYY-MM-DD.
        load: Programs that wanted a processor, on average over the minute before; above the number
            of cores the machine was busy with other things. None if it was not noted.
        status: "running" until the run has ended, by itself or with a message.
        message: Why it failed; empty if it did not.
        num_samples: How many were taken.
        ceilings: None if none were measured.
        unfit: What was found of the device that makes it unfit to be measured; None if nobody
            looked.
        figures: What the samples come to; none of a failed run.
        files: SHA-256 of every other file, by name.
        format: Of this file.
        digest: SHA-256 of this file with this entry empty.
    """

    run: Run
    origin: Origin
    date: str
    load: float | None = None
    status: Literal["running", "done", "failed"] = "running"
    message: str = ""
    num_samples: int = 0
    ceilings: Ceilings | None = None
    unfit: tuple[str, ...] | None = None
    figures: tuple[Figure, ...] = ()
    files: dict[str, str] = {}
    format: int = FORMAT
    digest: str = ""

    def check(self) -> None:
        """Refuses a name that is not one of a folder, and a date that is no day.

        Raises:
            ValueError: As `Run.check` does; or the date is not of the form YYYY-MM-DD.
        """
        self.run.check()
        try:
            day = datetime.date.fromisoformat(self.date).isoformat()
        except ValueError:
            day = ""
        if day != self.date:
            raise ValueError(f"the date {self.date!r} is no day of the form YYYY-MM-DD")

    @property
    def folder(self) -> Path:
        """Where it lies under the root of all results."""
        return Path(self.run.device.folder) / f"{self.date}-{self.run.name}"


def write(manifest: Manifest, folder: Path) -> Manifest:
    """Writes manifest.json, whole or not at all; returns it as it will be read."""
    files.write_atomic(folder / MANIFEST, encode(manifest))
    return read(folder)


def read(folder: Path) -> Manifest:
    """The manifest of a folder.

    Raises:
        ResultError: It is missing or damaged.
    """
    path = folder / MANIFEST
    data = read_bytes(path)
    manifest: Manifest = decode(data, Manifest, path=path)
    if manifest.format != FORMAT:
        raise ResultError(f"{path}: format {manifest.format} is not {FORMAT}")
    # Not from the types: those of tomorrow may have a field more.
    if data != _signed(decode(data, dict, path=path)):
        raise ResultError(f"{path}: it was changed after it was written: its digest differs")
    return manifest


def encode(manifest: Manifest) -> bytes:
    """The bytes of the file; the same for the same content."""
    # Through the types and back, so that an integer for a float is written as what will be read.
    typed = msgspec.json.decode(msgspec.json.encode(manifest), type=Manifest)
    return _signed(msgspec.to_builtins(typed))


def _signed(fields: dict[str, Any]) -> bytes:
    digest = hashlib.sha256(_bytes({**fields, "digest": ""})).hexdigest()
    return _bytes({**fields, "digest": digest})


def _bytes(fields: dict[str, Any]) -> bytes:
    return msgspec.json.format(msgspec.json.encode(fields), indent=1) + b"\n"


def read_bytes(path: Path) -> bytes:
    """A file of a result.

    Raises:
        ResultError: It cannot be read.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ResultError(f"{path}: it is no plain file")  # a pipe would be waited for
    try:
        return path.read_bytes()
    except OSError as error:
        raise ResultError(f"{path}: it cannot be read: {error.strerror}") from error


def decode(data: bytes, kind: Any, *, path: Path) -> Any:
    """Typed JSON of a file.

    Raises:
        ResultError: It is no JSON, or of another form.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ResultError(f"{path}: {error}") from error
