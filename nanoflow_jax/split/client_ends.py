"""What programs at a client's end share: its flags, its engine, its way to the gateway."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags as absl_flags

from nanoflow_jax import config as config_lib
from nanoflow_jax import flags as knob_flags
from nanoflow_jax import start_up
from nanoflow_jax.engine import model_source
from nanoflow_jax.split import client as client_lib
from nanoflow_jax.split import command_flags, identity, interface, messages, settings, transport
from nanoflow_jax.split import engine as engine_lib

_KEY = "NANOFLOW_API_KEY"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sections:
    """Knobs of a client's end."""

    client: settings.ClientSection = dataclasses.field(default_factory=settings.ClientSection)


def define(values: absl_flags.FlagValues, *, layers_help: str) -> None:
    """Defines flags of an engine, a client, and its gateway.

    Args:
        values: Where they go.
        layers_help: What --layers says.
    """
    command_flags.define(values, Sections)
    common = knob_flags.of_program(values)
    absl_flags.DEFINE_string("gateway", "127.0.0.1:8100", "HOST:PORT of the gateway.", **common)
    absl_flags.DEFINE_boolean("tls", False, "Speak TLS; --tls_... say how.", **common)
    absl_flags.DEFINE_list("layers", [], layers_help, **common)


def endpoint(values: absl_flags.FlagValues) -> transport.Endpoint:
    """The gateway of --gateway, with the token of the environment.

    Raises:
        ValueError: The flag names none, or one that TLS is needed for.
    """
    host, port = config_lib.host_and_port("gateway", values.gateway, example="127.0.0.1:8100")
    return command_flags.endpoint(
        values, host, port, token=os.environ.get(_KEY, ""), uses_tls=values.tls
    )


def build_engine(
    config: config_lib.EngineConfig,
    source: model_source.ModelSource,
    layers: Sequence[tuple[int, int]],
    *,
    grid: Sequence[int] = (),
) -> engine_lib.SplitEngine:
    """The engine of a client that holds some layers.

    Args:
        config: The knobs.
        source: The opened model.
        layers: Ranges [start, stop), at least one.
        grid: Borders at which its pieces may begin and end beside those of the ranges.
    """
    return engine_lib.build_split_engine(
        _sized(config),
        source,
        grid=grid,
        layers=layers,
        reports=start_up.reports(command_flags.tell),
    )


def make_client(
    where: transport.Endpoint,
    ours: tuple[config_lib.EngineConfig, model_source.ModelSource],
    knobs: settings.ClientSection,
    *,
    engine: interface.PieceEngine | None = None,
    layers: Sequence[tuple[int, int]] = (),
) -> client_lib.SplitClient:
    """A client of a gateway.

    Args:
        where: The gateway.
        ours: The knobs and the opened model.
        knobs: Of the client.
        engine: Runs the layers.
        layers: Ranges that are held.
    """
    config, source = ours
    return client_lib.SplitClient(
        where,
        identity.of(
            config.model,
            source,
            dtype(config.model, source),
            layers=layers,
            progress=command_flags.hash_meter(),
        ),
        engine=engine,
        held_layers=layers,
        knobs=knobs,
    )


async def ask(
    where: transport.Endpoint,
    ours: tuple[config_lib.EngineConfig, model_source.ModelSource],
    knobs: settings.ClientSection,
) -> messages.Offer:
    """What a gateway offers, asked before anything is loaded.

    Raises:
        SplitError: It refuses, or cannot be reached.
    """
    async with make_client(where, ours, knobs) as made:
        return await made.ask()


def dtype(section: config_lib.ModelSection, source: model_source.ModelSource) -> np.dtype[Any]:
    """Of hidden states here."""
    platform = jax.devices()[0].platform
    return model_source.run_dtype(section.dtype, source.stored_dtype, platform)


def _sized(config: config_lib.EngineConfig) -> config_lib.EngineConfig:
    """Programs for more pieces than one request has would only be compiled."""
    if config.batch.max_requests or config.batch.buckets:
        return config
    return dataclasses.replace(config, batch=dataclasses.replace(config.batch, max_requests=2))
