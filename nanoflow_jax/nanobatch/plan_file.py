"""Plans as JSON: one line for each nano-operation, read strictly."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanoflow_jax import json_fields
from nanoflow_jax.json_fields import Fields
from nanoflow_jax.nanobatch import legality, operations
from nanoflow_jax.nanobatch.operations import Resource
from nanoflow_jax.nanobatch.plan import NanoOperation, Plan, TokenRange

SCHEMA = 1


def read(path: Path) -> tuple[Plan, ...]:
    """The plans of a file, one for each size of dense batch.

    Raises:
        ValueError: It is not such a file, or a plan is not legal.
        OSError: It cannot be read.
    """
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def from_json(text: str) -> tuple[Plan, ...]:
    """The plans of a text that `to_json` wrote, or a person in its form.

    Raises:
        ValueError: It has another form, or a plan is not legal.
    """
    top = Fields(json_fields.parse(text), "the file")
    schema = top.take("schema", int)
    if schema != SCHEMA:
        raise ValueError(
            f"schema {schema} is not {SCHEMA}, the one that this version reads; write the plans "
            "again with this version"
        )
    plans = tuple(
        _plan(Fields(entry, f"plans[{i}]")) for i, entry in enumerate(top.take("plans", list))
    )
    top.finish()
    if not plans:
        raise ValueError("plans is empty; give at least one")
    sizes = [plan.num_tokens for plan in plans]
    for size in sizes:
        if sizes.count(size) > 1:
            raise ValueError(f"two plans are for {size} tokens; keep one")
    return plans


def to_json(plans: Sequence[Plan]) -> str:
    """Plans as JSON."""
    heads = []
    for plan in plans:
        fields = {
            "name": plan.name,
            "is_sparse": plan.shape.is_sparse,
            "num_devices": plan.shape.num_devices,
            "num_tokens": plan.num_tokens,
            "granule": plan.granule,
            "num_sms": plan.num_sms,
            "decode_weights": plan.decode_weights,
            "changes_bits": plan.changes_bits,
        }
        head = "".join(f"    {json.dumps(k)}: {json.dumps(v)},\n" for k, v in fields.items())
        order = ",\n".join(f"      {json.dumps(_nano_fields(nano))}" for nano in plan.order)
        heads.append(f'   {{\n{head}    "order": [\n{order}\n    ]\n   }}')
    return f'{{\n "schema": {SCHEMA},\n "plans": [\n' + ",\n".join(heads) + "\n ]\n}\n"


def _nano_fields(nano: NanoOperation) -> dict[str, Any]:
    """What differs from the default, in words of JSON."""
    fields: dict[str, Any] = {"operation": nano.operation, "tokens": nano.tokens}
    if nano.lane is not None:
        fields["lane"] = nano.lane.value
    if nano.num_ctas is not None:
        fields["num_ctas"] = nano.num_ctas
    if nano.shift:
        fields["shift"] = nano.shift
    if nano.after:
        fields["after"] = nano.after
    return fields


def _plan(fields: Fields) -> Plan:
    shape = operations.LayerShape(
        is_sparse=fields.take("is_sparse", bool), num_devices=fields.take("num_devices", int)
    )
    changes_bits = fields.take("changes_bits", bool)
    plan = Plan(
        name=fields.take("name", str),
        shape=shape,
        num_tokens=fields.take("num_tokens", int),
        granule=fields.take("granule", int),
        num_sms=fields.take("num_sms", int),
        decode_weights=fields.take_list("decode_weights", int),
        order=tuple(
            _nano_operation(Fields(entry, f"{fields.where}.order[{i}]"))
            for i, entry in enumerate(fields.take("order", list))
        ),
    )
    fields.finish()
    legality.check(plan)
    if plan.changes_bits != changes_bits:
        raise ValueError(
            f"{fields.where}.changes_bits is {changes_bits}, but what the plan cuts says "
            f"{plan.changes_bits}; write that"
        )
    return plan


def _nano_operation(fields: Fields) -> NanoOperation:
    tokens = fields.take_list("tokens", int)
    if len(tokens) != 2:
        raise ValueError(f"{fields.where}.tokens is {list(tokens)}; wanted [start, stop]")
    nano = NanoOperation(
        operation=fields.take("operation", str),
        tokens=TokenRange(*tokens),
        lane=_lane(fields) if fields.has("lane") else None,
        num_ctas=fields.take("num_ctas", int) if fields.has("num_ctas") else None,
        shift=fields.take("shift", int, default=0),
        after=fields.take_list("after", str, default=[]),
    )
    fields.finish()
    return nano


def _lane(fields: Fields) -> Resource:
    name = fields.take("lane", str)
    if name not in list(Resource):
        raise ValueError(f"{fields.where}.lane is {name!r}; wanted one of {', '.join(Resource)}")
    return Resource(name)
