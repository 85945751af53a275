"""What bounds serving of a model, in lines for people."""

import dataclasses
from collections.abc import Sequence

from nanoflow_jax.cost import iteration, serving
from nanoflow_jax.cost.steady_state import Mix
from nanoflow_jax.models import architecture


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked.

    Attributes:
        model_name: As the user calls it.
        config: The model.
        cluster: Where it runs.
        mix: The requests.
        dense_batch: Tokens of a step; None is the largest that memory allows.
    """

    model_name: str
    config: architecture.ModelConfig
    cluster: serving.Cluster
    mix: Mix
    dense_batch: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What bounds it.

    Attributes:
        sizes: Of the model.
        num_requests: That memory holds; None where nothing is generated.
        cost: Of a step of the whole model.
        operations: Of the same step.
    """

    sizes: serving.Sizes
    num_requests: float | None
    cost: serving.ServingCost
    operations: tuple[iteration.OperationCost, ...]


def answer(asked: Question) -> Answer:
    """Works it out.

    Raises:
        ValueError: The weights do not fit, or there is no dense batch to speak of.
    """
    sizes = serving.sizes(asked.config)
    requests = None
    if asked.dense_batch is None or asked.mix.output_len:
        requests, largest = serving.largest_batch(sizes, asked.cluster, asked.mix)
        if asked.dense_batch is not None and asked.dense_batch > largest:
            raise ValueError(
                f"--dense_batch={asked.dense_batch:g} is more than memory can feed: it holds "
                f"{requests:,.0f} such requests, which come to {largest:,.0f} tokens a step"
            )
    cost = serving.serving_cost(sizes, asked.cluster, asked.mix, dense_batch=asked.dense_batch)
    step = iteration.steady_step(asked.mix, cost.dense_batch)
    operations = iteration.operation_costs(asked.config, asked.cluster, step)
    return Answer(sizes=sizes, num_requests=requests, cost=cost, operations=operations)


def text(asked: Question, found: Answer) -> str:
    """The answer as a user reads it."""
    return "\n".join(
        [*_bounds(asked, found), "", *_table(asked, found), "", *_ceilings(asked, found)]
    )


def _bounds(asked: Question, found: Answer) -> list[str]:
    cluster, cost, mix = asked.cluster, found.cost, asked.mix
    weights = 2 * found.sizes.held_parameters
    holds = (
        "nothing is generated, so nothing stays cached"
        if found.num_requests is None
        else f"{found.num_requests:,.0f} requests of {mix.decode_context:,.0f} cached tokens"
    )
    stages = f" in {cluster.num_stages} stages" if cluster.num_stages > 1 else ""
    return [
        f"{asked.model_name} on {cluster.num_devices} x {cluster.accelerator.name}{stages}, "
        f"{mix.prompt_len:g} tokens in and {mix.output_len:g} out",
        f"source of the device's figures: {cluster.accelerator.source}",
        f"memory: {cluster.memory_bytes / 1e9:,.0f} GB, weights {weights / 1e9:,.1f} GB; {holds}",
        f"dense batch: {cost.dense_batch:,.0f} tokens a step, "
        f"{100 * mix.decode_share:.0f} % of them decoded",
        f"a step: products {cost.compute_s * 1e3:.2f} ms, memory read once "
        f"{cost.memory_s * 1e3:.2f} ms, collectives {cost.network_s * 1e3:.2f} ms",
        f"bound by {cost.bound_by}: memory / compute {cost.memory_ratio:.2f}, "
        f"network / compute {cost.network_ratio:.3f}",
    ]


_COLUMNS = (18, 12, 11, 9, 11, 10, 11)


def _row(cells: Sequence[str]) -> str:
    first, *rest = cells
    width, *widths = _COLUMNS
    return first.ljust(width) + "".join(
        cell.rjust(one) for cell, one in zip(rest, widths, strict=True)
    )


def _table(asked: Question, found: Answer) -> list[str]:
    titles = ("operation", "GFLOP", "memory GB", "link GB", "compute ms", "memory ms", "network ms")
    rows = [_row(titles)]
    for one in found.operations:
        rows.append(
            _row(
                (
                    one.name,
                    f"{one.flops / 1e9:,.1f}",
                    f"{one.memory_bytes / 1e9:,.1f}",
                    f"{one.link_bytes / 1e9:,.1f}",
                    f"{one.compute_s(asked.cluster) * 1e3:,.2f}",
                    f"{one.memory_s(asked.cluster) * 1e3:,.2f}",
                    f"{one.network_s(asked.cluster) * 1e3:,.2f}",
                )
            )
        )
    times = [sums(asked.cluster, found.operations)[name] for name in _RESOURCES]
    rows.append(_row(("all", "", "", "", *(f"{1e3 * one:,.2f}" for one in times))))
    return rows


_RESOURCES = ("compute", "memory", "network")


def sums(
    cluster: serving.Cluster, operations: Sequence[iteration.OperationCost]
) -> dict[str, float]:
    """Seconds that a step keeps each resource busy."""
    return {
        "compute": sum(one.compute_s(cluster) for one in operations),
        "memory": sum(one.memory_s(cluster) for one in operations),
        "network": sum(one.network_s(cluster) for one in operations),
    }


def _ceilings(asked: Question, found: Answer) -> list[str]:
    cluster, tokens = asked.cluster, found.cost.dense_batch
    busy = sums(cluster, found.operations)
    in_turn = sum(one.least_s(cluster) for one in found.operations)
    longest = max(busy, key=lambda name: busy[name])
    bounds = (
        ("products alone, 2 FLOP a weight and token", tokens / found.cost.optimal_tokens_per_s),
        ("all that is computed", busy["compute"]),
        (f"operations side by side, {longest} never waiting", busy[longest]),
        ("operations one after another, each at its bound", in_turn),
    )
    width = max(len(name) for name, _ in bounds)
    lines = ["at most, in tokens/s of input and output:"]
    for name, seconds in bounds:
        rate = tokens / seconds
        lines.append(
            f"  {name.ljust(width)} {rate:>10,.0f}{rate / cluster.num_devices:>9,.0f} a device"
        )
    gain = in_turn / busy[longest]
    lines.append(f"overlap can gain {gain:.2f} x at most, before what splitting and sharing cost")
    return lines
