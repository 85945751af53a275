"""Compiles kernels for a GPU that is not there, and reads what ptxas made of them.

Needs the wheels of jax's CUDA plugin and ptxas (`jax-cuda13-plugin`, `nvidia-cuda-nvcc`), no GPU.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from nanoflow_jax import compat

_TARGET = """
gpu_device_info {{
  cuda_compute_capability {{ major: {capability[0]} minor: {capability[1]} }}
  core_count: {num_sms}
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: {sm_threads}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {shared_bytes}
  shared_memory_per_core: {sm_shared_bytes}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  fpus_per_core: 128
  clock_rate_ghz: {clock_ghz}
  l2_cache_size: {l2_bytes}
  memory_bandwidth: {bytes_per_s}
  device_memory_size: {memory_bytes}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
device_description_str: "{name}"
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """A GPU as its driver would report it.

    Source: CUDA C programming guide, table of compute capabilities; data sheets.
    """

    name: str
    capability: tuple[int, int]
    num_sms: int
    sm_threads: int
    shared_bytes: int  # that one CTA may have
    sm_shared_bytes: int
    clock_ghz: float
    l2_bytes: int
    bytes_per_s: int
    memory_bytes: int

    @property
    def target(self) -> str:
        return _TARGET.format(**dataclasses.asdict(self))


H200 = Device(
    name="NVIDIA H200",
    capability=(9, 0),
    num_sms=132,
    sm_threads=2048,
    shared_bytes=232_448,
    sm_shared_bytes=233_472,
    clock_ghz=1.98,
    l2_bytes=62_914_560,
    bytes_per_s=4_800_000_000_000,
    memory_bytes=150_754_820_096,
)
A100 = Device(
    name="NVIDIA A100-SXM4-80GB",
    capability=(8, 0),
    num_sms=108,
    sm_threads=2048,
    shared_bytes=166_912,
    sm_shared_bytes=167_936,
    clock_ghz=1.41,
    l2_bytes=41_943_040,
    bytes_per_s=2_039_000_000_000,
    memory_bytes=85_899_345_920,
)
L4 = Device(
    name="NVIDIA L4",
    capability=(8, 9),
    num_sms=58,
    sm_threads=1536,
    shared_bytes=101_376,
    sm_shared_bytes=102_400,
    clock_ghz=2.04,
    l2_bytes=50_331_648,
    bytes_per_s=300_000_000_000,
    memory_bytes=25_769_803_776,
)


# Tests run with fewer passes, which costs registers.
_USUAL_PASSES = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledKernel:
    """One kernel of a compiled program.

    Attributes:
        registers: Of each thread.
        spill_bytes: Stored and loaded again for want of registers.
        shared_bytes: Shared memory of a CTA.
        grid: CTAs along each axis.
        ptx: Its program.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    grid: tuple[int, ...]
    ptx: str


@functools.cache
def _why_not() -> str | None:
    """Why this machine cannot compile for a GPU; None if it can."""
    if _ptxas() is None:
        return "no ptxas: install nvidia-cuda-nvcc"
    try:
        _topology_device(H200)
    except Exception as error:  # what a missing plugin raises differs between versions
        return f"jax {jax.__version__} has no CUDA plugin here: {error}"
    return None


def _ptxas() -> str | None:
    packages = pathlib.Path(jax.__file__).parents[1]
    found = sorted((packages / "nvidia").glob("*/bin/ptxas"))
    return str(found[0]) if found else shutil.which("ptxas")


@functools.cache
def _topology_device(device: Device) -> Any:
    from jax._src import xla_bridge
    from jax.experimental import topologies

    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # asks the driver
    # Fails where the platform is registered already.
    with contextlib.suppress(Exception):
        xla_bridge.discover_pjrt_plugins()
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=device.target, topology="1x1x1"
    )
    return topology.devices[0]


def _lowered(function: Callable[..., Any], shapes: Sequence[Any], device: Device) -> Any:
    """A program for that device; skips the test where there is no compiler."""
    if reason := _why_not():
        pytest.skip(reason)
    sharding = jax.sharding.SingleDeviceSharding(_topology_device(device))
    given = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes
    )
    with compat.abstract_gpu(device.name, device.num_sms):
        return jax.jit(function).trace(*given).lower(lowering_platforms=("cuda",))


def compiled(
    function: Callable[..., Any], *shapes: jax.ShapeDtypeStruct
) -> tuple[CompiledKernel, ...]:
    """Mosaic kernels of a function for an H200; skips the test where there is no compiler."""
    with _dumped() as folder:
        _lowered(function, shapes, H200).compile()
        return tuple(_read_mosaic(path) for path in sorted(folder.glob("*.ptxas")))


def program(function: Callable[..., Any], *shapes: Any, device: Device) -> jax.stages.Compiled:
    """A function as XLA compiles it for a device; skips the test where there is no compiler."""
    with _dumped():
        return _lowered(function, shapes, device).compile(compiler_options=_USUAL_PASSES)


def compiled_by_xla(
    function: Callable[..., Any], *shapes: jax.ShapeDtypeStruct, device: Device
) -> dict[str, CompiledKernel]:
    """All kernels of a function by name, those of Pallas' Triton backend among them.

    Skips the test where there is no compiler. A kernel that this process has compiled before for
    the device is missing: XLA remembers it.
    """
    with _dumped() as folder:
        _record_ptxas(folder)
        folders = {"xla_dump_to": str(folder), "xla_gpu_cuda_data_dir": str(folder)}
        _lowered(function, shapes, device).compile(compiler_options=folders | _USUAL_PASSES)
        (thunks,) = folder.glob("*.thunk_sequence.txt")
        return dict(_read_launches(thunks.read_text(), folder))


def _record_ptxas(folder: pathlib.Path) -> None:
    """A ptxas that leaves its programs, and what it says of them, in the folder."""
    script = folder / "bin" / "ptxas"
    script.parent.mkdir()
    script.write_text(
        f"""#!/bin/sh
[ "$1" = --version ] && exec {_ptxas()} --version
copy={folder}/$(basename "$1")
cp "$1" "$copy.ptx"
{_ptxas()} -v "$@" 2> "$copy.ptxas"
status=$?
cat "$copy.ptxas" >&2
exit $status
"""
    )
    script.chmod(0o755)


def _read_launches(thunks: str, folder: pathlib.Path) -> Iterator[tuple[str, CompiledKernel]]:
    said = {
        match[1]: (ptx.read_text(), ptx.with_suffix(".ptxas").read_text())
        for ptx in folder.glob("*.ptx")
        if (match := re.search(r"\.entry (\w+)", ptx.read_text()))
    }
    launches = r" (\w+) grid: \[(.*?)\] threads: .*? shared_memory: (\d+) bytes"
    for name, grid, shared in re.findall(launches, thunks):
        if name in said:
            ptx, text = said[name]
            sizes = tuple(int(size) for size in grid.split(","))
            yield name, _kernel(text, shared_bytes=int(shared), grid=sizes, ptx=ptx)


@contextlib.contextmanager
def _dumped() -> Iterator[pathlib.Path]:
    """A folder into which kernels of Mosaic are dumped."""
    name = "MOSAIC_GPU_DUMP_TO"
    before = os.environ.get(name)
    was_cached = jax.config.jax_enable_compilation_cache
    with tempfile.TemporaryDirectory() as folder:
        os.environ[name] = folder
        # A program from the cache dumps nothing, and none can be read without a GPU. jax decides
        # once whether to use the cache, unless it is reset.
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()
        try:
            yield pathlib.Path(folder)
        finally:
            jax.config.update("jax_enable_compilation_cache", was_cached)
            compilation_cache.reset_cache()
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before


def _read_mosaic(ptxas: pathlib.Path) -> CompiledKernel:
    program = ptxas.with_suffix(".before_layout_inference.txt").read_text()
    launch = re.search(r"gpu\.launch .*", program)
    assert launch
    grid = re.search(r"blocks\(.*?\) in \((.*?)\)", launch[0])
    shared = re.search(r"dynamic_shared_memory_size (%\S+)", launch[0])
    assert grid and shared
    return _kernel(
        ptxas.read_text(),
        shared_bytes=_constant(program, shared[1]),
        grid=tuple(_constant(program, name) for name in re.findall(r"= (%\w+)", grid[1])),
        ptx=ptxas.with_suffix(".ptx").read_text(),
    )


def _kernel(said: str, **launch: Any) -> CompiledKernel:
    """From what ptxas said of it and how it is launched."""
    spilled = re.findall(r"(\d+) bytes spill", said)
    assert spilled
    return CompiledKernel(
        registers=max(int(n) for n in re.findall(r"Used (\d+) registers", said)),
        spill_bytes=sum(int(n) for n in spilled),
        **launch,
    )


def _constant(program: str, name: str) -> int:
    found = re.search(rf"{re.escape(name)} = arith\.constant (\d+)", program)
    assert found
    return int(found[1])
