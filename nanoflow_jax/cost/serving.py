"""How long a serving step computes, moves memory and talks to other devices, at best.

Source: NanoFlow (arXiv 2408.12757v2), section 3, equations 1 to 5, and what its figures use beyond
them: the largest dense batch that memory holds, links counted one way, and the (n - 1) / n of a
collective's bytes that leave a device.
"""

import dataclasses

from nanoflow_jax.cost.datasheets import Accelerator
from nanoflow_jax.cost.steady_state import Mix
from nanoflow_jax.models import architecture

_BYTES = 2  # of a weight, of a cached number and of an activation: 16-bit formats


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What of a model's shape decides how long a step takes.

    Attributes:
        held_parameters: Weights that memory holds.
        active_parameters: Weights that a token meets; fewer with experts.
        kv_bytes_per_token: Of a cached token, in all layers.
        hidden_size: D.
        num_layers: L.
    """

    held_parameters: float
    active_parameters: float
    kv_bytes_per_token: float
    hidden_size: int
    num_layers: int


def sizes(config: architecture.ModelConfig, *, parameters: float | None = None) -> Sizes:
    """Sizes of a model.

    Args:
        config: The model.
        parameters: Held and active, in place of those counted: papers say 70e9 of 69.0e9.
    """
    return Sizes(
        held_parameters=parameters or config.num_parameters,
        active_parameters=parameters or config.num_active_parameters,
        kv_bytes_per_token=2 * config.num_kv_heads * config.head_dim * _BYTES * config.num_layers,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
    )


# Means of Table 4 in NanoFlow's paper.
TRACES = {
    "lmsys": Mix(prompt_len=102, output_len=222),
    "splitwise": Mix(prompt_len=1155, output_len=211),
    "sharegpt": Mix(prompt_len=246, output_len=322),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """Devices that serve one model together.

    Attributes:
        accelerator: Of each.
        num_devices: All of them.
        num_stages: Pipeline stages, each of equally many devices with a share of the layers; the
            devices of a stage share its layers (tensor parallel).
    """

    accelerator: Accelerator
    num_devices: int
    num_stages: int = 1

    def __post_init__(self) -> None:
        if self.num_devices < 1 or self.num_stages < 1 or self.num_devices % self.num_stages:
            raise ValueError(
                f"{self.num_devices} devices cannot be {self.num_stages} equal stages; give a "
                "multiple of the stages"
            )

    @property
    def flops(self) -> float:
        """Of all devices, per second."""
        return self.num_devices * self.accelerator.bf16_flops

    @property
    def memory_bytes(self) -> float:
        return self.num_devices * self.accelerator.memory_bytes

    @property
    def memory_bytes_per_s(self) -> float:
        return self.num_devices * self.accelerator.memory_bytes_per_s

    @property
    def link_bytes_per_s(self) -> float:
        """One way, of all devices."""
        return self.num_devices * self.accelerator.link_bytes_per_s

    @property
    def group_size(self) -> int:
        """Devices that share a layer."""
        return self.num_devices // self.num_stages


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServingCost:
    """What bounds a steady state in which memory is full and every step has the same dense batch.

    Attributes:
        dense_batch: Tokens of a step.
        memory_s: To read all memory once (equation 1).
        compute_s: Of the products (equation 2).
        network_s: Of the collectives (equation 3).
        optimal_tokens_per_s: Input and output tokens, if products never waited (equation 5).
    """

    dense_batch: float
    memory_s: float
    compute_s: float
    network_s: float
    optimal_tokens_per_s: float

    @property
    def memory_ratio(self) -> float:
        """T_R, equation 4: under 1, products are what takes longest."""
        return self.memory_s / self.compute_s

    @property
    def network_ratio(self) -> float:
        return self.network_s / self.compute_s

    @property
    def bound_by(self) -> str:
        """Which of the three takes longest."""
        times = {"compute": self.compute_s, "memory": self.memory_s, "network": self.network_s}
        return max(times, key=lambda name: times[name])


def largest_batch(model: Sizes, cluster: Cluster, mix: Mix) -> tuple[float, float]:
    """Requests that memory holds beside the weights, and the dense batch that keeps it full.

    For each token that a request decodes, (p + d) / d tokens pass through a step.

    Raises:
        ValueError: The weights leave no room, or nothing is generated.
    """
    room = cluster.memory_bytes - _BYTES * model.held_parameters
    if room <= 0:
        raise ValueError(
            f"weights of {_BYTES * model.held_parameters / 1e9:.0f} GB do not fit in "
            f"{cluster.memory_bytes / 1e9:.0f} GB; take more devices, or larger ones"
        )
    if mix.output_len == 0:
        raise ValueError("requests without output fill no memory; give a dense batch")
    requests = room / (model.kv_bytes_per_token * mix.decode_context)
    return requests, requests / mix.decode_share


def network_bytes(model: Sizes, cluster: Cluster, dense_batch: float) -> float:
    """Bytes that leave devices in a step: four passes of the activations in each layer.

    Two all-gathers move them once each and an all-reduce twice, and so do two all-reduces.
    """
    moved = 4 * dense_batch * model.hidden_size * _BYTES * model.num_layers
    return moved * (cluster.group_size - 1)


def serving_cost(
    model: Sizes, cluster: Cluster, mix: Mix, *, dense_batch: float | None = None
) -> ServingCost:
    """What bounds serving.

    Args:
        model: Its sizes.
        cluster: The devices.
        mix: The requests.
        dense_batch: Tokens of a step; None is the largest that memory allows.

    Raises:
        ValueError: See `largest_batch`, where that is asked for.
    """
    if dense_batch is None:
        _, dense_batch = largest_batch(model, cluster, mix)
    flops_per_token = 2 * model.active_parameters
    return ServingCost(
        dense_batch=dense_batch,
        memory_s=cluster.memory_bytes / cluster.memory_bytes_per_s,
        compute_s=dense_batch * flops_per_token / cluster.flops,
        network_s=network_bytes(model, cluster, dense_batch) / cluster.link_bytes_per_s,
        optimal_tokens_per_s=cluster.flops / flops_per_token,
    )
