"""Results of simulations as JSON, from which pictures are drawn."""

import dataclasses
import json
import pathlib
from typing import Any

from nanoflow_jax.simulator.measures import Interval, Spread, Summary

SCHEMA = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneRate:
    """A run at one rate.

    Attributes:
        rate: Requests per second; None: all were there at once.
        summary: In numbers.
        timeline: What was busy when.
    """

    rate: float | None
    summary: Summary
    timeline: tuple[Interval, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Simulation:
    """What was simulated and what came of it.

    Attributes:
        name: Of the requests.
        title: Model, devices and requests, for people.
        settings: All that it depends on, by name.
        source: Where times of steps come from.
        num_devices: All of them; speeds are given for each.
        optimal_tokens_per_s: If the fastest product never waited; of all devices.
        runs: At each rate.
    """

    name: str
    title: str
    settings: dict[str, Any]
    source: str
    num_devices: int
    optimal_tokens_per_s: float
    runs: tuple[OneRate, ...]


def write(found: Simulation, path: pathlib.Path) -> None:
    """Writes a simulation.

    Raises:
        OSError: The file cannot be written.
    """
    content = {"schema": SCHEMA, **dataclasses.asdict(found)}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read(path: pathlib.Path) -> Simulation:
    """A simulation that `write` wrote.

    Raises:
        ValueError: It is no such file.
        OSError: It cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("schema") != SCHEMA:
            raise ValueError(f"its schema is not {SCHEMA}")
        content["runs"] = tuple(_run(one) for one in content["runs"])
        return Simulation(**content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is no result of a simulation of this version ({error}); write it with "
            "search simulate --output"
        ) from None


def _run(content: dict[str, Any]) -> OneRate:
    summary = dict(content["summary"])
    for name in ("ttft_s", "tpot_s", "normalised_s"):
        summary[name] = Spread(**summary[name]) if summary[name] is not None else None
    return OneRate(
        rate=content["rate"],
        summary=Summary(**summary),
        timeline=tuple(Interval(**one) for one in content["timeline"]),
    )
