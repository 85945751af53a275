"""What datasheets promise of a GPU, and what its driver says of it now."""

import csv
import dataclasses
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence

_QUERY = {
    "name": "name",
    "driver_version": "driver",
    "clocks.sm": "SM clock, MHz",
    "clocks.max.sm": "its maximum, MHz",
    "clocks.mem": "memory clock, MHz",
    "power.draw": "power, W",
    "power.limit": "power limit, W",
    "temperature.gpu": "temperature, C",
    "clocks_event_reasons.active": "clock limits",
    "memory.used": "memory used, MiB",
    "mig.mode.current": "MIG",
}
# Bits of clocks_event_reasons.active (nvml.h, nvmlClocksEventReason*). A cap of power alone is how
# a large product always runs.
_SLOWDOWNS = {
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
_POWER_CAP = 0x4
_SMI_S = 20.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Datasheet:
    """A GPU as its maker describes it.

    Attributes:
        bf16_flops: Dense products of bfloat16, operations per second.
        memory_bytes_per_s: Of its memory.
    """

    name: str
    num_sms: int
    bf16_flops: float
    memory_bytes_per_s: float
    source: str


_HOPPER = "NVIDIA H100 Tensor Core GPU datasheet (dense: half of the figures with sparsity)"
_H200 = "NVIDIA H200 Tensor Core GPU datasheet (dense: half of the figures with sparsity)"
_AMPERE = "NVIDIA A100 Tensor Core GPU datasheet"
_ADA = "NVIDIA L4 and L40S datasheets (dense: half of the figures with sparsity)"
# By what the driver calls them; the first whose words are all in the name.
_DATASHEETS: tuple[tuple[tuple[str, ...], Datasheet], ...] = tuple(
    (
        tuple(words.split()),
        Datasheet(
            name=name,
            num_sms=num_sms,
            bf16_flops=tera * 1e12,
            memory_bytes_per_s=giga * 1e9,
            source=source,
        ),
    )
    for words, name, num_sms, tera, giga, source in (
        ("H200 NVL", "H200 NVL", 132, 835.5, 4800, _H200),
        ("H200", "H200 SXM", 132, 989.5, 4800, _H200),
        ("H100 NVL", "H100 NVL", 132, 835.5, 3900, _HOPPER),
        ("H100 PCIe", "H100 PCIe", 114, 756, 2000, _HOPPER),
        ("H100", "H100 SXM", 132, 989.5, 3350, _HOPPER),
        ("A100 SXM4 40GB", "A100 SXM 40 GB", 108, 312, 1555, _AMPERE),
        ("A100 PCIE 40GB", "A100 PCIe 40 GB", 108, 312, 1555, _AMPERE),
        ("A100 SXM4 80GB", "A100 SXM 80 GB", 108, 312, 2039, _AMPERE),
        ("A100 80GB PCIe", "A100 PCIe 80 GB", 108, 312, 1935, _AMPERE),
        ("L40S", "L40S", 142, 362, 864, _ADA),
        ("L4", "L4", 58, 121, 300, _ADA),
    )
)


def datasheet(device_kind: str) -> Datasheet | None:
    """Of the GPU that a driver calls so, such as NVIDIA H100 80GB HBM3; None if it is not known."""
    words = set(device_kind.replace("-", " ").split())
    for wanted, sheet in _DATASHEETS:
        if words.issuperset(wanted):
            return sheet
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DriverView:
    """What nvidia-smi says of one GPU.

    Attributes:
        values: By the words for them that people read.
        processes: What computes on it, this program included.
        raw: The answer as it came, for a result folder.
    """

    values: Mapping[str, str]
    processes: Sequence[str]
    raw: str

    @property
    def slowdowns(self) -> tuple[str, ...]:
        """Why its clocks are held down, other than by its power limit."""
        bits = self._limits
        return tuple(name for bit, name in _SLOWDOWNS.items() if bits & bit)

    @property
    def is_power_capped(self) -> bool:
        """Whether its power limit holds its clocks down."""
        return bool(self._limits & _POWER_CAP)

    @property
    def _limits(self) -> int:
        text = self.values["clock limits"]
        # What a driver does not tell is in brackets.
        return int(text, 16) if text.startswith("0x") else 0


def _nvidia_smi(arguments: Sequence[str]) -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        raise FileNotFoundError("there is no nvidia-smi")
    return subprocess.run(
        [program, *arguments], capture_output=True, text=True, timeout=_SMI_S, check=True
    ).stdout


def ask_driver(index: int, ask: Callable[[Sequence[str]], str] = _nvidia_smi) -> DriverView | str:
    """What the driver says of a GPU, or why it says nothing.

    Args:
        index: Of the GPU.
        ask: Runs nvidia-smi with arguments; its output.
    """
    form = ["--format=csv,noheader,nounits", f"--id={index}"]
    try:
        raw = ask([f"--query-gpu={','.join(_QUERY)}", *form])
        processes = ask(["--query-compute-apps=pid,used_memory,process_name", *form])
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    rows = list(csv.reader([raw.strip()], skipinitialspace=True))
    if len(rows[0]) != len(_QUERY):
        return f"nvidia-smi answered with {len(rows[0])} values, not {len(_QUERY)}"
    return DriverView(
        values=dict(zip(_QUERY.values(), rows[0], strict=True)),
        processes=[line for line in processes.splitlines() if line.strip()],
        raw=raw,
    )
