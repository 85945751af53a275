"""`plan`: where one request's layers would run, what that comes to, and what deadlines cost."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

from absl import flags as absl_flags

from nanoflow_jax import flags
from nanoflow_jax.models import named, presets
from nanoflow_jax.results import picture_file
from nanoflow_jax.split import cut
from nanoflow_jax.split.planning import drawing, planner, profile_file, report
from nanoflow_jax.split.planning.asked import Policy, Prices, Request, Side
from nanoflow_jax.split.planning.costs import Accounting, Model

_SIDES = {"any": None, "client": Side.CLIENT, "server": Side.SERVER}
_MILLI = 1e-3


def define(values: absl_flags.FlagValues) -> None:
    """Defines the command's flags."""
    common = flags.of_program(values)
    absl_flags.DEFINE_string(
        "model",
        None,
        f"A model folder, or one of {', '.join(presets.names())}.",
        **common,
    )
    for name, what in (("client", "client"), ("server", "server"), ("link", "link")):
        absl_flags.DEFINE_string(name, None, f"JSON profile of the {what}.", **common)
    _define_request(values)
    define_policy(values)
    absl_flags.DEFINE_string(
        "plot", None, "Also draw the plan and the frontier: FILE.png, .svg or .html.", **common
    )


def _define_request(values: absl_flags.FlagValues) -> None:
    common = flags.of_program(values)
    absl_flags.DEFINE_integer("prompt_len", 512, "Tokens of the prompt.", **common)
    absl_flags.DEFINE_float("output_len", 128, "Tokens that are generated, on average.", **common)
    absl_flags.DEFINE_integer(
        "output_len_high",
        None,
        "Tokens that deadlines and memory are kept for; unset: the average.",
        **common,
    )
    define_deadlines(values)


def define_deadlines(values: absl_flags.FlagValues) -> None:
    """Defines flags of a request's deadlines."""
    for name, what in (
        ("ttft_ms", "the first token"),
        ("tpot_ms", "each further token"),
        ("e2e_ms", "the whole answer"),
    ):
        absl_flags.DEFINE_float(
            name, None, f"Deadline of {what}; unset: none.", **flags.of_program(values)
        )


def deadlines(values: absl_flags.FlagValues) -> dict[str, float | None]:
    """What the flags of `define_deadlines` say, by the names that `Request` has for them."""
    found = {}
    for name in ("ttft", "tpot", "e2e"):
        value = _value(values, f"{name}_ms")
        found[f"{name}_s"] = None if value is None else value * _MILLI
    return found


def define_judgement(values: absl_flags.FlagValues, **other: Any) -> None:
    """Defines flags of how placements are judged.

    Args:
        values: Where they go.
        other: Defaults that are not the policy's own.
    """
    common = flags.of_program(values)
    default = dataclasses.replace(Policy(), **other)
    absl_flags.DEFINE_enum(
        "accounting",
        str(default.accounting),
        [str(one) for one in Accounting],
        "What a request is charged: what it adds to steps that run anyway, its share of them, or "
        "the first and the memory of its cached tokens, each at its price.",
        **common,
    )
    absl_flags.DEFINE_float("second_price", 1.0, "Of a second of the server; priced.", **common)
    absl_flags.DEFINE_float(
        "gigabyte_second_price", 0.0, "Of its memory for cached tokens; priced.", **common
    )
    absl_flags.DEFINE_float(
        "guard", default.guard, "Keep deadlines with this share of their time.", **common
    )
    absl_flags.DEFINE_float(
        "least_saving",
        default.least_saving,
        "A split must save this share of the server's charge.",
        **common,
    )
    absl_flags.DEFINE_boolean(
        "best_effort",
        False,
        "Let the server do all of a request whose deadlines nothing meets.",
        **common,
    )


