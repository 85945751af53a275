"""How long a step takes, predicted from what it computes, moves and sends."""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Protocol

from nanoflow_jax.cost import iteration, serving
from nanoflow_jax.models import architecture
from nanoflow_jax.nanobatch.operations import Resource

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
    BEST: the fastest of these for each step, as a gate by the size of the batch has it.
    """

    SEQUENTIAL = "sequential"
    SPLIT = "split"
    OVERLAPPED = "overlapped"
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
        layer_s: Seconds beside that, of each layer in which there are chunks.
        other_passes: Over the activations of a layer, by each device, of all that is between the
            operations of `cost.iteration`.
        split_factor: Time of all operations of a layer once they are cut, over before.
        hidden_fraction: Of what the busiest resource does not bound, how much overlap hides.
        product_fraction: Of the datasheet, what the fastest product reaches: optimal throughput is
            counted by it.
    """

    source: str
    fractions: Mapping[str, float] = dataclasses.field(default_factory=dict)
    layer_s: float = 0.0
    other_passes: float = 0.0
    split_factor: float = 1.0
    hidden_fraction: float = 1.0
    product_fraction: float = 1.0

    def __post_init__(self) -> None:
        shares = [*self.fractions.values(), self.product_fraction]
        if not all(0 < one <= 1 for one in shares) or not 0 <= self.hidden_fraction <= 1:
            raise ValueError(f"what is reached of a datasheet is between 0 and 1; got {self}")
        if self.split_factor < 1 or min(self.layer_s, self.other_passes) < 0:
            raise ValueError(f"neither cutting nor more work makes a step shorter; got {self}")


DATASHEET = Reached(source="datasheet: every operation at its bound, overlap hides all it can")


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
        return StepTime(device_s=self._in_mode(_lanes(self._seconds(costs, work))), busy_s=busy)

    def operations_s(self, work: StepWork) -> dict[str, float]:
        """Of each operation of all layers, alone on the devices and not cut."""
        return self._seconds(self._costs(work), work)

    def lanes_s(self, work: StepWork) -> dict[Resource, float]:
        """How long these keep each resource."""
        return _lanes(self.operations_s(work))

    def _costs(self, work: StepWork) -> tuple[iteration.OperationCost, ...]:
        return iteration.operation_costs(self._config, self._cluster, _step(work))

    def _seconds(
        self, costs: tuple[iteration.OperationCost, ...], work: StepWork
    ) -> dict[str, float]:
        reached, cluster = self._reached, self._cluster
        found = {c.name: c.least_s(cluster) / reached.fractions.get(c.name, 1.0) for c in costs}
        layers = self._config.num_layers
        if work.chunk_pairs:
            found["prefill_attention"] += reached.layer_s * layers
        passed = work.tokens * self._config.hidden_size * _BYTES * layers
        # Each device passes over all of them: activations between products are not shared out.
        found[OTHER] = reached.other_passes * passed / cluster.accelerator.memory_bytes_per_s
        return found

    def _in_mode(self, lanes: Mapping[Resource, float]) -> float:
        whole, longest = sum(lanes.values()), max(lanes.values())
        shown = (1 - self._reached.hidden_fraction) * (whole - longest)
        times = {
            Mode.SEQUENTIAL: whole,
            Mode.SPLIT: whole * self._reached.split_factor,
            Mode.OVERLAPPED: (longest + shown) * self._reached.split_factor,
        }
        return min(times.values()) if self._mode is Mode.BEST else times[self._mode]


def _lanes(seconds: Mapping[str, float]) -> dict[Resource, float]:
    lanes = dict.fromkeys(Resource, 0.0)
    for name, taken in seconds.items():
        lanes[_LANES.get(name, Resource.COMPUTE)] += taken
    return lanes


def _step(work: StepWork) -> iteration.Step:
    rest = work.tokens - work.decode_rows
    return iteration.Step(
        tokens=work.tokens,
        decode_rows=work.decode_rows,
        decode_context=work.decode_context / max(work.decode_rows, 1),
        prompt_context=work.chunk_pairs / max(rest, 1),
    )
