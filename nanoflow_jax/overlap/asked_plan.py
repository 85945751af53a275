"""The plan that is asked for a batch, which an engine may have to do without."""

import pathlib

from nanoflow_jax import config as config_lib
from nanoflow_jax.engine import plan_choice
from nanoflow_jax.nanobatch import plan_file
from nanoflow_jax.nanobatch.operations import LayerShape
from nanoflow_jax.nanobatch.plan import Plan
from nanoflow_jax.scheduler.buckets import Bucket

_PLAIN, _HALVES = "one", "halves"


def find(
    section: config_lib.PlanSection, bucket: Bucket, shape: LayerShape, *, num_sms: int
) -> Plan:
    """The plan of a batch, of those that the knobs ask for.

    Args:
        section: The knobs.
        bucket: The batch.
        shape: Of the model's layers on its devices.
        num_sms: Of each device.

    Raises:
        ValueError: There is none for a batch of this size, or the file of plans cannot be used.
    """
    sizes = [] if section.plan in (_PLAIN, _HALVES) else _sizes(section.plan)
    others = (Bucket(tokens=n, decode_rows=n, prefill_rows=0) for n in sizes if n != bucket.tokens)
    plan = plan_choice.choose(section, [bucket, *others], shape, num_sms=num_sms)[bucket]
    if sizes and bucket.tokens not in sizes:
        raise ValueError(
            f"{section.plan} has plans for {', '.join(map(str, sizes))} tokens and none for "
            f"--tokens={bucket.tokens}; ask for one of those"
        )
    if section.plan == _HALVES and plan.name == _PLAIN:
        raise ValueError(
            f"--plan={_HALVES} does not cut --tokens={bucket.tokens}; take more of them, a smaller "
            "--plan_granule or a smaller --plan_min_tokens"
        )
    return plan


def _sizes(name: str) -> list[int]:
    """Of the plans of a file; none if it cannot be read, which `plan_choice` says."""
    try:
        return [plan.num_tokens for plan in plan_file.read(pathlib.Path(name))]
    except OSError:
        return []
