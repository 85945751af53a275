"""How long a step takes, predicted from what it computes, moves and sends."""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Protocol

from nanoflow_jax.cost import iteration, serving, tiles
from nanoflow_jax.models import architecture
from nanoflow_jax.nanobatch.operations import Resource
from nanoflow_jax.simulator import cuts

_BYTES = 2
# What keeps a resource busy while it overlaps others; every other operation computes.
_LANES = {"decode_attention": Resource.MEMORY, "collectives": Resource.NETWORK}
# Norms, rotary embeddings, gates and residual additions: passes over memory, between products.
OTHER = "other"


class Mode(enum.StrEnum):
    """How a layer's operations run.

    SEQUENTIAL: one after another.
    SPLIT: cut into nano-batches, and still one after another.
    OVERLAPPED: nano-batches of different resources beside each other.
    OFFLOADED: overlapped, while keys and values of new tokens are copied to the host.
    BEST: the fastest of the first three for each step, as a gate by the size of the batch has it.
    """

    SEQUENTIAL = "sequential"
    SPLIT = "split"
    OVERLAPPED = "overlapped"
    OFFLOADED = "offloaded"
    BEST = "best"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepWork:
    """What a step runs over.

    Attributes:
        tokens: Of its bucket, padding included.
        decode_rows: Requests with one token to do.
        decode_context: Cached tokens that all of these see together.
        chunk_pairs: Query and key pairs of all chunks.
    """

    tokens: int
    decode_rows: int
    decode_context: float
    chunk_pairs: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTime:
    """What a step takes.

    Attributes:
        device_s: From its start to its end.
        busy_s: Of each resource, if it ran at what its datasheet promises.
    """

    device_s: float
    busy_s: Mapping[Resource, float]


