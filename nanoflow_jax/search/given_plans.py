"""Plans that a user gives in a file, for a model and devices that they must fit."""

import dataclasses
import pathlib

from nanoflow_jax.cost.datasheets import Accelerator, Datasheet
from nanoflow_jax.models import architecture
from nanoflow_jax.nanobatch import plan_file
from nanoflow_jax.nanobatch.operations import LayerShape
from nanoflow_jax.nanobatch.plan import Plan


def read(path: str, shape: LayerShape, device: Accelerator) -> dict[int, Plan]:
    """The plans of a file by their dense batch.

    Args:
        path: The file.
        shape: Of the model's layers on the devices that share them.
        device: Each of these.

    Raises:
        ValueError: It cannot be read, a plan is not legal or is for other layers, devices or SMs.
    """
    if not isinstance(device, Datasheet):
        raise ValueError(
            f"--device={device.name} has no number of SMs, which plans share out; take one without "
            "paper:"
        )
    try:
        plans = plan_file.read(pathlib.Path(path))
    except OSError as error:
        raise ValueError(f"--plan={path} cannot be read: {error.strerror}") from error
    for plan in plans:
        if plan.shape != shape:
            raise ValueError(
                f"--plan={path}: plan {plan.name!r} is for {_layers(plan.shape)}, and the model "
                f"has {_layers(shape)}; give the model and --devices that it is made for"
            )
        if plan.num_sms != device.num_sms:
            raise ValueError(
                f"--plan={path}: plan {plan.name!r} shares out {plan.num_sms} SMs, and a "
                f"{device.name} has {device.num_sms}; give the --device that it is made for"
            )
    return {plan.num_tokens: plan for plan in plans}


def shape(config: architecture.ModelConfig, *, num_devices: int) -> LayerShape:
    """Of a model's layers, which so many devices share."""
    return dataclasses.replace(config.layer_shape, num_devices=num_devices)


def choose(path: str, plans: dict[int, Plan], tokens: float | None) -> Plan:
    """The plan of a dense batch; without one, the largest.

    Raises:
        ValueError: The file has none of that size.
    """
    wanted = max(plans) if tokens is None else tokens
    if wanted not in plans:
        raise ValueError(
            f"--dense_batch={wanted:g}: {path} has plans for {', '.join(map(str, sorted(plans)))}"
        )
    return plans[int(wanted)]


def _layers(shape: LayerShape) -> str:
    kind = "sparse" if shape.is_sparse else "dense"
    return f"{kind} layers on {shape.num_devices} device{'' if shape.num_devices == 1 else 's'}"
