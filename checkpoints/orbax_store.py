"""Converting a model folder to Orbax so that kill -9 at any moment costs at most one part."""

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType

import numpy as np
from jaxtyping import Shaped
from orbax.checkpoint import v1 as ocp

from checkpoints import files, orbax_folder, tensor_types
from checkpoints.errors import CheckpointError
from checkpoints.folder import ModelFolder
from checkpoints.orbax_folder import MANIFEST, PARTS, UNFINISHED, Manifest, OrbaxTensor
from checkpoints.tensor_types import TensorSpec

PART_BYTES = 1 << 29
CHUNK_BYTES = 1 << 24  # What reading any slice of a tensor costs at least.
TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)


def convert(
    source: ModelFolder,
    output: Path | str,
    *,
    progress: Callable[[int, int], None] | None = None,
    part_bytes: int = PART_BYTES,
) -> None:
    """Copy a model into Orbax parts, going on where an interrupted conversion stopped.

    Each part is read into memory, hashed, written, synced and only then entered in
    `unfinished.json`; a part that is not entered is written again. `manifest.json` comes last.
    Holds one part, or one tensor if that is larger, in memory.

    Args:
        source: The model; only its tensors and `TEXT_FILES` are copied.
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
    try:
        output.mkdir(parents=True, exist_ok=True)
        with _locked(output):
            if os.path.lexists(output / MANIFEST):
                _check_source(Manifest.read(output / MANIFEST), source, output)
            else:
                _copy(source, output, progress=progress, part_bytes=part_bytes)
            (output / UNFINISHED).unlink(missing_ok=True)
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:  # ValueError: TensorStore's, for a failed write.
        raise CheckpointError(
            f"{output}: writing failed ({error}); make room or check permissions, then run convert "
            f"again: it goes on where it stopped"
        ) from error


def verify(path: Path | str, *, progress: Callable[[int, int], None] | None = None) -> None:
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
        _check_hash(hashlib.sha256(text).hexdigest(), sha256, what=str(path / name))
    done, total = 0, sum(tensor.nbytes for tensor in weights.tensors.values())
    for name, tensor in weights.tensors.items():
        _check_hash(_sha256(weights.read(name)), tensor.sha256, what=f"{path}: tensor {name!r}")
        done += tensor.nbytes
        if progress is not None:
            progress(done, total)


def _copy(
    source: ModelFolder,
    output: Path,
    *,
    progress: Callable[[int, int], None] | None,
    part_bytes: int,
) -> None:
    manifest = _resume_point(source, output)
    total = sum(spec.nbytes for spec in source.tensors.values())
    done = sum(tensor.nbytes for tensor in manifest.tensors.values())
    free = shutil.disk_usage(output).free
    if free < total - done:
        raise CheckpointError(
            f"{output}: {total - done} bytes are still to be written and the disk has {free} free; "
            f"make room, or give another --output"
        )
    for part in _parts(source, manifest, part_bytes=part_bytes):
        if progress is not None:
            progress(done, total)
        manifest = _with_tensors(manifest, _write_part(source, part, output, manifest=manifest))
        files.write_atomic(output / UNFINISHED, manifest.to_json())
        done += sum(spec.nbytes for spec in part)
    files.write_atomic(output / MANIFEST, manifest.to_json())
    if progress is not None:
        progress(done, total)


def _resume_point(source: ModelFolder, output: Path) -> Manifest:
    """What is already done, with everything half done removed and the text files copied."""
    if os.path.lexists(output / UNFINISHED):
        manifest = Manifest.read(output / UNFINISHED)
        _check_source(manifest, source, output)
    else:
        others = {path.name for path in output.iterdir()}
        others -= {files.partial_path(output / UNFINISHED).name}
        if others:
            raise CheckpointError(
                f"{output}: holds {min(others)!r}, which no conversion left there; "
                f"give --output a new or empty folder"
            )
        manifest = Manifest(
            source_fingerprint=source.fingerprint(),
            tensors=MappingProxyType({}),
            text_sha256=MappingProxyType({}),
        )
        files.write_atomic(output / UNFINISHED, manifest.to_json())
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
        manifest, tensors=MappingProxyType(kept), text_sha256=_copy_text(source, output)
    )


def _copy_text(source: ModelFolder, output: Path) -> MappingProxyType[str, str]:
    """Copy the config and the tokenizer, and give the hash of each file."""
    hashes = {}
    for name in TEXT_FILES:
        path = source.text_file(name)
        if path is not None:
            text = files.read_bytes(path, advice="download it again")
            files.write_atomic(output / name, text)
            hashes[name] = hashlib.sha256(text).hexdigest()
    return MappingProxyType(hashes)


def _parts(
    source: ModelFolder, manifest: Manifest, *, part_bytes: int
) -> Iterator[list[TensorSpec]]:
    """The tensors still to copy, in the order of the source, in parts of bounded size."""
    part: list[TensorSpec] = []
    for name, spec in source.tensors.items():
        if name in manifest.tensors:
            continue
        if part and sum(other.nbytes for other in part) + spec.nbytes > part_bytes:
            yield part
            part = []
        part.append(spec)
    if part:
        yield part


def _write_part(
    source: ModelFolder, part: list[TensorSpec], output: Path, *, manifest: Manifest
) -> list[OrbaxTensor]:
    """Write one part and wait until it is on the disk."""
    last = max((int(tensor.part or -1) for tensor in manifest.tensors.values()), default=-1)
    number = f"{last + 1:05d}"
    # An owned copy, so that what is hashed is what is written, whatever befalls the source.
    tensors = {spec.name: np.array(source.read(spec.name), order="C") for spec in part}
    stored = {name: tensor for name, tensor in tensors.items() if tensor.size}
    if stored:
        context = ocp.Context()
        context.array.saving.use_zarr3 = True
        context.array.saving.use_compression = False  # Weights hardly shrink and load much slower.
        context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
        context.memory.deepcopy_host_arrays = False
        with context:
            ocp.save(output / PARTS / number, stored)
        _sync_tree(output / PARTS / number)
        files.sync_folder(output / PARTS)
    return [
        OrbaxTensor(
            name=name,
            dtype=tensor.dtype,
            shape=tensor.shape,
            part=number if tensor.size else None,
            sha256=_sha256(tensor),
        )
        for name, tensor in tensors.items()
    ]


def _with_tensors(manifest: Manifest, tensors: list[OrbaxTensor]) -> Manifest:
    added = {tensor.name: tensor for tensor in tensors}
    return dataclasses.replace(manifest, tensors=MappingProxyType({**manifest.tensors, **added}))


def _check_source(manifest: Manifest, source: ModelFolder, output: Path) -> None:
    if manifest.source_fingerprint != source.fingerprint():
        raise CheckpointError(
            f"{output}: holds a conversion of another model, or {source.path} has changed since "
            f"that conversion began; give --output a new folder, or delete this one"
        )


def _check_hash(found: str, wanted: str, *, what: str) -> None:
    if found != wanted:
        raise CheckpointError(
            f"{what}: sha256 was {wanted} when it was copied and is {found} now; "
            f"the conversion is damaged: delete it and convert again"
        )


def _sha256(tensor: Shaped[np.ndarray, "..."]) -> str:
    return hashlib.sha256(tensor_types.raw_bytes(tensor)).hexdigest()


def _sync_tree(path: Path) -> None:
    """Sync every file and folder under a path: Orbax syncs the weights, not all the rest."""
    for folder, _, names in os.walk(path):
        for name in names:
            with open(os.path.join(folder, name), "rb") as file:
                os.fsync(file.fileno())
        files.sync_folder(Path(folder))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder alone; the kernel lets go even after kill -9."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"{folder}: another conversion is writing there; wait for it or give another "
                f"--output"
            ) from error
        yield
    finally:
        os.close(descriptor)
