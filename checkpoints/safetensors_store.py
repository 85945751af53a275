"""Converting a model folder to Hugging Face safetensors; kill -9 costs at most one part.

    DIR/unfinished.json                     while the conversion goes on: of what it is one
    DIR/config.json, tokenizer.json, ...    copied from the source
    DIR/model-00001-of-00002.safetensors    the parts, each whole or absent
    DIR/model.safetensors.index.json        which tensor is in which part; written last

A model of one part is `model.safetensors` alone. Each part's header says which source it came from,
so that finished parts, and a finished folder, are known without reading weights.
"""

import json
import os
import re
from pathlib import Path

from checkpoints import conversion, files, huggingface, safetensors_file, tensor_types, text_files
from checkpoints.conversion import PART_BYTES, Progress
from checkpoints.errors import CheckpointError
from checkpoints.folder import ModelFolder
from checkpoints.huggingface import HuggingFaceWeights
from checkpoints.orbax_folder import OrbaxTensor
from checkpoints.safetensors_file import SafetensorsFile
from checkpoints.tensor_types import TensorSpec

LAYOUT = "huggingface-safetensors"
_SOURCE = "source_fingerprint"  # Key in the header of every part.
_PART = re.compile(r"\.?model(-[0-9]{5,}-of-[0-9]{5,})?\.safetensors(\.partial)?")


def convert(
    source: ModelFolder,
    output: Path | str,
    *,
    progress: Progress | None = None,
    part_bytes: int = PART_BYTES,
) -> None:
    """Copy a model into a Hugging Face folder, going on where an interrupted conversion stopped.

    Tensors that come from Orbax are compared with the hashes taken when they went there. Holds one
    part, or one tensor if that is larger, in memory.

    Args:
        source: The model; only its tensors and `text_files.present` are copied.
        output: A new or empty folder, or that of an interrupted conversion of the same model.
        progress: Called with the bytes of weights copied so far and in all.
        part_bytes: Most bytes of tensors in one file.

    Raises:
        CheckpointError: the folder holds something else, the source is damaged or has changed
            since the conversion began, another conversion is writing there, or there is no room.
    """
    output = Path(output)
    for name in source.tensors:
        if not name.isprintable() or name in ("", "__metadata__"):
            raise CheckpointError(
                f"{source.path}: {name!r} cannot be the name of a tensor in a safetensors file; "
                f"rename the tensor"
            )
    with conversion.writing(output):
        made_from = _finished_from(output)
        if made_from is None:
            _copy(source, output, progress=progress, part_bytes=part_bytes)
        else:
            conversion.check_source(made_from, source, output)


def verify(source: ModelFolder, output: Path | str, *, progress: Progress | None = None) -> None:
    """Read a whole conversion and compare it with its source, or with the hashes the source has.

    Args:
        source: What was converted.
        output: What `convert` made of it.
        progress: Called with the bytes of weights checked so far and in all.

    Raises:
        CheckpointError: it is not a finished conversion, or a tensor or copied file differs.
    """
    made = ModelFolder.open(output)
    done, total = 0, sum(spec.nbytes for spec in source.tensors.values())
    for name in text_files.present(source.path):
        text, advice = source.path / name, "convert again into an empty folder"
        if files.read_bytes(made.path / name, advice=advice) != text.read_bytes():
            raise CheckpointError(f"{made.path / name}: differs from {text}; {advice}")
    for name, spec in source.tensors.items():
        wanted = _known_sha256(spec) or tensor_types.sha256(source.read(name))
        found = tensor_types.sha256(made.read(name))
        conversion.check_hash(found, wanted, what=f"{made.path}: tensor {name!r}")
        done += spec.nbytes
        if progress is not None:
            progress(done, total)


def _copy(source: ModelFolder, output: Path, *, progress: Progress | None, part_bytes: int) -> None:
    conversion.begin(source, output, layout=LAYOUT)
    conversion.copy_text(source, output)
    plan = _plan(source, part_bytes=part_bytes)
    metadata = {"format": "pt", _SOURCE: source.fingerprint()}  # transformers wants a format.
    kept = {
        name for name, part in plan.items() if _is_finished(output / name, part, metadata=metadata)
    }
    for path in output.iterdir():
        if _PART.fullmatch(path.name) and path.name not in kept:
            path.unlink()
    left = {name: part for name, part in plan.items() if name not in kept}
    for name, part in conversion.each_part(source, output, left, progress=progress):
        _write_part(source, part, output / name, metadata=metadata)
    if len(plan) > 1:
        files.write_atomic(output / huggingface.INDEX, _index(plan))


def _write_part(
    source: ModelFolder, part: list[TensorSpec], path: Path, *, metadata: dict[str, str]
) -> None:
    tensors = conversion.read_part(source, part)
    for spec in part:
        known = _known_sha256(spec)
        if known is not None:
            found = tensor_types.sha256(tensors[spec.name])
            conversion.check_hash(found, known, what=f"{source.path}: tensor {spec.name!r}")
    safetensors_file.write_safetensors(path, tensors, metadata)


def _plan(source: ModelFolder, *, part_bytes: int) -> dict[str, list[TensorSpec]]:
    """The files of the folder and what is in each, in the order of its bytes."""
    parts = conversion.plan_parts(source.tensors.values(), part_bytes=part_bytes) or [[]]
    # Wide dtypes first, so that every tensor is aligned: torch cannot view one that is not.
    ordered = [sorted(part, key=lambda spec: -spec.dtype.itemsize) for part in parts]
    if len(ordered) == 1:
        return {huggingface.SINGLE: ordered[0]}
    return {
        f"model-{number:05d}-of-{len(ordered):05d}.safetensors": part
        for number, part in enumerate(ordered, start=1)
    }


def _is_finished(path: Path, part: list[TensorSpec], *, metadata: dict[str, str]) -> bool:
    """Whether a file is a whole part with the planned tensors of this source."""
    if not path.is_file():
        return False
    try:
        file = SafetensorsFile(path)
    except CheckpointError:  # Damaged since it was written: it is written again.
        return False
    found = {name: (info.dtype, info.shape) for name, info in file.tensors.items()}
    wanted = {spec.name: (spec.dtype, spec.shape) for spec in part}
    return found == wanted and file.metadata == metadata


def _finished_from(output: Path) -> str | None:
    """Fingerprint of the source of the finished conversion in a folder, if there is one."""
    if not any(os.path.lexists(output / n) for n in (huggingface.SINGLE, huggingface.INDEX)):
        return None
    try:
        metadata = HuggingFaceWeights(output).metadata
    except CheckpointError as error:
        raise CheckpointError(
            f"{output}: holds weights that are not whole ({error}); give --output a new folder"
        ) from error
    sources = {header.get(_SOURCE) for header in metadata.values()}
    return sources.pop() if len(sources) == 1 else None


def _known_sha256(spec: TensorSpec) -> str | None:
    return spec.sha256 if isinstance(spec, OrbaxTensor) else None


def _index(plan: dict[str, list[TensorSpec]]) -> bytes:
    weight_map = {spec.name: file for file, part in plan.items() for spec in part}
    fields = {
        "metadata": {"total_size": sum(map(conversion.part_nbytes, plan.values()))},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return (json.dumps(fields, indent=2) + "\n").encode()
