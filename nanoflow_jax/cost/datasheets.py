"""What datasheets promise of GPUs."""

import dataclasses


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