def define_policy(values: absl_flags.FlagValues) -> None:
    """Defines flags of what placements may look like, with the policy's own defaults."""
    define_judgement(values)
    common = flags.of_program(values)
    default = Policy()
    absl_flags.DEFINE_integer(
        "grid",
        default.grid,
        "Change the machine only before each n-th layer; 0: between any two nodes.",
        **common,
    )
    absl_flags.DEFINE_boolean(
        "migrate", False, "Decode may be placed otherwise than prefill.", **common
    )
    absl_flags.DEFINE_list(
        "client_layers",
        None,
        "Layers that the client holds, as 0:8,28:32; unset: the whole model.",
        **common,
    )
    absl_flags.DEFINE_integer(
        "client_first", 0, "The first so many layers run on the client.", **common
    )
    absl_flags.DEFINE_integer(
        "client_last", 0, "The last so many layers run on the client.", **common
    )
    for name in ("embedding", "head"):
        absl_flags.DEFINE_enum(name, "any", list(_SIDES), f"Where the {name} must run.", **common)


def _value(values: absl_flags.FlagValues, name: str) -> Any:
    return values[name].value


def judged(values: absl_flags.FlagValues, **of_places: Any) -> Policy:
    """The policy that the flags of `define_judgement` and more say.

    Args:
        values: The flags.
        of_places: What placements may look like.

    Raises:
        ValueError: One of them is out of its range.
    """
    return Policy(
        accounting=Accounting(_value(values, "accounting")),
        prices=Prices(
            second=_value(values, "second_price"),
            gigabyte_second=_value(values, "gigabyte_second_price"),
        ),
        guard=_value(values, "guard"),
        least_saving=_value(values, "least_saving"),
        best_effort=_value(values, "best_effort"),
        **of_places,
    )


def policy(values: absl_flags.FlagValues) -> Policy:
    """What the flags of `define_policy` say.

    Raises:
        ValueError: One of them is out of its range.
    """
    return judged(
        values,
        grid=_value(values, "grid"),
        migrates=_value(values, "migrate"),
        held_layers=_layers(_value(values, "client_layers")),
        pinned_first=_value(values, "client_first"),
        pinned_last=_value(values, "client_last"),
        embedding=_SIDES[_value(values, "embedding")],
        head=_SIDES[_value(values, "head")],
    )


def _layers(ranges: list[str] | None) -> tuple[tuple[int, int], ...] | None:
    if ranges is None:
        return None
    found = []
    for one in ranges:
        layers = cut.try_range(one)
        if layers is None:
            raise ValueError(f"--client_layers has {one!r}; wanted START:STOP, as 0:8")
        found.append(layers)
    return tuple(found)


def _request(values: absl_flags.FlagValues) -> Request:
    return Request(
        prompt_len=_value(values, "prompt_len"),
        output_len=_value(values, "output_len"),
        output_len_high=_value(values, "output_len_high"),
        **deadlines(values),
    )


def _path(values: absl_flags.FlagValues, name: str) -> pathlib.Path:
    path = _value(values, name)
    if not path:
        raise ValueError(f"--{name} names the JSON profile of the {name}, as in configs/split")
    return pathlib.Path(path)


def run(values: absl_flags.FlagValues, say: Callable[[str], None]) -> int:
    """Plans, says it and perhaps draws it."""
    name, config = named.read(_value(values, "model"))
    asked = report.Question(
        model=Model(name, config),
        client=profile_file.read_device(_path(values, "client")),
        server=profile_file.read_device(_path(values, "server")),
        link=profile_file.read_link(_path(values, "link")),
        request=_request(values),
        policy=policy(values),
    )
    verdict = planner.plan(*asked.ends, asked.request, asked.policy)
    points = planner.frontier(*asked.ends, asked.request, asked.policy)
    if _value(values, "plot"):
        picture = drawing.draw(asked, verdict, points)
        picture_file.save(picture, _value(values, "plot"), title=report.title(asked), flag="plot")
    say(report.text(asked, verdict, points))
    return 0
