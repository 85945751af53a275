"""`serve`: a gateway in front of an engine, for clients that run some of the layers themselves.

With --http_port the same engine answers ordinary requests, too.
"""

import asyncio
import contextlib
import dataclasses
import signal
from collections.abc import Callable

from absl import flags as absl_flags

from nanoflow_jax import config as config_lib
from nanoflow_jax import flags as knob_flags
from nanoflow_jax import start_up
from nanoflow_jax.batch import fingerprint
from nanoflow_jax.engine import model_source
from nanoflow_jax.serve import keys as keys_lib
from nanoflow_jax.serve import log
from nanoflow_jax.serve import run as server
from nanoflow_jax.split import (
    command_flags,
    engine_process,
    gateway,
    parts,
    pieces,
    settings,
    transport,
)
from nanoflow_jax.split import engine as engine_lib

# Knobs of the HTTP server that are the gateway's, or have another name here.
_OWN = frozenset({"host", "port", "api_key_file"})


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
    absl_flags.DEFINE_integer(
        "http_port",
        None,
        "Answer ordinary requests here, too, as python -m nanoflow_jax.serve does, with the same "
        "engine; 0: any free port.",
        lower_bound=0,
        upper_bound=65535,
        **common,
    )
    absl_flags.DEFINE_boolean(
        "access_log", True, "Write a line for each ordinary request, without its text.", **common
    )
    knob_flags.define_sections(config_lib.ServeConfig, values, but=_OWN)


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
    keys_lib.ApiKeys.load(values.api_key_file)  # what is wrong with it is said before a start
    grid = command_flags.borders(values.grid)
    source = model_source.open_model(config.model)
    pieces.held_spans(source.config.num_layers, grid, None)  # or it would be said only later
    parts.shared(values.share_weights, source.config.num_layers)
    if values.share_weights and (source.folder is None or config.model.random_weights):
        raise ValueError("--share_weights needs a model's folder; random weights have none")
    flags = engine_process.GatewayFlags(
        endpoint=where,
        grid=grid,
        limits=sections.gateway,
        api_key_file=values.api_key_file,
        share_weights=tuple(values.share_weights),
    )
    if values.http_port is not None:
        return _serve_both(values, config, source, flags)
    _check_no_server_knob(values)
    log.to_stderr(access=False)
    engine = engine_lib.build_split_engine(
        config, source, grid=grid, reports=start_up.reports(command_flags.tell)
    )
    try:
        asyncio.run(_serve(flags.gateway(config, source, engine), where))
    finally:
        engine.close()
    return 0


def _serve_both(
    values: absl_flags.FlagValues,
    config: config_lib.EngineConfig,
    source: model_source.ModelSource,
    flags: engine_process.GatewayFlags,
) -> int:
    log.to_stderr(access=values.access_log)
    knobs = knob_flags.serve_config(values).server
    return server.serve(
        dataclasses.replace(knobs, port=values.http_port),
        config,
        folder=source.folder.path if source.folder is not None else None,
        model_name=knobs.model_name or fingerprint.model_name(config.model),
        say=command_flags.tell,
        program=(engine_process.__name__, flags.encoded()),
    )


def _check_no_server_knob(values: absl_flags.FlagValues) -> None:
    for name in config_lib.knob_names(config_lib.ServeConfig):
        if name not in _OWN and values[name].present:
            raise ValueError(
                f"--{name} is for ordinary requests; give --http_port to answer these too, or "
                f"leave --{name} out"
            )


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
