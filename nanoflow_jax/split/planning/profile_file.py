"""Profiles as JSON, read strictly: one machine or one link a file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from nanoflow_jax import json_fields
from nanoflow_jax.cost import datasheets
from nanoflow_jax.json_fields import Fields
from nanoflow_jax.split.planning.profiles import DeviceProfile, Hardware, LinkProfile, NodeTimes

SCHEMA = 1
_MICRO, _MILLI, _GIGA, _TERA = 1e-6, 1e-3, 1e9, 1e12
_MBIT = 1e6 / 8  # bytes

_Profile = TypeVar("_Profile")


def read_device(path: Path) -> DeviceProfile:
    """The machine that a file describes.

    Raises:
        ValueError: It is not such a file.
        OSError: It cannot be read.
    """
    return _read(path, _device)


def read_link(path: Path) -> LinkProfile:
    """The link that a file describes.

    Raises:
        ValueError: It is not such a file.
        OSError: It cannot be read.
    """
    return _read(path, _link)


def device_json(profile: DeviceProfile) -> str:
    """A machine in the form that `read_device` reads."""
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "device": profile.name,
        "source": profile.source,
        "memory_gb": profile.memory_bytes / _GIGA,
        "weight_bits": profile.weight_bits,
        "kv_bits": profile.kv_bits,
        "batch": profile.batch,
    }
    if profile.hardware is not None:
        content["hardware"] = {
            "teraflops": profile.hardware.flops_per_s / _TERA,
            "gigabytes_per_s": profile.hardware.memory_bytes_per_s / _GIGA,
            "overhead_us": profile.hardware.overhead_s / _MICRO,
        }
    if profile.times:
        nodes = {name: _times_json(times) for name, times in profile.times.items()}
        content["measured"] = {"model": profile.model, "nodes": nodes}
    return json.dumps(content, indent=1) + "\n"


def link_json(profile: LinkProfile) -> str:
    """A link in the form that `read_link` reads."""
    content = {
        "schema": SCHEMA,
        "link": profile.name,
        "source": profile.source,
        "rtt_ms": {"p50": profile.rtt_p50_s / _MILLI, "p95": profile.rtt_p95_s / _MILLI},
        "up_mbit_per_s": {
            "mean": profile.up_bytes_per_s / _MBIT,
            "p10": profile.up_p10_bytes_per_s / _MBIT,
        },
        "down_mbit_per_s": {
            "mean": profile.down_bytes_per_s / _MBIT,
            "p10": profile.down_p10_bytes_per_s / _MBIT,
        },
        "serialisation_us": profile.serialisation_s / _MICRO,
    }
    return json.dumps(content, indent=1) + "\n"


def _times_json(times: NodeTimes) -> dict[str, Any]:
    found: dict[str, Any] = {
        "prefill_us": [value / _MICRO for value in times.prefill_s],
        "decode_us": [value / _MICRO for value in times.decode_s],
    }
    if times.row_s is not None:
        found["row_us"] = times.row_s / _MICRO
    return found


def _read(path: Path, profile: Callable[[Fields], _Profile]) -> _Profile:
    try:
        top = Fields(json_fields.parse(path.read_text(encoding="utf-8")), "the file")
        schema = top.take("schema", int)
        if schema != SCHEMA:
            raise ValueError(
                f"schema {schema} is not {SCHEMA}, the one that this version reads; write the "
                "profile again with this version"
            )
        found = profile(top)
        top.finish()
        return found
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _device(top: Fields) -> DeviceProfile:
    model, times = "", {}
    if top.has("measured"):
        measured = _object(top, "measured")
        model = measured.take("model", str)
        nodes = measured.take("nodes", dict)
        times = {name: _times(Fields(one, f"nodes[{name!r}]")) for name, one in nodes.items()}
        measured.finish()
    return DeviceProfile(
        name=top.take("device", str),
        source=top.take("source", str),
        memory_bytes=top.take("memory_gb", float) * _GIGA,
        weight_bits=top.take("weight_bits", float),
        kv_bits=top.take("kv_bits", float),
        batch=top.take("batch", int),
        hardware=_hardware(_object(top, "hardware")) if top.has("hardware") else None,
        model=model,
        times=times,
    )


def _hardware(fields: Fields) -> Hardware:
    """Figures given, or a share of those of an accelerator's datasheet."""
    overhead_s = fields.take("overhead_us", float) * _MICRO
    if fields.has("accelerator"):
        sheet = datasheets.accelerator(fields.take("accelerator", str))
        flops = sheet.bf16_flops * fields.take("reached_flops", float)
        bandwidth = sheet.memory_bytes_per_s * fields.take("reached_bandwidth", float)
    else:
        flops = fields.take("teraflops", float) * _TERA
        bandwidth = fields.take("gigabytes_per_s", float) * _GIGA
    fields.finish()
    return Hardware(flops_per_s=flops, memory_bytes_per_s=bandwidth, overhead_s=overhead_s)


def _times(fields: Fields) -> NodeTimes:
    prefill = _coefficients(fields, "prefill_us", 3)
    decode = _coefficients(fields, "decode_us", 2)
    row = fields.take("row_us", float) * _MICRO if fields.has("row_us") else None
    fields.finish()
    return NodeTimes(
        prefill_s=(prefill[0], prefill[1], prefill[2]), decode_s=(decode[0], decode[1]), row_s=row
    )


def _coefficients(fields: Fields, name: str, count: int) -> tuple[float, ...]:
    values = fields.take_list(name, float)
    if len(values) != count:
        raise ValueError(f"{fields.where}.{name} has {len(values)} numbers; wanted {count}")
    return tuple(value * _MICRO for value in values)


def _link(top: Fields) -> LinkProfile:
    rtt = _object(top, "rtt_ms")
    up, down = _object(top, "up_mbit_per_s"), _object(top, "down_mbit_per_s")
    found = LinkProfile(
        name=top.take("link", str),
        source=top.take("source", str),
        rtt_p50_s=rtt.take("p50", float) * _MILLI,
        rtt_p95_s=rtt.take("p95", float) * _MILLI,
        up_bytes_per_s=up.take("mean", float) * _MBIT,
        up_p10_bytes_per_s=up.take("p10", float) * _MBIT,
        down_bytes_per_s=down.take("mean", float) * _MBIT,
        down_p10_bytes_per_s=down.take("p10", float) * _MBIT,
        serialisation_s=top.take("serialisation_us", float) * _MICRO,
    )
    for one in (rtt, up, down):
        one.finish()
    return found


def _object(fields: Fields, name: str) -> Fields:
    return Fields(fields.take(name, dict), f"{fields.where}.{name}")
