"""Reads a result folder, and says whether it is what was written."""

import dataclasses
import gzip
import hashlib
import zlib
from pathlib import Path
from typing import Any

from nanoflow_jax.results import kinds, manifest
from nanoflow_jax.results.kind import Evidence, Kind, Tokens
from nanoflow_jax.results.manifest import Manifest, ResultError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """A result folder as it was read.

    Attributes:
        path: The folder.
        manifest: What it says of itself.
        kind: Of the result.
        samples: Of the kind's type, in the order of time.
        tokens: Of tokens.json; None if there is none.
    """

    path: Path
    manifest: Manifest
    kind: Kind
    samples: tuple[Any, ...]
    tokens: Tokens | None

    @property
    def evidence(self) -> Evidence:
        """What its figures are made from."""
        found = self.manifest
        return Evidence(
            run=found.run, samples=self.samples, ceilings=found.ceilings, unfit=found.unfit
        )


def read(path: Path) -> Result:
    """Reads a folder.

    Raises:
        ResultError: Something in it cannot be read; the message names the file.
    """
    return read_as(path, manifest.read(path))


def read_as(path: Path, found: Manifest) -> Result:
    """Reads a folder of which the manifest is known.

    Raises:
        ResultError: As `read` does.
    """
    try:
        kind = kinds.find(found.run.kind)
    except ValueError as error:
        raise ResultError(f"{path / manifest.MANIFEST}: {error}") from error
    samples: tuple[Any, ...] = ()
    if manifest.SAMPLES in found.files:
        samples = read_samples(path / manifest.SAMPLES, kind)
    tokens = None
    if manifest.TOKENS in found.files:
        file = path / manifest.TOKENS
        tokens = manifest.decode(manifest.read_bytes(file), Tokens, path=file)
    return Result(path=path, manifest=found, kind=kind, samples=samples, tokens=tokens)


def read_samples(path: Path, kind: Kind) -> tuple[Any, ...]:
    """The samples of a compressed file, one JSON object in a line.

    Raises:
        ResultError: It is truncated, damaged, or a line is no sample of that kind.
    """
    try:
        text = gzip.decompress(manifest.read_bytes(path))
    except (OSError, EOFError, zlib.error) as error:
        raise ResultError(f"{path}: it is truncated or damaged: {error}") from error
    lines = text.split(b"\n")
    if lines.pop():
        raise ResultError(f"{path}: its last line has no end")
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(manifest.decode(line, kind.sample, path=path))
        except ResultError as error:
            raise ResultError(f"{error}, in line {number}") from error
    return tuple(found)


def damages(path: Path, found: Manifest, kind: Kind) -> list[str]:
    """Files that are not what the manifest says, missing or too many."""
    complaints = []
    if Path(*path.resolve().parts[-2:]) != found.folder:
        complaints.append(f"its place is {found.folder}, not {Path(*path.resolve().parts[-2:])}")
    there = {file.name for file in path.iterdir()} - {manifest.MANIFEST}
    wanted = set(found.files)
    if found.status == "done":
        wanted |= kind.files(found.run)
    complaints += [f"{path / name}: there is no such file" for name in sorted(wanted - there)]
    complaints += [f"{path / name}: no such file belongs here" for name in sorted(there - wanted)]
    complaints += [
        f"{path / name}: a result has no file of that name"
        for name in sorted(set(found.files) - set(manifest.FILES))
    ]
    for name in sorted(there & set(found.files)):
        if hashlib.sha256(manifest.read_bytes(path / name)).hexdigest() != found.files[name]:
            complaints.append(f"{path / name}: its SHA-256 is not the manifest's")
    return complaints
