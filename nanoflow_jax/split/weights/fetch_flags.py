"""The client's flags of fetching, and what they do before a model is opened."""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence

from absl import flags as absl_flags

from nanoflow_jax import config as config_lib
from nanoflow_jax import flags as knob_flags
from nanoflow_jax.split import command_flags, settings, transport
from nanoflow_jax.split.weights import fetch


def define(values: absl_flags.FlagValues) -> None:
    """Defines the flags."""
    common = knob_flags.of_program(values)
    absl_flags.DEFINE_boolean(
        "fetch_weights",
        False,
        "Get the weights of --layers, config and tokenizer from the gateway, which must share them "
        "(its --share_weights), into --weights_folder.",
        **common,
    )
    absl_flags.DEFINE_string(
        "weights_folder",
        "",
        "Where fetched weights are; what is there already is compared with its hash and kept.",
        **common,
    )


async def with_fetched(
    config: config_lib.EngineConfig,
    values: absl_flags.FlagValues,
    where: transport.Endpoint,
    layers: Sequence[tuple[int, int]],
    knobs: settings.ClientSection,
) -> config_lib.EngineConfig:
    """The knobs with a fetched model, if it is to be fetched.

    Raises:
        ValueError: Flags do not go together, or the folder cannot be used.
        SplitError: The gateway does not give the weights.
    """
    if not values.fetch_weights:
        if values.weights_folder:
            raise ValueError("--weights_folder is for --fetch_weights; to use one, --model=FOLDER")
        return config
    folder = values.weights_folder
    if not folder:
        raise ValueError("--fetch_weights needs --weights_folder=DIR, where the weights shall be")
    if not layers:
        raise ValueError("--fetch_weights needs --layers: without layers no weights are needed")
    if config.model.model or config.model.random_weights:
        raise ValueError("--fetch_weights gets the model: leave out --model and --random_weights")
    await fetch.fetch(
        where,
        layers,
        pathlib.Path(folder),
        knobs=knobs,
        tell=command_flags.tell,
        stream=sys.stderr,
    )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, model=folder))
