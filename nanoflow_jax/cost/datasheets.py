"""What datasheets, and one paper, promise of accelerators."""

import dataclasses
import math
import pathlib

from nanoflow_jax import json_fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accelerator:
    """A device as somebody describes it.

    Attributes:
        bf16_flops: Dense products of 16-bit numbers, operations per second.
        memory_bytes: Of its memory.
        memory_bytes_per_s: To and from it.
        link_bytes_per_s: To other devices of a node, one way.
    """

    name: str
    bf16_flops: float
    memory_bytes: float
    memory_bytes_per_s: float
    link_bytes_per_s: float
    source: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Datasheet(Accelerator):
    """A GPU as its maker describes it."""

    num_sms: int


_HOPPER = "NVIDIA H100 Tensor Core GPU datasheet (dense: half of the figures with sparsity)"
_H200 = "NVIDIA H200 Tensor Core GPU datasheet (dense: half of the figures with sparsity)"
_AMPERE = "NVIDIA A100 Tensor Core GPU datasheet"
_ADA = "NVIDIA L4 and L40S datasheets (dense: half of the figures with sparsity)"
# By what the driver calls them; the first whose words are all in the name. Then what people call
# them, SMs, TFLOP/s, GB of memory, GB/s of it and of links one way.
_DATASHEETS: tuple[tuple[tuple[str, ...], str, Datasheet], ...] = tuple(
    (
        tuple(words.split()),
        short,
        Datasheet(
            name=name,
            num_sms=num_sms,
            bf16_flops=tera * 1e12,
            memory_bytes=gigabytes * 1e9,
            memory_bytes_per_s=giga * 1e9,
            link_bytes_per_s=link * 1e9,
            source=source,
        ),
    )
    for words, short, name, num_sms, tera, gigabytes, giga, link, source in (
        ("H200 NVL", "h200-nvl", "H200 NVL", 132, 835.5, 141, 4800, 450, _H200),
        ("H200", "h200", "H200 SXM", 132, 989.5, 141, 4800, 450, _H200),
        ("H100 NVL", "h100-nvl", "H100 NVL", 132, 835.5, 94, 3900, 300, _HOPPER),
        ("H100 PCIe", "h100-pcie", "H100 PCIe", 114, 756, 80, 2000, 300, _HOPPER),
        ("H100", "h100", "H100 SXM", 132, 989.5, 80, 3350, 450, _HOPPER),
        ("A100 SXM4 40GB", "a100-40g", "A100 SXM 40 GB", 108, 312, 40, 1555, 300, _AMPERE),
        ("A100 PCIE 40GB", "a100-40g-pcie", "A100 PCIe 40 GB", 108, 312, 40, 1555, 300, _AMPERE),
        ("A100 SXM4 80GB", "a100-80g", "A100 SXM 80 GB", 108, 312, 80, 2039, 300, _AMPERE),
        ("A100 80GB PCIe", "a100-80g-pcie", "A100 PCIe 80 GB", 108, 312, 80, 1935, 300, _AMPERE),
        ("L40S", "l40s", "L40S", 142, 362, 48, 864, 32, _ADA),
        ("L4", "l4", "L4", 58, 121, 24, 300, 32, _ADA),
    )
)

_TABLE_1 = "NanoFlow (arXiv 2408.12757v2), Table 1; links one way are half of its NetBW"
# TFLOP/s, GB, GB/s of memory, GB/s of links both ways, as printed there.
_PRINTED: dict[str, tuple[float, float, float, float]] = {
    "v100": (125, 16, 900, 300),
    "a100-40g": (312, 40, 1555, 600),
    "a100-80g": (312, 80, 2000, 600),
    "h100": (989, 80, 3352, 900),
    "h200": (989, 96, 4800, 900),
    "b100": (1800, 120, 8000, 1800),
    "b200": (2250, 120, 8000, 1800),
    "mi250": (362, 128, 3352, 800),
    "mi300": (1307, 192, 5300, 1024),
    "mi325x": (1307, 256, 6000, 1024),
    "gaudi2": (1000, 96, 2400, 600),
    "gaudi3": (1800, 128, 3700, 1200),
    "ada6000": (182, 48, 960, 64),
}
_PAPER = "paper:"


def datasheet(device_kind: str) -> Datasheet | None:
    """Of the GPU that a driver calls so, such as NVIDIA H100 80GB HBM3; None if it is not known."""
    words = set(device_kind.replace("-", " ").split())
    for wanted, _, sheet in _DATASHEETS:
        if words.issuperset(wanted):
            return sheet
    return None


def accelerator_names() -> list[str]:
    """What `accelerator` knows."""
    return [short for _, short, _ in _DATASHEETS] + [_PAPER + name for name in _PRINTED]


def accelerator(name: str) -> Accelerator:
    """By what people call it, such as h200; `paper:` stands before rows of NanoFlow's Table 1.

    Args:
        name: One of `accelerator_names`, or a file; see `described`.

    Raises:
        ValueError: It is not known.
    """
    if name.endswith(".json"):
        return described(pathlib.Path(name))
    for _, short, sheet in _DATASHEETS:
        if short == name:
            return sheet
    if name.removeprefix(_PAPER) not in _PRINTED or not name.startswith(_PAPER):
        raise ValueError(
            f"accelerator {name!r} is not known; take one of {', '.join(accelerator_names())}, or "
            "describe it in a file DEVICE.json"
        )
    tera, gigabytes, giga, links = _PRINTED[name.removeprefix(_PAPER)]
    return Accelerator(
        name=name,
        bf16_flops=tera * 1e12,
        memory_bytes=gigabytes * 1e9,
        memory_bytes_per_s=giga * 1e9,
        link_bytes_per_s=links / 2 * 1e9,
        source=_TABLE_1,
    )


def described(path: pathlib.Path) -> Datasheet:
    """A GPU that somebody describes in a JSON file.

    Args:
        path: An object with name, num_sms, teraflops (dense, of 16-bit numbers), memory_gb,
            memory_gb_per_s and, if it has links, link_gb_per_s one way.

    Raises:
        ValueError: The file cannot be read, or what it says is no device.
    """
    try:
        fields = json_fields.Fields(json_fields.parse(path.read_text(encoding="utf-8")), "device")
        numbers = {
            name: fields.take(name, float)
            for name in ("teraflops", "memory_gb", "memory_gb_per_s", "num_sms")
        }
        numbers["link_gb_per_s"] = fields.take("link_gb_per_s", float, 0.0)
        name = fields.take("name", str)
        fields.finish()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{path}: {reason}") from None
    for field, value in numbers.items():
        if not math.isfinite(value) or value < 0 or (value == 0 and field != "link_gb_per_s"):
            raise ValueError(f"{path}: device.{field} is {value:g}; wanted a number above 0")
    if numbers["num_sms"] != int(numbers["num_sms"]):
        raise ValueError(f"{path}: device.num_sms is {numbers['num_sms']:g}; wanted a whole number")
    return Datasheet(
        name=name,
        num_sms=int(numbers["num_sms"]),
        bf16_flops=numbers["teraflops"] * 1e12,
        memory_bytes=numbers["memory_gb"] * 1e9,
        memory_bytes_per_s=numbers["memory_gb_per_s"] * 1e9,
        link_bytes_per_s=numbers["link_gb_per_s"] * 1e9,
        source=str(path),
    )
