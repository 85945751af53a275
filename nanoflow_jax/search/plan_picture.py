"""Draws the pipeline of a plan in time, as predicted by the roofline."""

import pathlib

from nanoflow_jax.cost import datasheets, timeline
from nanoflow_jax.cost.steady_state import Mix
from nanoflow_jax.models import architecture
from nanoflow_jax.nanobatch import plan_file
from nanoflow_jax.nanobatch.plan import Plan
from nanoflow_jax.results import gantt
from nanoflow_jax.scheduler.buckets import Bucket

_SHOWN_LAYERS = 3


def draw(
    path: str, config: architecture.ModelConfig, *, device: str, mix: Mix, tokens: int | None
) -> tuple[str, str]:
    """A picture of some layers in the middle of the model, and its title.

    Args:
        path: A file of plans.
        config: The model.
        device: Of which the datasheet is known.
        mix: The requests of the batch.
        tokens: Of the dense batch: which plan of the file; None for the largest.

    Raises:
        ValueError: There is no such plan, or nothing is known of the device or of an operation.
    """
    sheet = datasheets.accelerator(device)
    if not isinstance(sheet, datasheets.Datasheet):
        raise ValueError(f"--device={device} has no number of SMs; take one without paper:")
    plan = _plan(path, tokens)
    rows = mix.decode_rows(plan.num_tokens)
    chunks = mix.chunks(plan.num_tokens - rows)
    found = timeline.predict_step(
        config,
        plan,
        Bucket(tokens=plan.num_tokens, decode_rows=rows, prefill_rows=chunks),
        timeline.Contexts(decode_len=mix.decode_context, prefix_len=mix.prefix),
        sheet,
    )
    middle = max(config.num_layers // 2 - 1, 0)
    title = (
        f"{plan.name}, {plan.num_tokens} tokens of {mix}, {sheet.name}: a layer in "
        f"{found.period_s * 1e6:.0f} us, nothing split {found.plain_s * 1e6:.0f} us"
    )
    picture = gantt.draw(
        found.spans,
        title=title,
        first_layer=middle,
        num_layers=_SHOWN_LAYERS,
        num_sms=plan.num_sms,
    )
    return picture, title


def _plan(path: str, tokens: int | None) -> Plan:
    try:
        plans = {plan.num_tokens: plan for plan in plan_file.read(pathlib.Path(path))}
    except OSError as error:
        raise ValueError(f"--plan={path} cannot be read: {error.strerror}") from error
    wanted = max(plans) if tokens is None else tokens
    if wanted not in plans:
        raise ValueError(
            f"--dense_batch={wanted}: {path} has plans for {', '.join(map(str, sorted(plans)))}"
        )
    return plans[wanted]
