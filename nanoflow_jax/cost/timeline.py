"""When each nano-operation of a plan would run, if each took the least time that it can.

A prediction from a roofline, to compare plans with: nothing here was measured.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from nanoflow_jax.cost.datasheets import Datasheet
from nanoflow_jax.cost.layer_work import Load, work
from nanoflow_jax.models import architecture
from nanoflow_jax.nanobatch import builders
from nanoflow_jax.nanobatch.dependencies import Dependencies
from nanoflow_jax.nanobatch.operations import Resource
from nanoflow_jax.nanobatch.plan import Plan
from nanoflow_jax.scheduler.buckets import Bucket


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contexts:
    """Cached tokens that a token sees, on average.

    Attributes:
        decode_len: Of decode rows.
        prefix_len: Of tokens of chunks.
    """

    decode_len: float
    prefix_len: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Span:
    """One nano-operation in time.

    Attributes:
        layer: Of the model.
        key: In the plan.
        resource: Its lane, or what bounds it where it is in none.
        num_ctas: SMs that it has.
        start_s: From the start of the first layer.
        end_s: Likewise.
    """

    layer: int
    key: str
    resource: Resource
    num_ctas: int
    start_s: float
    end_s: float


def durations(
    plan: Plan,
    config: architecture.ModelConfig,
    bucket: Bucket,
    contexts: Contexts,
    sheet: Datasheet,
) -> dict[str, float]:
    """The least time of each nano-operation with its share of the SMs, by its key.

    Raises:
        ValueError: The plan has operations of which nothing is known.
    """
    found = {}
    for place, (key, nano) in enumerate(zip(plan.keys, plan.order, strict=True)):
        load = Load(
            tokens=nano.tokens.length,
            decode_rows=round(bucket.decode_rows * nano.tokens.length / plan.num_tokens),
            context_len=contexts.decode_len,
            prefix_len=contexts.prefix_len,
        )
        share = plan.num_ctas(place) / plan.num_sms
        found[key] = work(config, nano.operation, load).seconds(sheet, share=share)
    return found


def predict(dependencies: Dependencies, durations_s: Mapping[str, float]) -> tuple[Span, ...]:
    """When each nano-operation would run: as soon as all that it waits for has ended."""
    plan = dependencies.plan
    spans = []
    times = times_s(dependencies, durations_s)
    for node, (start, end) in zip(dependencies.nodes, times, strict=True):
        key, nano = plan.keys[node.place], plan.order[node.place]
        spans.append(
            Span(
                layer=node.layer,
                key=key,
                resource=nano.lane or plan.graph.by_name[nano.operation].resource,
                num_ctas=plan.num_ctas(node.place),
                start_s=start,
                end_s=end,
            )
        )
    return tuple(spans)


def times_s(
    dependencies: Dependencies, durations_s: Mapping[str, float]
) -> list[tuple[float, float]]:
    """When each nano-operation would start and end, in order of issue."""
    seconds = [durations_s[key] for key in dependencies.plan.keys]
    found: list[tuple[float, float]] = []
    for node, firsts in zip(dependencies.nodes, dependencies.waits, strict=True):
        start = max([found[first][1] for first in firsts], default=0.0)
        found.append((start, start + seconds[node.place]))
    return found


def period_s(spans: Sequence[Span]) -> float:
    """Time from one layer to the next in the middle of the model, where all layers are alike."""
    ends: dict[int, float] = {}
    for span in spans:
        ends[span.layer] = max(ends.get(span.layer, 0.0), span.end_s)
    first, last = len(ends) // 4, max(len(ends) - 1 - len(ends) // 4, 0)
    if last <= first:
        return max(ends.values()) / len(ends)
    return (ends[last] - ends[first]) / (last - first)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """Predicted times of a step's layers.

    Attributes:
        durations_s: Of each nano-operation, by its key in the plan.
        spans: Of every nano-operation of every layer.
        period_s: Of one layer in the middle of the model.
        plain_s: Of one layer of which nothing is split and every operation has all SMs.
        critical_fraction: The longest chain of waits, of the sum over all layers.
    """

    durations_s: Mapping[str, float]
    spans: tuple[Span, ...]
    period_s: float
    plain_s: float
    critical_fraction: float

    @property
    def sum_s(self) -> float:
        """Of all nano-operations of one layer, one after another."""
        return sum(self.durations_s.values())


def predict_step(
    config: architecture.ModelConfig,
    plan: Plan,
    bucket: Bucket,
    contexts: Contexts,
    sheet: Datasheet,
) -> Prediction:
    """Predicted times of all layers of a model.

    Raises:
        ValueError: The plan has operations of which nothing is known.
    """
    durations_s = durations(plan, config, bucket, contexts, sheet)
    dependencies = Dependencies(plan, [plan.graph] * config.num_layers)
    spans = predict(dependencies, durations_s)
    total = sum(durations_s[plan.keys[node.place]] for node in dependencies.nodes)
    plain = builders.one(plan.shape, num_tokens=plan.num_tokens, num_sms=plan.num_sms)
    return Prediction(
        durations_s=durations_s,
        spans=spans,
        period_s=period_s(spans),
        plain_s=sum(durations(plain, config, bucket, contexts, sheet).values()),
        critical_fraction=dependencies.critical_path(durations_s).length_s / total,
    )
