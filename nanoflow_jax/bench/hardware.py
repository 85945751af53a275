"""What the driver of a GPU says of it now."""

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