class StepTimes(Protocol):
    """Predicts steps."""

    def predict(self, work: StepWork) -> StepTime:
        """How long a step takes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reached:
    """What operations reach of what a datasheet promises.

    Attributes:
        source: Where these come from, for people.
        fractions: Bound over time, of operations by name; 1 where none is given.
        grid: How products are computed; None: as their bound says, however small.
        chunk_launch_s: Beside that, of attention over chunks: for each nano-batch of each layer.
        other_passes: Over the activations of a layer, by each device, of all that is between the
            operations of `cost.iteration`.
        cut_s: Of each layer that is cut, beside what smaller products and more launches take.
        shares: Of a resource that overlaps computing: what its operations take of the SMs, as
            seconds of all SMs for each second that they take alone.
        refilled_fraction: Of the time of SMs that have no tile, what operations beside it use.
        offload_factor: Time of an overlapped step that copies to the host, over one that does not.
        product_fraction: Of the datasheet, what the fastest product reaches: optimal throughput is
            counted by it.
    """

    source: str
    fractions: Mapping[str, float] = dataclasses.field(default_factory=dict)
    grid: tiles.Grid | None = None
    chunk_launch_s: float = 0.0
    other_passes: float = 0.0
    cut_s: float = 0.0
    shares: Mapping[Resource, float] = dataclasses.field(default_factory=dict)
    refilled_fraction: float = 1.0
    offload_factor: float = 1.0
    product_fraction: float = 1.0

    def __post_init__(self) -> None:
        fractions = [*self.fractions.values(), self.product_fraction]
        shares = [*self.shares.values(), self.refilled_fraction]
        if not all(0 < one <= 1 for one in fractions) or not all(0 <= one <= 1 for one in shares):
            raise ValueError(f"what is reached of a datasheet is between 0 and 1; got {self}")
        more = (self.chunk_launch_s, self.other_passes, self.cut_s, self.offload_factor - 1)
        if min(more) < 0:
            raise ValueError(f"neither cutting nor more work makes a step shorter; got {self}")


DATASHEET = Reached(source="datasheet: every operation at its bound, overlap hides all it can")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lanes:
    """A step by what its operations keep busy, each alone on the devices.

    Attributes:
        busy_s: Of each resource.
        idle_s: Of computing, what SMs have no tile for.
    """

    busy_s: Mapping[Resource, float]
    idle_s: float

    @property
    def sum_s(self) -> float:
        return sum(self.busy_s.values())


class Roofline:
    """Steps by what each operation has to compute, move and send, and what is reached of that."""

    def __init__(
        self,
        config: architecture.ModelConfig,
        cluster: serving.Cluster,
        reached: Reached,
        mode: Mode,
    ) -> None:
        """See `Reached` and `Mode`.

        Raises:
            ValueError: The devices are several stages: steps of a pipeline over stages are not
                predicted.
        """
        if cluster.num_stages > 1:
            raise ValueError(
                f"--stages={cluster.num_stages}: a run over pipeline stages cannot be simulated; "
                "leave --stages out"
            )
        self._config, self._cluster = config, cluster
        self._reached, self._mode = reached, mode

    def predict(self, work: StepWork) -> StepTime:
        """How long a step takes."""
        costs = self._costs(work)
        busy = {
            Resource.COMPUTE: sum(one.compute_s(self._cluster) for one in costs),
            Resource.MEMORY: sum(one.memory_s(self._cluster) for one in costs),
            Resource.NETWORK: sum(one.network_s(self._cluster) for one in costs),
        }
        match self._mode:
            case Mode.SEQUENTIAL:
                device_s = self.lanes(work, cut=False).sum_s
            case Mode.SPLIT:
                device_s = self.lanes(work, cut=True).sum_s
            case Mode.OVERLAPPED:
                device_s = self._overlapped_s(work)
            case Mode.OFFLOADED:
                device_s = self._overlapped_s(work) * self._reached.offload_factor
            case Mode.BEST:
                # Cut and one after another is never faster than not cut.
                device_s = min(self.lanes(work, cut=False).sum_s, self._overlapped_s(work))
        return StepTime(device_s=device_s, busy_s=busy)

    def _overlapped_s(self, work: StepWork) -> float:
        """Computing, with what the rest takes of its SMs, less what it leaves idle and they use."""
        lanes, reached = self.lanes(work, cut=True), self._reached
        computed = lanes.busy_s[Resource.COMPUTE] - reached.refilled_fraction * lanes.idle_s
        taken = sum(share * lanes.busy_s[one] for one, share in reached.shares.items())
        return max(computed + taken, lanes.busy_s[Resource.MEMORY], lanes.busy_s[Resource.NETWORK])

    def operations_s(self, work: StepWork) -> dict[str, float]:
        """Of each operation of all layers and the head, alone on the devices and not cut."""
        return self._seconds(work, cut=False)[0]

    def lanes(self, work: StepWork, *, cut: bool) -> Lanes:
        """What operations keep busy, if they are cut or not."""
        seconds, idle_s = self._seconds(work, cut=cut)
        busy_s = dict.fromkeys(Resource, 0.0)
        for name, taken in seconds.items():
            busy_s[_LANES.get(name, Resource.COMPUTE)] += taken
        return Lanes(busy_s=busy_s, idle_s=idle_s)

    def _seconds(self, work: StepWork, *, cut: bool) -> tuple[dict[str, float], float]:
        """Of operations by name, and what of computing is idle."""
        cluster, reached = self._cluster, self._reached
        seconds, idle_s = {}, 0.0
        for cost in self._costs(work):
            seconds[cost.name] = cost.least_s(cluster) / reached.fractions.get(cost.name, 1.0)
        if reached.grid is not None:
            products, idle_s = self._products(reached.grid, work, cut=cut)
            seconds |= products
        layers = self._config.num_layers
        parts = cuts.halves(work.tokens) if cut else (work.tokens,)
        if work.chunk_pairs:
            seconds["prefill_attention"] += reached.chunk_launch_s * layers * len(parts)
        passed = work.tokens * self._config.hidden_size * _BYTES * layers
        # Each device passes over all of them: activations between products are not shared out.
        seconds[OTHER] = reached.other_passes * passed / cluster.accelerator.memory_bytes_per_s
        if len(parts) > 1:
            seconds[OTHER] += reached.cut_s * layers
        return seconds, idle_s

    def _products(
        self, grid: tiles.Grid, work: StepWork, *, cut: bool
    ) -> tuple[dict[str, float], float]:
        """Seconds of products by name, and what of them is idle."""
        several = self._cluster.num_devices > 1 and work.decode_rows
        memory = self._cluster.accelerator.memory_bytes_per_s
        seconds: dict[str, float] = {}
        idle_s = 0.0
        for product in tiles.products(self._config, self._cluster.num_devices):
            parts: tuple[int, ...] = (work.tokens,)
            if cut:
                # Beside the first product both decode attention and collectives run.
                cutting = cuts.quarters if product.name == "kqv" and several else cuts.halves
                parts = cutting(work.tokens)
            for rows in parts:
                time = grid.time(product, rows, memory)
                seconds[product.name] = seconds.get(product.name, 0.0) + time.seconds
                idle_s += time.idle_s
        return seconds, idle_s

    def _costs(self, work: StepWork) -> tuple[iteration.OperationCost, ...]:
        return iteration.operation_costs(self._config, self._cluster, _step(work))


def _step(work: StepWork) -> iteration.Step:
    rest = work.tokens - work.decode_rows
    return iteration.Step(
        tokens=work.tokens,
        decode_rows=work.decode_rows,
        decode_context=work.decode_context / max(work.decode_rows, 1),
        prompt_context=work.chunk_pairs / max(rest, 1),
    )
