"""Converting a model folder to Orbax so that kill -9 at any moment costs at most one part."""

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
from jaxtyping import Shaped
from orbax.checkpoint import v1 as ocp

from checkpoints import conversion, files, orbax_folder, tensor_types
from checkpoints.conversion import PART_BYTES, Progress
from checkpoints.errors import CheckpointError
from checkpoints.folder import ModelFolder
from checkpoints.orbax_folder import MANIFEST, PARTS, UNFINISHED, Manifest, OrbaxTensor

CHUNK_BYTES = 1 << 24  # What reading any slice of a tensor costs at least.


def convert(
    source: ModelFolder,
    output: Path | str,
    *,
    progress: Progress | None = None,
    part_bytes: int = PART_BYTES,
) -> None:
    """Copy a model into Orbax parts, going on where an interrupted conversion stopped.

    Each part is read into memory, hashed, written, synced and only then entered in
    `unfinished.json`; a part that is not entered is written again. `manifest.json` comes last.
    Holds one part, or one tensor if that is larger, in memory.

    Args:
        source: The model; only its tensors and `text_files.present` are copied.
        output: A new or empty folder, or that of an interrupted conversion of the same model.
        progress: Called with the bytes of weights copied so far and in all.
        part_bytes: Most bytes of tensors in one part.

    Raises:
        CheckpointError: the folder holds something else, the source has changed since the
            conversion began, another conversion is writing there, or there is no room.
    """
    output = Path(output)
    for name in source.tensors:
        if "/" in name:
            raise CheckpointError(
                f"{source.path}: tensor {name!r} has '/' in its name, which Orbax would take for a "
                f"folder; rename the tensor"
            )
    with conversion.writing(output):
        if os.path.lexists(output / MANIFEST):
            made_from = Manifest.read(output / MANIFEST).source_fingerprint
            conversion.check_source(made_from, source, output)
        else:
            _copy(source, output, progress=progress, part_bytes=part_bytes)


def verify(path: Path | str, *, progress: Progress | None = None) -> None:
    """Read a whole conversion and compare it with the hashes taken while it was copied.

    Args:
        path: A converted folder.
        progress: Called with the bytes of weights checked so far and in all.

    Raises:
        CheckpointError: it is not a finished conversion, or a tensor or copied file differs.
    """
    path = Path(path)
    weights = orbax_folder.OrbaxWeights(path)
    for name, sha256 in weights.manifest.text_sha256.items():
        text = files.read_bytes(path / name, advice="convert again into an empty folder")
        conversion.check_hash(hashlib.sha256(text).hexdigest(), sha256, what=str(path / name))
    done, total = 0, sum(tensor.nbytes for tensor in weights.tensors.values())
    for name, tensor in weights.tensors.items():
        found = tensor_types.sha256(weights.read(name))
        conversion.check_hash(found, tensor.sha256, what=f"{path}: tensor {name!r}")
        done += tensor.nbytes
        if progress is not None:
            progress(done, total)


def _copy(
    source: ModelFolder,
    output: Path,
    *,
    progress: Progress | None,
    part_bytes: int,
) -> None:
    manifest = _resume_point(source, output)
    left = (spec for name, spec in source.tensors.items() if name not in manifest.tensors)
    finished = (int(tensor.part) for tensor in manifest.tensors.values() if tensor.part)
    parts = {
        f"{number:05d}": part
        for number, part in enumerate(
            conversion.plan_parts(left, part_bytes=part_bytes), start=max(finished, default=-1) + 1
        )
    }
    for number, part in conversion.each_part(source, output, parts, progress=progress):
        written = _write_part(conversion.read_part(source, part), output / PARTS / number)
        tensors = MappingProxyType({**manifest.tensors, **written})
        manifest = dataclasses.replace(manifest, tensors=tensors)
        files.write_atomic(output / UNFINISHED, manifest.to_json())
    files.write_atomic(output / MANIFEST, manifest.to_json())


def _resume_point(source: ModelFolder, output: Path) -> Manifest:
    """What is already done, with everything half done removed and the text files copied."""
    manifest = conversion.begin(source, output, layout=orbax_folder.LAYOUT)
    parts = output / PARTS
    parts.mkdir(exist_ok=True)
    files.sync_folder(output)
    kept = {
        name: tensor
        for name, tensor in manifest.tensors.items()
        if tensor.part is None or (parts / tensor.part).is_dir()
    }
    finished = {tensor.part for tensor in kept.values()}
    for path in parts.iterdir():
        if path.name not in finished:
            shutil.rmtree(path)
    return dataclasses.replace(
        manifest,
        tensors=MappingProxyType(kept),
        text_sha256=conversion.copy_text(source, output),
    )


def _write_part(
    tensors: Mapping[str, Shaped[np.ndarray, "..."]], path: Path
) -> dict[str, OrbaxTensor]:
    """Write one part and wait until it is on the disk."""
    stored = {name: tensor for name, tensor in tensors.items() if tensor.size}
    if stored:
        context = ocp.Context()
        context.array.saving.use_zarr3 = True
        context.array.saving.use_compression = False  # Weights hardly shrink and load much slower.
        context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
        context.memory.deepcopy_host_arrays = False
        with context:
            ocp.save(path.absolute(), stored)  # Orbax refuses a relative path.
        _sync_tree(path)
        files.sync_folder(path.parent)
    return {
        name: OrbaxTensor(
            name=name,
            dtype=tensor.dtype,
            shape=tensor.shape,
            part=path.name if tensor.size else None,
            sha256=tensor_types.sha256(tensor),
        )
        for name, tensor in tensors.items()
    }


def _sync_tree(path: Path) -> None:
    """Sync every file and folder under a path: Orbax syncs the weights, not all the rest."""
    for folder, _, names in os.walk(path):
        for name in names:
            with open(os.path.join(folder, name), "rb") as file:
                os.fsync(file.fileno())
        files.sync_folder(Path(folder))
