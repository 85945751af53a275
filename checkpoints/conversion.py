"""What a conversion takes whichever way it goes: a lock, a record, parts of bounded size, texts."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
from jaxtyping import Shaped

from checkpoints import files, text_files
from checkpoints.errors import CheckpointError, WritingError
from checkpoints.folder import ModelFolder
from checkpoints.orbax_folder import UNFINISHED, Manifest
from checkpoints.tensor_types import TensorSpec

PART_BYTES = 1 << 29

Progress = Callable[[int, int], None]


@contextlib.contextmanager
def writing(output: Path) -> Iterator[None]:
    """Hold an output folder alone, made if it is not there; what is done inside finishes it.

    The record of unfinished work is removed at the end, if nothing was raised.

    Raises:
        CheckpointError: another conversion is writing there, or it cannot be a folder.
        WritingError: writing failed.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{output}: no folder can be made there ({error}); give another --output"
        ) from error
    with files.locked(
        output, busy="another conversion is writing there; wait for it or give another --output"
    ):
        try:
            yield
            (output / UNFINISHED).unlink(missing_ok=True)
        except CheckpointError:
            raise
        except (OSError, ValueError) as error:  # ValueError: TensorStore's, for a failed write.
            raise WritingError(
                f"{output}: writing failed ({error}); make room or check permissions, then run "
                f"convert again: it goes on where it stopped"
            ) from error


def begin(source: ModelFolder, output: Path, *, layout: str) -> Manifest:
    """The record of an interrupted conversion, or a new one, on the disk before anything else.

    Args:
        source: The model to convert.
        output: A folder held by `writing`.
        layout: What is written there; a record of another layout is refused.

    Raises:
        CheckpointError: the folder holds something else.
    """
    record = output / UNFINISHED
    if os.path.lexists(record):
        manifest = Manifest.read(record, layout=layout)
        check_source(manifest.source_fingerprint, source, output)
    else:
        others = {path.name for path in output.iterdir()} - {files.partial_path(record).name}
        if others:
            raise CheckpointError(
                f"{output}: holds {min(others)!r}, which no conversion left there; "
                f"give --output a new or empty folder"
            )
        manifest = Manifest(
            layout=layout,
            source_fingerprint=source.fingerprint(),
            tensors=MappingProxyType({}),
            text_sha256=MappingProxyType({}),
        )
        files.write_atomic(record, manifest.to_json())
    return manifest


def check_source(fingerprint: str, source: ModelFolder, output: Path) -> None:
    """Refuse to mix what is in `output` with another source than the one it was made from.

    Raises:
        CheckpointError: the fingerprint is not that of the source.
    """
    if fingerprint != source.fingerprint():
        raise CheckpointError(
            f"{output}: holds a conversion of another model, or {source.path} has changed since "
            f"that conversion began; give --output a new folder, or delete this one"
        )


def copy_text(source: ModelFolder, output: Path) -> MappingProxyType[str, str]:
    """Copy the config and the tokenizer, and give the sha256 of each file by its name."""
    hashes = {}
    for name in text_files.present(source.path):
        text = files.read_bytes(source.path / name, advice="download it again")
        (output / name).parent.mkdir(exist_ok=True)
        files.write_atomic(output / name, text)
        hashes[name] = hashlib.sha256(text).hexdigest()
    return MappingProxyType(hashes)


def plan_parts(specs: Iterable[TensorSpec], *, part_bytes: int) -> list[list[TensorSpec]]:
    """Tensors in their order, in parts of at most `part_bytes`, or of one tensor that is larger."""
    parts: list[list[TensorSpec]] = []
    room = 0
    for spec in specs:
        if not parts or spec.nbytes > room:
            parts.append([])
            room = part_bytes
        parts[-1].append(spec)
        room -= spec.nbytes
    return parts


def each_part(
    source: ModelFolder,
    output: Path,
    parts: Mapping[str, list[TensorSpec]],
    *,
    progress: Progress | None,
) -> Iterator[tuple[str, list[TensorSpec]]]:
    """Go through the parts still to be written, each of which is written before the next is asked.

    Args:
        source: The model they are of.
        output: The folder that they are written to.
        parts: What is left to copy, by its name.
        progress: Called with the bytes of weights copied so far and in all.

    Raises:
        WritingError: the disk of `output` has less room than the parts take.
    """
    total = sum(spec.nbytes for spec in source.tensors.values())
    left = sum(map(part_nbytes, parts.values()))
    free = shutil.disk_usage(output).free
    if free < left:
        raise WritingError(
            f"{output}: {left} bytes are still to be written and the disk has {free} free; "
            f"make room, or give another --output"
        )
    for name, part in parts.items():
        if progress is not None:
            progress(total - left, total)
        yield name, part
        left -= part_nbytes(part)
    if progress is not None:
        progress(total, total)


def read_part(source: ModelFolder, part: list[TensorSpec]) -> dict[str, Shaped[np.ndarray, "..."]]:
    """The tensors of a part, in memory that nothing else can change.

    What is hashed is then what is written, whatever befalls the source.
    """
    return {spec.name: np.array(source.read(spec.name), order="C") for spec in part}


def part_nbytes(part: list[TensorSpec]) -> int:
    """Bytes of the tensors of a part."""
    return sum(spec.nbytes for spec in part)


def check_hash(found: str, wanted: str, *, what: str) -> None:
    """Compare with a hash taken while a conversion was made.

    Raises:
        CheckpointError: they differ.
    """
    if found != wanted:
        raise CheckpointError(
            f"{what}: sha256 was {wanted} when it was copied and is {found} now; "
            f"the conversion is damaged: delete it and convert again"
        )
