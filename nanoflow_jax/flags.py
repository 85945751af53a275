"""Command-line flags made from the knobs of `config`: each knob is written once."""

import dataclasses
import enum
import sys
from collections.abc import Collection
from typing import Any

from absl import flags

from nanoflow_jax import config


def define_sections(
    config_type: type, values: flags.FlagValues, *, but: Collection[str] = ()
) -> None:
    """Defines one flag per knob of a composed configuration.

    Args:
        config_type: A dataclass whose fields are sections with a PREFIX.
        values: Where the flags go; programs pass `absl.flags.FLAGS`.
        but: Names of flags that the program has defined itself.
    """
    for section in dataclasses.fields(config_type):
        kind = config.section_type(section)
        for field in dataclasses.fields(kind):
            if (name := f"{kind.PREFIX}{field.name}") not in but:
                _define(name, field, values)


def main_module() -> str:
    """What absl calls the running program: the module whose flags --help lists."""
    return sys.argv[0]


def of_program(values: flags.FlagValues) -> dict[str, Any]:
    """What a definition of a flag takes besides, so that the running program's --help lists it."""
    return {"flag_values": values, "module_name": main_module()}


def _define(name: str, field: Any, values: flags.FlagValues) -> None:
    text = field.metadata["help"]
    common = of_program(values)
    default = field.default
    low, high = field.metadata["low"], field.metadata["high"]
    if isinstance(default, enum.StrEnum):
        names = [str(v) for v in type(default)]
        flags.DEFINE_enum(name, str(default), names, text, **common)
    elif isinstance(default, bool):
        flags.DEFINE_boolean(name, default, text, **common)
    elif isinstance(default, int):
        flags.DEFINE_integer(name, default, text, lower_bound=low, upper_bound=high, **common)
    elif isinstance(default, float):
        flags.DEFINE_float(name, default, text, lower_bound=low, upper_bound=high, **common)
    else:
        flags.DEFINE_string(name, default, text, **common)


def engine_config(values: flags.FlagValues) -> config.EngineConfig:
    """The engine's configuration as the command line and flagfiles set it."""
    found: config.EngineConfig = composed(config.EngineConfig, values)
    return found


def serve_config(values: flags.FlagValues) -> config.ServeConfig:
    """The server's configuration as the command line and flagfiles set it."""
    found: config.ServeConfig = composed(config.ServeConfig, values)
    return found


def composed(config_type: type, values: flags.FlagValues) -> Any:
    """A composed configuration of this type, from the flags that `define_sections` made."""
    names = config.knob_names(config_type)
    return config.from_knobs(config_type, **{name: values[name].value for name in names})
