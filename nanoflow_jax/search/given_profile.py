"""A profile that a user names: whether it fits, and what is known of its device."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path

from nanoflow_jax.cost import datasheets, layer_work
from nanoflow_jax.cost.datasheets import Datasheet
from nanoflow_jax.models import architecture
from nanoflow_jax.results import profile as profile_lib
from nanoflow_jax.search import measured
from nanoflow_jax.search.interference import Speeds

# Values of --profile that are no file.
DATASHEET, PAPER = "datasheet", "paper"
# Of a device that has no SMs a plan shares out tenths.
_TENTHS = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Given:
    """A profile that fits what is asked.

    Attributes:
        file: What was measured.
        path: Where it was read from.
        config: The model.
    """

    file: profile_lib.Profile
    path: Path
    config: architecture.ModelConfig

    @property
    def source(self) -> str:
        """Where times come from, for people."""
        return f"{self.file.source} ({self.path})"

    @functools.cached_property
    def times(self) -> measured.Times:
        """Of its operations."""
        return measured.Times(self.file)

    @functools.cached_property
    def sheet(self) -> Datasheet:
        """Of its device: its maker's, or what was measured where there is none."""
        known = datasheets.datasheet(self.file.device.name)
        if known is not None and self.file.num_sms is not None:
            return known
        flops_per_s, bytes_per_s = self._reached()
        return Datasheet(
            name=self.file.device.name,
            bf16_flops=flops_per_s,
            memory_bytes=self.file.memory_bytes,
            memory_bytes_per_s=bytes_per_s,
            link_bytes_per_s=math.inf,
            source=f"the fastest operations of {self.path}",
            num_sms=self.file.num_sms or _TENTHS,
        )

    @property
    def most_tokens(self) -> int:
        """Of a dense batch, that all products were measured with."""
        return min(
            max(point.tokens for point in points)
            for name, points in profile_lib.by_operation(self.file).items()
            if name in ("norm_kqv", "kqv", "o", "up_gate", "down")
        )

    def measured(self, load: layer_work.Load) -> measured.Measured:
        """Times of a layer's operations under a load."""
        return measured.Measured(file=self.file, name=str(self.path), load=load)

    def speeds(self, otherwise: Speeds) -> Speeds:
        """On shares of the device; see `measured.speeds`."""
        return measured.speeds(self.file, otherwise)

    def _reached(self) -> tuple[float, float]:
        """The most operations and bytes that an operation made in a second."""
        rates = [(work.flops / s, work.num_bytes / s) for work, s in self._works()]
        if not rates:
            raise ValueError(f"{self.path} has no operation of a layer; measure it again")
        return max(rate for rate, _ in rates), max(rate for _, rate in rates)

    def _works(self) -> Iterator[tuple[layer_work.Work, float]]:
        for point in self.file.points:
            if point.operation not in ("norm_kqv", "o", "up_gate", "down", "decode_attention"):
                continue
            decodes = point.operation == "decode_attention"
            load = layer_work.Load(
                tokens=point.tokens,
                decode_rows=point.tokens if decodes else 0,
                context_len=point.context,
                prefix_len=0,
            )
            yield layer_work.work(self.config, point.operation, load), self.file.time_s(point)


def read(
    flag: str, *, name: str, config: architecture.ModelConfig, num_devices: int
) -> Given | None:
    """What --profile names; None where that is no file.

    Args:
        flag: Its value.
        name: Of the model.
        config: Its shape.
        num_devices: That share a layer.

    Raises:
        ValueError: There is no such file, it is broken, stale or of something else.
    """
    if flag in (DATASHEET, PAPER):
        return None
    path = profile_lib.find(Path(flag), Path(name).name)
    found = profile_lib.read(path)
    profile_lib.check_fits(found, path, sizes=profile_lib.sizes_of(config), num_devices=num_devices)
    return Given(file=found, path=path, config=config)


def check_device(given: Given, device: str) -> None:
    """Refuses another device than the one that was measured.

    Args:
        given: The profile.
        device: What --device says.

    Raises:
        ValueError: It is another one.
    """
    wanted = datasheets.accelerator(device).name
    if wanted != given.sheet.name:
        raise ValueError(
            f"--profile={given.path} was measured on {given.file.device.name}, not on "
            f"--device={device}; leave --device out, or take another profile"
        )
