"""The flags of the program, and what is read from them."""

import dataclasses
import pathlib
from collections.abc import Mapping
from importlib import resources
from typing import Any

from absl import flags

from nanoflow_jax import config as config_lib
from nanoflow_jax import flags as knob_flags
from nanoflow_jax.request import SamplingParams

_PACKAGE = "package:"

# Fields of SamplingParams that are flags. A flag that is not given leaves the endpoint's default.
_SAMPLING: Mapping[str, str] = {
    "max_tokens": "Most tokens to generate. Left out: 16; for a chat, up to the whole context.",
    "min_tokens": "Least tokens before an end of text or a stop string counts.",
    "temperature": "0 takes the likeliest token. Left out: 1.",
    "top_k": "Choose among this many likeliest tokens; 0: all.",
    "top_p": "Choose among the likeliest tokens that together reach this probability.",
    "min_p": "Choose among tokens at least this fraction as likely as the likeliest.",
    "presence_penalty": "Subtracted from the logits of tokens that were generated before.",
    "frequency_penalty": "Subtracted from a token's logit each time that it was generated.",
    "repetition_penalty": "Divides the logits of tokens that were seen before.",
    "ignore_eos": "Go on after an end of text.",
    "n": "Choices for each prompt.",
}


def define(values: flags.FlagValues) -> None:
    """Defines all flags of the program."""
    common: dict[str, Any] = {"flag_values": values, "module_name": knob_flags.main_module()}
    knob_flags.define_sections(config_lib.EngineConfig, values)
    kinds = {field.name: field.default for field in dataclasses.fields(SamplingParams)}
    for name, text in _SAMPLING.items():
        if isinstance(kinds[name], bool):
            flags.DEFINE_boolean(name, None, text, **common)
        elif isinstance(kinds[name], int):
            flags.DEFINE_integer(name, None, text, **common)
        else:
            flags.DEFINE_float(name, None, text, **common)
    flags.DEFINE_multi_string(
        "stop", None, "Generation ends at this string; may be given several times.", **common
    )
    flags.DEFINE_integer("seed", 0, "Rows without a seed get one from this.", **common)
    flags.DEFINE_string("prompt", None, "Continue this text and print it.", **common)
    flags.DEFINE_list("prompt_ids", None, "The same for token ids: 1,2,3.", **common)
    flags.DEFINE_string(
        "input",
        None,
        "JSONL of requests, in OpenAI's batch format or short ones such as "
        '{"prompt": "..."}. package:quickstart.jsonl is the one that comes along.',
        **common,
    )
    flags.DEFINE_string("output", None, "JSONL of answers; run again to go on with it.", **common)
    flags.DEFINE_boolean("restart", False, "Delete the output and begin again.", **common)
    flags.DEFINE_integer("process_index", 0, "Number of this process, from 0.", **common)
    flags.DEFINE_integer(
        "process_count",
        1,
        "Processes that share the input; each writes OUTPUT.K-of-N.",
        lower_bound=1,
        **common,
    )
    flags.DEFINE_boolean("debug", False, "Show where errors came from.", **common)


def shared(values: flags.FlagValues) -> dict[str, str]:
    """Flags of an engine that all processes of one model must be given alike, by name."""
    own = ("model", "process_id", "compile_cache_dir", "compile_threads")
    names = config_lib.knob_names(config_lib.EngineConfig)
    return {f"--{name}": str(values[name].value) for name in names if name not in own}


def sampling(values: flags.FlagValues) -> dict[str, Any]:
    """The sampling fields that the command line sets.

    Raises:
        ValueError: They cannot be sampled with.
    """
    found = {name: getattr(values, name) for name in (*_SAMPLING, "stop")}
    given = {name: value for name, value in found.items() if value is not None}
    SamplingParams(**given, seed=values.seed)
    return given


def prompt(values: flags.FlagValues) -> str | list[int] | None:
    """The prompt on the command line, if there is one.

    Raises:
        ValueError: It is none, or there is something else to do as well.
    """
    text, ids = values.prompt, values.prompt_ids
    given = [f"--{n}" for n in ("prompt", "prompt_ids", "input") if getattr(values, n) is not None]
    if not given:
        raise ValueError(
            'nothing to do: give --prompt="..." for one text, or --input=IN.jsonl and '
            "--output=OUT.jsonl for many; --flagfile=configs/quickstart.flags is an example, and "
            "--help lists all flags"
        )
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are both given; give one of them")
    if given == ["--input"]:
        if not values.output:
            raise ValueError("--input needs --output=OUT.jsonl beside it, for the answers")
        return None
    if values.output:
        raise ValueError(f"--output goes with --input; the text of {given[0]} is printed")
    if text is not None:
        return str(text)
    try:
        return [int(token) for token in ids]
    except ValueError as error:
        raise ValueError(
            f"--prompt_ids={','.join(ids)} are not whole numbers with commas between them"
        ) from error


def input_path(text: str) -> pathlib.Path:
    """The file that --input means.

    Raises:
        ValueError: The package has no such file.
    """
    if not text.startswith(_PACKAGE):
        return pathlib.Path(text)
    folder = pathlib.Path(str(resources.files("nanoflow_jax.generate")))
    names = sorted(path.name for path in folder.glob("*.jsonl"))
    name = text.removeprefix(_PACKAGE)
    if name not in names:
        raise ValueError(f"--input={text}: the package has {', '.join(names)}, and no {name!r}")
    return folder / name
