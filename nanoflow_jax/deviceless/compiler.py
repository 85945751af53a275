"""Compiles a program for a GPU on a machine without one.

The program is lowered here and compiled in a process of its own, for which the wheels of jax's CUDA
plugin and ptxas are needed: `pip install 'nanoflow_jax[deviceless]'`. Nothing is tuned by timing,
so XLA's own products are not those that a GPU would get; what is told of structure is true.
"""

import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
from jax._src import config

from nanoflow_jax import compat
from nanoflow_jax.deviceless import dumps
from nanoflow_jax.deviceless.devices import Device, find_device, target_config
from nanoflow_jax.deviceless.program import Program

_WORKER = pathlib.Path(__file__).with_name("compile_worker.py")
_PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin")
_TOOLS = ("nvidia-cuda-nvcc", "nvidia-cuda-nvcc-cu12")
# What tells of edges of CUDA graphs and of registers; levels as of XLA in jaxlib 0.10.2 and 0.11.2.
_TOLD = "command_executor=3,execution_graph=4,subprocess_compilation=3"
_PREFIXES = ("JAX_", "XLA_", "TF_CPP_", "MOSAIC_GPU_")
_LAST_WORDS = 2000  # characters of a failed compiler's log that go into the error


class CompilerMissingError(RuntimeError):
    """What is needed to compile for a GPU is not installed."""


class CompilerFailedError(RuntimeError):
    """The compiler refused the program, ended or took too long; says what it said."""


def what_is_missing() -> str | None:
    """What this machine lacks to compile for a GPU; None if nothing."""
    if not any(map(_version, _PLUGINS)):
        return f"jax {jax.__version__} has no CUDA plugin here"
    if shutil.which("ptxas") is None and not _wheels_have_ptxas():
        return "there is no ptxas"
    return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _wheels_have_ptxas() -> bool:
    nvidia = importlib.util.find_spec("nvidia")
    folders = nvidia.submodule_search_locations if nvidia else None
    return any(any(pathlib.Path(one).glob("*/bin/ptxas")) for one in folders or ())


def compile_program(
    function: jax.stages.Wrapped,
    *arguments: Any,
    device: str = "H200",
    num_devices: int = 1,
    options: Mapping[str, bool | int | float | str] | None = None,
    cache: pathlib.Path | None = None,
    timeout_s: float = 600.0,
) -> Program:
    """Compiles a jitted function for a GPU.

    Flags of this process, such as XLA_FLAGS, have no effect.

    Args:
        function: From jax.jit, which says what is donated.
        arguments: Shapes and dtypes in place of arrays; for several devices with shardings over an
            abstract mesh.
        device: A name in `devices.DEVICES`.
        num_devices: GPUs of that kind in one machine.
        options: XLA's, by name, as `compiler_options` of jax.jit takes them.
        cache: Folder that keeps what was compiled; None keeps nothing.
        timeout_s: To wait for the compiler.

    Raises:
        ValueError: There is no such device.
        CompilerMissingError: Wheels are missing.
        CompilerFailedError: It did not compile; the message ends with what the compiler said.
    """
    target = find_device(device)
    if reason := what_is_missing():
        raise CompilerMissingError(f"{reason}: pip install 'nanoflow_jax[deviceless]'")
    module = _lower(function, arguments, target)
    request = {
        "target_config": target_config(target),
        "num_devices": num_devices,
        "options": dict(options or {}),
    }
    parts = (module, json.dumps(request).encode())
    if cache is None:
        return _compile(*parts, timeout_s=timeout_s)
    record = cache / f"{_digest(*parts)}.json"
    if record.exists():
        return Program.from_json(record.read_text())
    program = _compile(*parts, timeout_s=timeout_s)
    _write(record, program.to_json().encode())
    return program


def _lower(function: jax.stages.Wrapped, arguments: tuple[Any, ...], device: Device) -> bytes:
    # Named scopes stay; with call stacks a program would be another one for each caller.
    with (
        compat.abstract_gpu(device.kind, device.num_sms),
        config.traceback_in_locations_limit(0),
    ):
        lowered = function.trace(*arguments).lower(lowering_platforms=("cuda",))
    module = io.BytesIO()
    lowered.compiler_ir().operation.write_bytecode(module)
    return module.getvalue()


def _digest(*parts: bytes) -> str:
    """Of all that decides what is compiled and what is kept of it."""
    versions = [jax.__version__, *(str(_version(name)) for name in (*_PLUGINS, *_TOOLS))]
    sources = [path.read_bytes() for path in sorted(_WORKER.parent.glob("*.py"))]
    digest = hashlib.sha256()
    for part in (" ".join(versions).encode(), *sources, *parts):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _write(path: pathlib.Path, content: bytes) -> None:
    """Writes a file that others see whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    os.replace(file.name, path)


def _compile(module: bytes, request: bytes, *, timeout_s: float) -> Program:
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "module").write_bytes(module)
        (folder / "request.json").write_bytes(request)
        (folder / "dump").mkdir()
        log = folder / "log"
        try:
            with log.open("wb") as file:
                ended = subprocess.run(
                    [sys.executable, "-P", str(_WORKER), name],
                    env=_environment(folder / "dump"),
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    timeout=timeout_s,
                    check=False,
                )
        except subprocess.TimeoutExpired as error:
            raise CompilerFailedError(f"the compiler did not end in {timeout_s} s") from error
        said = log.read_text(errors="replace")
        if ended.returncode:
            raise CompilerFailedError(
                f"the compiler ended with {ended.returncode}: {said[-_LAST_WORDS:]}"
            )
        return dumps.read_program(folder, said)


def _environment(dump: pathlib.Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_PREFIXES)}
    return kept | {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # which would ask the driver
        "MOSAIC_GPU_DUMP_TO": str(dump),
        "TF_CPP_MIN_LOG_LEVEL": "0",
        "TF_CPP_VMODULE": _TOLD,
    }
