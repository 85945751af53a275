"""Compiles kernels for an H200 that is not there, and reads what ptxas made of them.

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
from collections.abc import Callable, Iterator
from typing import Any

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

# Limits of an H200 as the driver reports them; CUDA C programming guide, compute capability 9.0.
_TARGET = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  l2_cache_size: 62914560
  memory_bandwidth: 4800000000000
  device_memory_size: 150754820096
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
device_description_str: "NVIDIA H200"
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledKernel:
    """One Mosaic kernel of a compiled program.

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
    if shutil.which("ptxas") is None and not _wheel_has_ptxas():
        return "no ptxas: install nvidia-cuda-nvcc"
    try:
        _device()
    except Exception as error:  # what a missing plugin raises differs between versions
        return f"jax {jax.__version__} has no CUDA plugin here: {error}"
    return None


def _wheel_has_ptxas() -> bool:
    packages = pathlib.Path(jax.__file__).parents[1]
    return any((packages / "nvidia").glob("*/bin/ptxas"))


@functools.cache
def _device() -> Any:
    from jax._src import xla_bridge
    from jax.experimental import topologies

    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # asks the driver
    # Fails where the platform is registered already.
    with contextlib.suppress(Exception):
        xla_bridge.discover_pjrt_plugins()
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=_TARGET, topology="1x1x1"
    )
    return topology.devices[0]


def compiled(
    function: Callable[..., Any], *shapes: jax.ShapeDtypeStruct
) -> tuple[CompiledKernel, ...]:
    """Mosaic kernels of a function for an H200; skips the test where there is no compiler."""
    if reason := _why_not():
        pytest.skip(reason)
    sharding = jax.sharding.SingleDeviceSharding(_device())
    given = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding) for s in shapes]
    with _dumped() as folder:
        jax.jit(function).lower(*given).compile()
        return tuple(_read(path) for path in sorted(folder.glob("*.ptxas")))


@contextlib.contextmanager
def _dumped() -> Iterator[pathlib.Path]:
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


def _read(ptxas: pathlib.Path) -> CompiledKernel:
    text = ptxas.read_text()
    spilled = re.findall(r"(\d+) bytes spill", text)
    program = ptxas.with_suffix(".before_layout_inference.txt").read_text()
    launch = re.search(r"gpu\.launch .*", program)
    assert spilled and launch
    grid = re.search(r"blocks\(.*?\) in \((.*?)\)", launch[0])
    shared = re.search(r"dynamic_shared_memory_size (%\S+)", launch[0])
    assert grid and shared
    return CompiledKernel(
        registers=max(int(n) for n in re.findall(r"Used (\d+) registers", text)),
        spill_bytes=sum(int(n) for n in spilled),
        shared_bytes=_constant(program, shared[1]),
        grid=tuple(_constant(program, name) for name in re.findall(r"= (%\w+)", grid[1])),
        ptx=ptxas.with_suffix(".ptx").read_text(),
    )


def _constant(program: str, name: str) -> int:
    found = re.search(rf"{re.escape(name)} = arith\.constant (\d+)", program)
    assert found
    return int(found[1])
