"""`serve`: a gateway in front of an engine, for clients that run some of the layers themselves."""

import asyncio
import contextlib
import dataclasses
import signal
from collections.abc import Callable

from absl import flags as absl_flags

from nanoflow_jax import flags as knob_flags
from nanoflow_jax import start_up
from nanoflow_jax.engine import model_source
from nanoflow_jax.serve import keys as keys_lib
from nanoflow_jax.serve import log
from nanoflow_jax.split import command_flags, gateway, identity, parts, settings, transport
from nanoflow_jax.split import engine as engine_lib
from nanoflow_jax.split.weights import giver


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sections:
    gateway: settings.GatewaySection = dataclasses.field(default_factory=settings.GatewaySection)


def define(values: absl_flags.FlagValues) -> None:
    """Defines the command's flags."""
    command_flags.define(values, _Sections)
    common = knob_flags.of_program(values)
    absl_flags.DEFINE_string("host", "127.0.0.1", "Address to listen on.", **common)
    absl_flags.DEFINE_integer("port", 8100, "Port; 0: any free one.", **common)
    absl_flags.DEFINE_list(
        "grid",
        [],
        "Layers before which requests may enter and leave, such as 2,4,6. Each more makes more "
        "programs.",
        **common,
    )
    absl_flags.DEFINE_list(
        "share_weights",
        [],
        "What clients may fetch of the model: `all`, or any of `embed`, `head` and ranges of "
        "layers such as 0:8. Empty: nothing. Look at the model's licence first.",
        **common,
    )
    absl_flags.DEFINE_string("api_key_file", "", "Keys that clients need, one in a line.", **common)


def run(values: absl_flags.FlagValues, say: Callable[[str], None]) -> int:
    """Serves until a signal; returns the exit code.

    Args:
        values: The flags.
        say: Shows lines of the answer; there are none.

    Raises:
        ValueError: Flags, model or files cannot be used.
    """
    config = knob_flags.engine_config(values)
    sections: _Sections = knob_flags.composed(_Sections, values)
    where = command_flags.endpoint(
        values, values.host, values.port, uses_tls=bool(values.tls_certificate)
    )
    keys = keys_lib.ApiKeys.load(values.api_key_file)
    grid = command_flags.borders(values.grid)
    log.to_stderr(access=False)
    source = model_source.open_model(config.model)
    parts.shared(values.share_weights, source.config.num_layers)
    if values.share_weights and (source.folder is None or config.model.random_weights):
        raise ValueError("--share_weights needs a model's folder; random weights have none")
    engine = engine_lib.build_split_engine(
        config, source, grid=grid, reports=start_up.reports(command_flags.tell)
    )
    try:
        ours = identity.of(
            config.model, source, engine.held.dtype, progress=command_flags.hash_meter()
        )
        weights = None
        if values.share_weights and source.folder is not None:
            weights = giver.Giver(
                source.folder, source.config, ours, values.share_weights, limits=sections.gateway
            )
        served = gateway.Gateway(
            engine,
            ours,
            limits=sections.gateway,
            keys=keys,
            borders=grid,
            weights=weights,
        )
        asyncio.run(_serve(served, where))
    finally:
        engine.close()
    return 0


async def _serve(served: gateway.Gateway, where: transport.Endpoint) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    with contextlib.suppress(asyncio.CancelledError):
        async with served.serving(where):
            command_flags.tell(f"ready: split sessions at {where.host}:{served.port}")
            await stop.wait()
            command_flags.tell("stopping")
