"""Machines, links and a model for tests of split planning: the ones that are shipped."""

import pathlib

from nanoflow_jax.models import huggingface, presets
from nanoflow_jax.split.planning import profile_file
from nanoflow_jax.split.planning.costs import Model

FOLDER = pathlib.Path(__file__).parents[1] / "configs" / "split"
CLIENTS = ("phone", "laptop", "mac", "gpu")
SERVERS = ("h100", "l4")
LINKS = ("lan", "fibre", "wifi", "mobile")


def model(name="llama-3-8b"):
    return Model(name, huggingface.read_config(presets.load(name)))


def device(name):
    return profile_file.read_device(FOLDER / f"{name}.json")


def link(name):
    return profile_file.read_link(FOLDER / f"{name}.json")
