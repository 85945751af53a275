"""GPUs that programs can be compiled for on a machine without one."""

import dataclasses

from nanoflow_jax.deviceless.program import Kernel

# Command buffers capture library calls and custom calls only from CUDA 12.3 on, and XLA takes the
# lower of these two; driver and toolkit of today's GPU machines.
_DRIVER_VERSION = "13.0.0"
_RUNTIME_VERSION = "12.9.0"
# cuDNN: major, minor, patch.
_DNN_VERSION = (9, 10, 0)
# The runtime keeps so much of an SM's shared memory for each CTA (CUDA C++ programming guide,
# Shared Memory, compute capability 8.x and 9.x).
_RESERVED_SHARED_BYTES = 1024
# Of 32 bits, of every SM here; a warp gets them for each thread in multiples of eight (as above).
REGISTERS_PER_SM = 65536
_REGISTER_UNIT = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """What a compiler knows of a GPU.

    Source: per device below. Limits of an SM: CUDA C++ programming guide, table of technical
    specifications per compute capability.

    Attributes:
        kind: Its name, as jax gives it on a machine that has one.
        compute_capability: Major and minor version.
        num_sms: Streaming multiprocessors.
        clock_hz: Highest.
        memory_bytes: Of the device.
        memory_bytes_per_s: Between the device's memory and its chip.
        l2_bytes: Second-level cache.
        threads_per_sm: At once.
        shared_bytes_per_sm: Shared memory.
        fpus_per_sm: Multiply-adds in float32 a cycle.
    """

    kind: str
    compute_capability: tuple[int, int]
    num_sms: int
    clock_hz: float
    memory_bytes: int
    memory_bytes_per_s: float
    l2_bytes: int
    threads_per_sm: int
    shared_bytes_per_sm: int
    fpus_per_sm: int

    @property
    def shared_bytes_per_cta(self) -> int:
        """Most shared memory that one CTA can ask for."""
        return self.shared_bytes_per_sm - _RESERVED_SHARED_BYTES

    def holds(self, kernel: Kernel) -> bool:
        """Whether an SM has room for a CTA of a kernel."""
        registers = -(-kernel.registers // _REGISTER_UNIT) * _REGISTER_UNIT * kernel.num_threads
        return (
            registers <= REGISTERS_PER_SM
            and kernel.num_threads <= self.threads_per_sm
            and kernel.shared_bytes <= self.shared_bytes_per_cta
        )


def _hopper(kind: str, *, memory_bytes: int, memory_bytes_per_s: float) -> Device:
    return Device(
        kind=kind,
        compute_capability=(9, 0),
        num_sms=132,
        clock_hz=1.98e9,
        memory_bytes=memory_bytes,
        memory_bytes_per_s=memory_bytes_per_s,
        l2_bytes=50 << 20,
        threads_per_sm=2048,
        shared_bytes_per_sm=228 << 10,
        fpus_per_sm=128,
    )


def _ada(
    kind: str,
    *,
    num_sms: int,
    clock_hz: float,
    memory_bytes: int,
    memory_bytes_per_s: float,
    l2_bytes: int,
) -> Device:
    return Device(
        kind=kind,
        compute_capability=(8, 9),
        num_sms=num_sms,
        clock_hz=clock_hz,
        memory_bytes=memory_bytes,
        memory_bytes_per_s=memory_bytes_per_s,
        l2_bytes=l2_bytes,
        threads_per_sm=1536,
        shared_bytes_per_sm=100 << 10,
        fpus_per_sm=128,
    )


# Hopper and A100: openxla/xla, xla/backends/gpu/target_config/specs (h200, h100_sxm, a100_sxm_80).
# L4 and L40S: NVIDIA's datasheets (memory, bandwidth), Ada GPU architecture whitepaper (SMs, L2).
DEVICES = {
    "H200": _hopper("NVIDIA H200", memory_bytes=151_397_597_184, memory_bytes_per_s=4.8e12),
    "H100": _hopper(
        "NVIDIA H100 80GB HBM3", memory_bytes=84_942_979_072, memory_bytes_per_s=3.35232e12
    ),
    "A100": Device(
        kind="NVIDIA A100-SXM4-80GB",
        compute_capability=(8, 0),
        num_sms=108,
        clock_hz=1.41e9,
        memory_bytes=85_100_068_864,
        memory_bytes_per_s=2.03904e12,
        l2_bytes=40 << 20,
        threads_per_sm=2048,
        shared_bytes_per_sm=164 << 10,
        fpus_per_sm=64,
    ),
    "L4": _ada(
        "NVIDIA L4",
        num_sms=58,
        clock_hz=2.04e9,
        memory_bytes=24 << 30,
        memory_bytes_per_s=3.0e11,
        l2_bytes=48 << 20,
    ),
    "L40S": _ada(
        "NVIDIA L40S",
        num_sms=142,
        clock_hz=2.52e9,
        memory_bytes=48 << 30,
        memory_bytes_per_s=8.64e11,
        l2_bytes=96 << 20,
    ),
}


def find_device(name: str) -> Device:
    """The device of a name such as H200, in letters of either case.

    Raises:
        ValueError: There is none of that name.
    """
    if name.upper() not in DEVICES:
        raise ValueError(f"device {name!r} is none of {', '.join(DEVICES)}")
    return DEVICES[name.upper()]


def target_config(device: Device) -> str:
    """The device as XLA wants it described: a GpuTargetConfigProto in text form."""
    major, minor = device.compute_capability
    # TMA and WGMMA are of sm_90a, not of sm_90.
    extension = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    dnn = dict(zip(("major", "minor", "patch"), _DNN_VERSION, strict=True))
    return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
  core_count: {device.num_sms}
  fpus_per_core: {device.fpus_per_sm}
  clock_rate_ghz: {device.clock_hz / 1e9}
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: {device.threads_per_sm}
  registers_per_core_limit: {REGISTERS_PER_SM}
  registers_per_block_limit: {REGISTERS_PER_SM}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {device.shared_bytes_per_cta}
  shared_memory_per_core: {device.shared_bytes_per_sm}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  l2_cache_size: {device.l2_bytes}
  memory_bandwidth: {round(device.memory_bytes_per_s)}
  device_memory_size: {device.memory_bytes}
  driver_version: "{_DRIVER_VERSION}"
  runtime_version: "{_RUNTIME_VERSION}"
  compile_time_toolkit_version: "{_RUNTIME_VERSION}"
  dnn_version: "{".".join(map(str, _DNN_VERSION))}"
  name: "{device.kind}"
}}
platform_name: "CUDA"
dnn_version_info {{ {" ".join(f"{key}: {value}" for key, value in dnn.items())} }}
device_description_str: "{device.kind}"
"""
