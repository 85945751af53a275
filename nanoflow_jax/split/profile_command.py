"""`profile`: measures this end's layers, a gateway's, and the link, for plans to be made with."""

import asyncio
import contextlib
import dataclasses
import datetime
import importlib.metadata
import os
import pathlib
from collections.abc import Callable, Sequence

import jax
import numpy as np
from absl import flags as absl_flags

from nanoflow_jax import config as config_lib
from nanoflow_jax import console
from nanoflow_jax import flags as knob_flags
from nanoflow_jax.engine import model_source
from nanoflow_jax.split import (
    client_ends,
    command_flags,
    errors,
    link,
    measuring,
    messages,
    profile_files,
    settings,
    stand_in,
    transport,
)
from nanoflow_jax.split.planning import segments
from nanoflow_jax.split.planning.choosing import Ends
from nanoflow_jax.split.planning.costs import Model
from nanoflow_jax.split.planning.profiles import DeviceProfile, LinkProfile

_PROBES = 3
_Ours = tuple[config_lib.EngineConfig, model_source.ModelSource]


def define(values: absl_flags.FlagValues) -> None:
    """Defines the command's flags."""
    client_ends.define(
        values,
        layers_help="Layers that this end can run, as 0:2 or 0:2,6:8. Empty: all.",
    )
    common = knob_flags.of_program(values)
    absl_flags.DEFINE_string("out", None, "Folder for the profiles, made if need be.", **common)
    absl_flags.DEFINE_list(
        "prompt_lens", ["32", "128", "512"], "Prompts to time, of at least three lengths.", **common
    )
    absl_flags.DEFINE_integer(
        "num_steps", 16, "Further tokens to time after each prompt.", lower_bound=1, **common
    )
    absl_flags.DEFINE_integer(
        "probe_bytes",
        1 << 20,
        "To send each way over the link, three times.",
        lower_bound=1,
        **common,
    )


def run(values: absl_flags.FlagValues, say: Callable[[str], None]) -> int:
    """Measures and writes; returns the exit code.

    Args:
        values: The flags.
        say: Shows lines of the answer.

    Raises:
        ValueError: Flags, model or files cannot be used.
        RunError: The gateway refuses, or was lost.
    """
    if not values.out:
        raise ValueError("--out names the folder that the profiles are written to")
    lens = _lens(values.prompt_lens)
    config = knob_flags.engine_config(values)
    sections: client_ends.Sections = knob_flags.composed(client_ends.Sections, values)
    where = client_ends.endpoint(values)
    source = model_source.open_model(config.model)
    held = command_flags.ranges(values.layers) or ((0, source.config.num_layers),)
    model = Model(profile_files.model_name(config.model), source.config)
    made = _Profiler(
        where=where,
        ours=(config, source),
        model=model,
        knobs=sections.client,
        held=held,
        prompt_lens=lens,
        num_steps=values.num_steps,
        probe_bytes=values.probe_bytes,
    )
    try:
        ends = asyncio.run(made.ends())
    except errors.SplitError as error:
        raise console.RunError(str(error)) from error
    profile_files.write(pathlib.Path(values.out), ends)
    for profile in (ends.client, ends.server, ends.link):
        say(f"{profile.name}: {profile.source}")
    say(_link_text(ends.link))
    return 0


