"""What a planner knows of a machine and of the link between two."""

import dataclasses
import math
from collections.abc import Mapping

from nanoflow_jax.cost.node_work import NodeKind


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hardware:
    """What a machine reaches: times of a machine that nobody has measured follow from it.

    Attributes:
        flops_per_s: Of products.
        memory_bytes_per_s: Read.
        overhead_s: Of each node in each step, whatever it does.
    """

    flops_per_s: float
    memory_bytes_per_s: float
    overhead_s: float

    def __post_init__(self) -> None:
        _check_positive("flops_per_s", self.flops_per_s)
        _check_positive("memory_bytes_per_s", self.memory_bytes_per_s)
        _check_not_negative("overhead_s", self.overhead_s)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NodeTimes:
    """Measured times of a node.

    Attributes:
        prefill_s: a, b, c: a prompt of P tokens takes a + b P + c P^2.
        decode_s: a, b: a step of the profile's batch takes a + b n where each request sees n
            tokens.
        row_s: What one more request adds to such a step, beside its cached tokens; None if it
            was not measured.
    """

    prefill_s: tuple[float, float, float]
    decode_s: tuple[float, float]
    row_s: float | None = None

    def __post_init__(self) -> None:
        for value in (*self.prefill_s, *self.decode_s, self.row_s or 0.0):
            _check_not_negative("a coefficient of a node's time", value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceProfile:
    """A machine that runs nodes.

    Attributes:
        name: What it is called.
        source: Where the figures come from.
        memory_bytes: For weights and cached tokens of the one request that is planned.
        weight_bits: Of a parameter.
        kv_bits: Of a cached number.
        batch: Requests that share each decode step.
        hardware: Gives times of nodes that were not measured.
        model: Whose nodes were measured; empty if none were.
        times: Measured times, by a node's name or its kind.
    """

    name: str
    source: str
    memory_bytes: float
    weight_bits: float
    kv_bits: float
    batch: int
    hardware: Hardware | None = None
    model: str = ""
    times: Mapping[str, NodeTimes] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("memory_bytes", "weight_bits", "kv_bits", "batch"):
            _check_positive(name, getattr(self, name))
        if self.hardware is None and not self.times:
            raise ValueError(
                f"profile {self.name} has neither hardware nor measured times; give one of them"
            )
        if self.times and not self.model:
            raise ValueError(f"profile {self.name} does not say whose model its times are; name it")
        kinds = ", ".join(NodeKind)
        for name in self.times:
            kind, _, layer = name.partition(" ")
            if kind not in list(NodeKind) or (layer and not layer.isdecimal()):
                raise ValueError(
                    f"profile {self.name} has times of {name!r}; nodes are {kinds}, and a layer "
                    "may follow, as in 'mlp 3'"
                )

    def scaled(self, speed: float) -> "DeviceProfile":
        """The same machine, so many times as fast.

        Raises:
            ValueError: The speed is not positive.
        """
        _check_positive("speed", speed)
        hardware = self.hardware and Hardware(
            flops_per_s=self.hardware.flops_per_s * speed,
            memory_bytes_per_s=self.hardware.memory_bytes_per_s * speed,
            overhead_s=self.hardware.overhead_s / speed,
        )
        times = {name: _divided(one, speed) for name, one in self.times.items()}
        return dataclasses.replace(
            self, name=f"{self.name} x {speed:g}", hardware=hardware, times=times
        )


def _divided(times: NodeTimes, speed: float) -> NodeTimes:
    a, b, c = times.prefill_s
    base, slope = times.decode_s
    return NodeTimes(
        prefill_s=(a / speed, b / speed, c / speed),
        decode_s=(base / speed, slope / speed),
        row_s=None if times.row_s is None else times.row_s / speed,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinkProfile:
    """A link between a client and the server.

    Attributes:
        name: What it is called.
        source: Where the figures come from.
        rtt_p50_s: Half of all round trips take at most this.
        rtt_p95_s: 95 in 100 do; deadlines count with it.
        up_bytes_per_s: Client to server, on average.
        up_p10_bytes_per_s: What 9 in 10 transfers reach; deadlines count with it.
        down_bytes_per_s: Server to client, on average.
        down_p10_bytes_per_s: The same there.
        serialisation_s: To write and read one message.
    """

    name: str
    source: str
    rtt_p50_s: float
    rtt_p95_s: float
    up_bytes_per_s: float
    up_p10_bytes_per_s: float
    down_bytes_per_s: float
    down_p10_bytes_per_s: float
    serialisation_s: float

    def __post_init__(self) -> None:
        _check_not_negative("rtt_p50_s", self.rtt_p50_s)
        _check_not_negative("serialisation_s", self.serialisation_s)
        for name in ("up_p10_bytes_per_s", "down_p10_bytes_per_s"):
            _check_positive(name, getattr(self, name))
        for least, most in (
            ("rtt_p50_s", "rtt_p95_s"),
            ("up_p10_bytes_per_s", "up_bytes_per_s"),
            ("down_p10_bytes_per_s", "down_bytes_per_s"),
        ):
            low, high = getattr(self, least), getattr(self, most)
            if not low <= high or math.isinf(high):
                raise ValueError(
                    f"link {self.name}: {least}={low:g} must be at most {most}={high:g}, and both "
                    "finite"
                )

    def with_rtt(self, rtt_s: float) -> "LinkProfile":
        """The same link with another round trip, which is always the same."""
        return dataclasses.replace(self, rtt_p50_s=rtt_s, rtt_p95_s=rtt_s)


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r} is not a positive number; check the profile")


def _check_not_negative(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}={value!r} is not zero or a positive number; check the profile")
