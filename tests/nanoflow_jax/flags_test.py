import dataclasses

import pytest
from absl import flags as absl_flags

from nanoflow_jax import config, flags


@pytest.fixture
def values():
    made = absl_flags.FlagValues()
    flags.define_sections(config.EngineConfig, made)
    return made


def test_no_arguments_are_the_defaults(values):
    values(["program"])
    assert flags.engine_config(values) == config.EngineConfig()


def test_every_knob_is_a_flag_with_its_help(values):
    assert set(config.knob_names(config.EngineConfig)) <= set(values)
    for section in dataclasses.fields(config.EngineConfig):
        kind = config.section_type(section)
        for field in dataclasses.fields(kind):
            flag = values[f"{kind.PREFIX}{field.name}"]
            assert flag.help.endswith(field.metadata["help"])


def test_arguments_of_every_kind_reach_the_configuration(values):
    values(
        [
            "program",
            "--model=folder",
            "--dtype=bfloat16",
            "--random_weights",
            "--noasync_scheduling",
            "--cache_page_size=64",
            "--cache_memory_fraction=0.5",
            "--buckets=8:8:0,64:8:8",
        ]
    )
    made = flags.engine_config(values)
    assert made.model.model == "folder"
    assert made.model.dtype is config.Dtype.BFLOAT16
    assert made.model.random_weights is True
    assert made.batch.async_scheduling is False
    assert made.cache.page_size == 64
    assert made.cache.memory_fraction == 0.5
    assert made.batch.buckets == "8:8:0,64:8:8"


def test_a_flagfile_is_overridden_by_what_follows_it(values, tmp_path):
    inner = tmp_path / "inner.flags"
    inner.write_text("--max_requests=3\n--cache_page_size=8\n")
    outer = tmp_path / "outer.flags"
    outer.write_text(f"# a comment\n--flagfile={inner}\n--cache_page_size=16\n")
    values(["program", f"--flagfile={outer}", "--max_requests=5"])
    made = flags.engine_config(values)
    assert (made.batch.max_requests, made.cache.page_size) == (5, 16)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--page_size=3", "Unknown command line flag 'page_size'"),
        ("--dtype=float16", "value should be one of <auto|float32|bfloat16>"),
        ("--cache_page_size=x", "invalid literal for int"),
        ("--cache_page_size=-1", "cache_page_size"),
        ("--cache_memory_fraction=2", "cache_memory_fraction"),
        ("--random_weights=maybe", "random_weights"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(values, argument, message):
    with pytest.raises(absl_flags.Error, match=message.replace("|", r"\|")):
        values(["program", argument])