def _lens(texts: Sequence[str]) -> tuple[int, ...]:
    lens = tuple(int(text) for text in texts if text.strip().isdecimal())
    if len(lens) != len(texts) or len(set(lens)) < 3 or min(lens) < 1:
        raise ValueError(
            f"--prompt_lens={','.join(texts)} are not three or more lengths, such as 32,128,512"
        )
    return lens


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Profiler:
    """What is measured, and of what."""

    where: transport.Endpoint
    ours: _Ours
    model: Model
    knobs: settings.ClientSection
    held: tuple[tuple[int, int], ...]
    prompt_lens: tuple[int, ...]
    num_steps: int
    probe_bytes: int

    async def ends(self) -> Ends:
        """Both machines and the link, the gateway's first: it may not be there."""
        offer = await client_ends.ask(self.where, self.ours, self.knobs)
        server, measured_link = await self._far(offer)
        return Ends(model=self.model, client=self._near(offer), server=server, link=measured_link)

    async def _far(self, offer: messages.Offer) -> tuple[DeviceProfile, LinkProfile]:
        num_layers = self.model.config.num_layers
        knobs = dataclasses.replace(self.knobs, chunk_len=offer.max_rows)
        engine = stand_in.StandIn(width=self.model.config.hidden_size, num_layers=num_layers)
        made = client_ends.make_client(
            self.where, self.ours, knobs, engine=engine, layers=self.held
        )
        async with made:
            probes = [await made.probe(num_bytes=self.probe_bytes) for _ in range(_PROBES)]
            timed = await measuring.time_gateway(
                made,
                measuring.cuts(offer.borders, self.held),
                prompt_lens=self.prompt_lens,
                num_steps=self.num_steps,
                say=command_flags.tell,
            )
        name = f"gateway {self.where.address}"
        weights = sum(node.parameters for node in self.model.nodes) * self._bits / 8
        server = self._device(
            name,
            timed,
            memory_bytes=weights,
            about=f"nanoflow_jax {offer.build}; no more memory "
            "than its weights take is known of it",
        )
        return server, _link(name, probes, self.probe_bytes)

    def _near(self, offer: messages.Offer) -> DeviceProfile:
        config, source = self.ours
        with contextlib.closing(
            client_ends.build_engine(config, source, self.held, grid=offer.borders[1:-1])
        ) as engine:
            timed = measuring.time_engine(
                engine,
                measuring.ranges(offer.borders, self.held),
                prompt_lens=self.prompt_lens,
                num_steps=self.num_steps,
                width=self.model.config.hidden_size,
                num_layers=self.model.config.num_layers,
                say=command_flags.tell,
            )
        device = jax.devices()[0]
        versions = ", ".join(
            f"{name} {importlib.metadata.version(name)}" for name in ("nanoflow_jax", "jax")
        )
        name = f"{device.device_kind} ({device.platform})"
        return self._device(name, timed, memory_bytes=_memory_bytes(device), about=versions)

    @property
    def _bits(self) -> int:
        config, source = self.ours
        return 8 * int(np.dtype(client_ends.dtype(config.model, source)).itemsize)

    def _device(
        self, name: str, timed: Sequence[segments.Timed], *, memory_bytes: float, about: str
    ) -> DeviceProfile:
        fitted = segments.fit_nodes(self.model, timed)
        return DeviceProfile(
            name=name,
            source=f"measured {_today()}, one request at a time; {about}; the fit is "
            f"{100 * fitted.prefill_error:.0f} % off for prompts and "
            f"{100 * fitted.step_error:.0f} % for steps",
            memory_bytes=memory_bytes,
            weight_bits=self._bits,
            kv_bits=self._bits,
            batch=1,
            model=self.model.name,
            times=fitted.times,
        )


def _link(name: str, probes: Sequence[link.Link], num_bytes: int) -> LinkProfile:
    """Of a few probes: means of bytes, and the slowest for deadlines."""
    up = [one.up_bytes_per_s for one in probes]
    down = [one.down_bytes_per_s for one in probes]
    return LinkProfile(
        name=f"link to {name}",
        source=f"measured {_today()} by {len(probes)} times 8 pings and {num_bytes} bytes each way",
        rtt_p50_s=sorted(one.rtt_p50_s for one in probes)[len(probes) // 2],
        rtt_p95_s=max(one.rtt_p95_s for one in probes),
        up_bytes_per_s=sum(up) / len(up),
        up_p10_bytes_per_s=min(up),
        down_bytes_per_s=sum(down) / len(down),
        down_p10_bytes_per_s=min(down),
        serialisation_s=0.0,
    )


def _link_text(found: LinkProfile) -> str:
    return (
        f"round trip {found.rtt_p50_s * 1e3:.2f} ms, {found.rtt_p95_s * 1e3:.2f} ms at most; "
        f"{found.up_bytes_per_s * 8e-6:,.0f} Mbit/s up, {found.down_bytes_per_s * 8e-6:,.0f} down"
    )


def _memory_bytes(device: jax.Device) -> float:
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _today() -> str:
    return datetime.datetime.now(tz=datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
