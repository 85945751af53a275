"""Which plan each bucket's layers run by, from the knobs."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from nanoflow_jax import config as config_lib
from nanoflow_jax.nanobatch import builders, plan_file
from nanoflow_jax.nanobatch.operations import LayerShape, Resource
from nanoflow_jax.nanobatch.plan import Plan
from nanoflow_jax.scheduler.buckets import Bucket

_LOG = logging.getLogger(__name__)


def choose(
    section: config_lib.PlanSection,
    buckets: Sequence[Bucket],
    shape: LayerShape,
    *,
    num_sms: int,
) -> dict[Bucket, Plan]:
    """The plan of each bucket.

    Args:
        section: The knobs.
        buckets: All of the engine.
        shape: Of the model's layers on its devices.
        num_sms: Of each device.

    Raises:
        ValueError: The file cannot be read, is no file of plans, or has plans that fit nothing.
    """
    chosen: dict[Bucket, Plan] = {}
    # What is interpreted on a CPU has fewer CTAs than a plan has lanes.
    num_sms = max(num_sms, len(Resource))
    if section.plan == "halves":
        chosen = {b: plan for b in buckets if (plan := _try_halve(section, b, shape, num_sms))}
        if not chosen:
            _LOG.warning(
                "--plan=halves cuts none of the buckets %s, and all run as with one; raise "
                "--dense_batch, or lower --plan_granule or --plan_min_tokens",
                ", ".join(map(str, buckets)),
            )
    elif section.plan != "one":
        chosen = _from_file(Path(section.plan), buckets, shape)
    for bucket in buckets:
        if bucket in chosen:
            plan = chosen[bucket]
            note = ", which may change last bits" if plan.changes_bits else ""
            _LOG.info("bucket %s runs by plan %s%s", bucket, plan.name, note)
    columns = by_columns(chosen.values())
    # Its sums over devices are parts of products, as nothing could run beside them.
    plain = shape if columns else LayerShape(is_sparse=shape.is_sparse)
    for bucket in buckets:
        if bucket not in chosen:
            chosen[bucket] = builders.one(
                plain, num_tokens=bucket.tokens, num_sms=num_sms, by_columns=columns
            )
    return {bucket: chosen[bucket] for bucket in buckets}


def by_columns(plans: Iterable[Plan]) -> frozenset[str]:
    """Products whose weight all plans want split by columns; see `nanobatch.operations`.

    Raises:
        ValueError: Some tokens want it so and others want it split along the summed axis: only one
            of the two is loaded.
    """
    takers: dict[tuple[str, str], str] = {}
    for plan in plans:
        for product in ("o", "down"):
            # Where there is no choice, the product sums by itself.
            for way in plan.ways.get(product, {"reduce"}):
                takers.setdefault((product, way), plan.name)
    found = frozenset(product for product, way in takers if way == "gather")
    for product in sorted(found):
        if (product, "reduce") in takers:
            raise ValueError(
                f"plan {takers[product, 'gather']!r} wants the weight of {product} split by "
                f"columns and plan {takers[product, 'reduce']!r} along the summed axis, and it is "
                "held once; take one way in all plans and for all of their tokens"
            )
    return found


def _try_halve(
    section: config_lib.PlanSection, bucket: Bucket, shape: LayerShape, num_sms: int
) -> Plan | None:
    """Halves of a bucket that has tokens enough, the parts of halves too where there are any."""
    parts = 2 if shape.num_devices == 1 else 4
    if bucket.tokens < max(section.plan_min_tokens, parts * section.plan_granule):
        return None
    device = builders.share_out(num_sms, granule=section.plan_granule)
    if shape.num_devices == 1:
        return builders.halves(shape, num_tokens=bucket.tokens, device=device)
    return builders.tensor_parallel(shape, num_tokens=bucket.tokens, gathers=False, device=device)


def _from_file(path: Path, buckets: Sequence[Bucket], shape: LayerShape) -> dict[Bucket, Plan]:
    try:
        plans = plan_file.read(path)
    except OSError as error:
        raise ValueError(
            f"--plan={path} cannot be read ({error.strerror}); name one, halves or a file of plans"
        ) from None
    found: dict[Bucket, Plan] = {}
    for plan in plans:
        if plan.shape not in (shape, LayerShape(is_sparse=shape.is_sparse)):
            raise ValueError(
                f"{path}: plan {plan.name!r} is for {plan.shape} and the model has {shape}; "
                "make one for this model and --tensor_parallel"
            )
        fitting = {bucket: plan for bucket in buckets if bucket.tokens == plan.num_tokens}
        if not fitting:
            raise ValueError(
                f"{path}: plan {plan.name!r} is for {plan.num_tokens} tokens and buckets have "
                f"{', '.join(str(b.tokens) for b in buckets)}; add {plan.num_tokens}:... to "
                "--buckets, or remove the plan"
            )
        found |= fitting
    return found
