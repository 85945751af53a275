"""`study`: what planning is worth in our own setting, as tables in Markdown."""

import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from absl import flags as absl_flags

from nanoflow_jax import flags
from nanoflow_jax.models import named, presets
from nanoflow_jax.results import picture_file
from nanoflow_jax.split.planning import profile_file, region_chart, study
from nanoflow_jax.split.planning.baselines import GREEDY
from nanoflow_jax.split.planning.costs import Accounting, Model
from nanoflow_jax.split.planning.planner import VerdictKind
from nanoflow_jax.split.planning.profiles import DeviceProfile, LinkProfile
from nanoflow_jax.split.planning.region_chart import Region
from nanoflow_jax.split.planning.study import Gains, Setting

CLIENTS = ("phone", "laptop", "mac", "gpu")
SERVERS = ("h100", "l4")
LINKS = ("lan", "fibre", "wifi", "mobile")
_SLACKS = (1.1, 1.5, 2.0, 3.0, 4.0)
_RTTS_MS = (2, 10, 30, 80)
_THIRD = 1 / 3


def define(values: absl_flags.FlagValues) -> None:
    """Defines the command's flags."""
    common = flags.of_program(values)
    absl_flags.DEFINE_string(
        "model",
        "llama-3-8b",
        f"A model folder, or one of {', '.join(presets.names())}.",
        **common,
    )
    absl_flags.DEFINE_string(
        "profiles",
        "configs/split",
        f"Folder of the profiles {', '.join((*CLIENTS, *SERVERS, *LINKS))}, as JSON files.",
        **common,
    )
    absl_flags.DEFINE_integer(
        "requests", 150, "How many are drawn for each setting.", lower_bound=1, **common
    )
    absl_flags.DEFINE_integer("seed", 0, "Of what is drawn.", **common)
    absl_flags.DEFINE_multi_enum(
        "accounting",
        [str(one) for one in Accounting],
        [str(one) for one in Accounting],
        "What requests are charged; may be given more than once.",
        **common,
    )
    absl_flags.DEFINE_boolean(
        "region", True, "Also look where a third of the server's time is saved.", **common
    )
    absl_flags.DEFINE_string(
        "plot", None, "Also draw where it is saved: .svg, .html or .png.", **common
    )


def run(values: absl_flags.FlagValues, say: Callable[[str], None]) -> int:
    """Works the tables out and says them."""

    def value(name: str) -> Any:
        return values[name].value

    name, config = named.read(value("model"))
    model, folder = Model(name, config), pathlib.Path(value("profiles"))
    machines = {
        name: profile_file.read_device(folder / f"{name}.json") for name in (*CLIENTS, *SERVERS)
    }
    links = [profile_file.read_link(folder / f"{name}.json") for name in LINKS]
    drawn: dict[str, Region] = {}
    for accounting in map(Accounting, value("accounting")):
        rows = (
            _row(
                name,
                study.gains(
                    model, setting, accounting, num_requests=value("requests"), seed=value("seed")
                ),
            )
            for name, setting in settings(machines, links).items()
        )
        say(f"{accounting} accounting, {value('requests')} requests for each setting:\n")
        say(_table(_HEADER, rows))
        if value("region") or value("plot"):
            regions = _regions(model, machines, links[LINKS.index("fibre")], accounting)
            say(_region_tables(regions))
            drawn |= {
                f"{where.replace('deadlines of ', '')}, {accounting}": region
                for where, region in regions.items()
            }
    if value("plot"):
        title = (
            f"{name}: least speed of clients, in laptops, that saves a third of the server's time; "
            "across, deadlines in times of the server's own"
        )
        picture = region_chart.draw(title, drawn, fastest=study.SPEEDS[-1], slowest=study.SPEEDS[0])
        picture_file.save(picture, value("plot"), title="Where a third is saved", flag="plot")
    return 0


def settings(
    machines: dict[str, DeviceProfile], links: Sequence[LinkProfile]
) -> dict[str, Setting]:
    """What is tried, by what a table calls it."""
    h100, l4 = (machines[name] for name in SERVERS)
    every = [machines[name] for name in CLIENTS]
    small = [machines[name] for name in ("phone", "laptop")]

    def one(
        server: DeviceProfile,
        clients: Sequence[DeviceProfile],
        low: float,
        high: float,
        **more: Any,
    ) -> Setting:
        return Setting(server=server, clients=clients, links=links, slack=(low, high), **more)

    return {
        "h100, answer in 1.1-2.5x": one(h100, every, 1.1, 2.5),
        "h100, answer in 1.05-1.5x": one(h100, every, 1.05, 1.5),
        "h100, answer in 1.5-4x": one(h100, every, 1.5, 4.0),
        "h100, answer in 1.1-4x, phone and laptop": one(h100, small, 1.1, 4.0),
        "h100, tokens in 1.1-2.5x": one(h100, every, 1.1, 2.5, has_two=True),
        "h100, tokens in 1.1-2.5x, migrating": one(
            h100, every, 1.1, 2.5, has_two=True, migrates=True
        ),
        "h100, one token in 1.05-3x": one(h100, every, 1.05, 3.0, output_lens=(1,)),
        "l4, answer in 1.1-2.5x, phone and laptop": one(l4, small, 1.1, 2.5),
        "l4, tokens in 1.05-1.5x": one(l4, every, 1.05, 1.5, has_two=True),
        "l4, tokens in 1.05-1.5x, migrating": one(
            l4, every, 1.05, 1.5, has_two=True, migrates=True
        ),
    }


_KINDS = (VerdictKind.ALL_SERVER, VerdictKind.SPLIT, VerdictKind.ALL_CLIENT)
_HEADER = (
    "setting",
    "load",
    "throughput",
    *(f"below {name}" for name in GREEDY),
    "below the best of them",
    "server / split / client",
)


def _row(name: str, found: Gains) -> tuple[str, ...]:
    return (
        name,
        f"{found.load:.3f}",
        f"x{found.throughput:.2f}",
        *(f"{100 * found.below[way]:.1f} %" for way in (*GREEDY, "best")),
        " / ".join(f"{100 * found.verdicts[kind]:.0f}" for kind in _KINDS) + " %",
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _regions(
    model: Model, machines: dict[str, DeviceProfile], link: LinkProfile, accounting: Accounting
) -> dict[str, Region]:
    """For each server and kind of deadline the slowest client that saves a third."""
    return {
        f"{server}, deadlines of {what}": {
            rtt_ms: {
                slack: study.least_speed(
                    model,
                    machines["laptop"],
                    machines[server],
                    link.with_rtt(rtt_ms * 1e-3),
                    accounting,
                    slack=slack,
                    has_two=has_two,
                    saved=_THIRD,
                )
                for slack in _SLACKS
            }
            for rtt_ms in _RTTS_MS
        }
        for server in SERVERS
        for has_two, what in ((False, "the whole answer"), (True, "tokens"))
    }


def _region_tables(regions: dict[str, Region]) -> str:
    parts = []
    for name, region in regions.items():
        header = [name, *(f"{slack:g}x" for slack in _SLACKS)]
        rows = [
            [
                f"round trip {rtt_ms:g} ms",
                *("none" if one is None else f"{one:.2g}" for one in line.values()),
            ]
            for rtt_ms, line in region.items()
        ]
        parts.append(_table(header, rows))
    return (
        "slowest client, in laptops, with which a third of it is saved at equal deadlines:\n\n"
        + "\n".join(parts)
    )
