import re

import pytest

from nanoflow_jax import config


def _raises(message):
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


def test_flat_names_reach_their_sections():
    made = config.EngineConfig.from_knobs(
        model="folder", dtype="bfloat16", cache_page_size=64, max_requests=3, compile_threads=2
    )
    assert made.model.model == "folder"
    assert made.model.dtype is config.Dtype.BFLOAT16
    assert made.cache.page_size == 64
    assert made.batch.max_requests == 3
    assert made.compile.threads == 2
    assert made.cache.num_pages == 0


@pytest.mark.parametrize("host", ["10.0.0.1", "name.example", "::1"])
def test_an_address_is_a_host_and_a_port(host):
    written = f"[{host}]:7000" if ":" in host else f"{host}:7000"
    section = config.ProcessesSection(coordinator=written, num_processes=2)
    assert section.address == (host, 7000)


def test_no_knobs_are_the_defaults():
    assert config.EngineConfig.from_knobs() == config.EngineConfig()


def test_every_knob_has_a_name_of_its_own():
    names = config.knob_names(config.EngineConfig)
    assert len(names) == len(set(names))
    assert {"model", "cache_page_size", "buckets", "compile_cache_dir"} <= set(names)


def test_an_unknown_knob_is_refused_with_the_known_ones():
    names = ", ".join(config.knob_names(config.EngineConfig))
    with _raises(f"another, page_size: no such knob; knobs are {names}"):
        config.EngineConfig.from_knobs(page_size=4, another=1)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"weight_seed": -1}, "--weight_seed=-1 is not at least 0"),
        ({"cache_page_size": -1}, "--cache_page_size=-1 is not at least 0"),
        ({"cache_memory_fraction": 1.5}, "--cache_memory_fraction=1.5 is not in [0.01, 1]"),
        ({"cache_memory_fraction": 0.0}, "--cache_memory_fraction=0.0 is not in [0.01, 1]"),
        ({"penalty_requests": 0}, "--penalty_requests=0 is not at least 1"),
        ({"compile_threads": -2}, "--compile_threads=-2 is not at least 0"),
        (
            {"num_processes": 2, "process_id": 2, "coordinator": "a:1"},
            "--process_id=2 is none of --num_processes=2; give each process a number of its own, "
            "from 0 to 1",
        ),
        (
            {"num_processes": 2},
            "--coordinator= and --num_processes=2: several processes need the address at which "
            "process 0 listens, and one needs none",
        ),
        (
            {"coordinator": "10.0.0.1:7000"},
            "--coordinator=10.0.0.1:7000 and --num_processes=1: several processes need the address "
            "at which process 0 listens, and one needs none",
        ),
        *(
            (
                {"coordinator": address, "num_processes": 2},
                f"--coordinator={address} is not HOST:PORT, such as 10.0.0.1:7000",
            )
            for address in ("10.0.0.1", ":7000", "host:", "host:0", "host:70000", "host:x")
        ),
    ],
)
def test_a_knob_outside_its_bounds_is_refused_by_its_flag(knobs, message):
    with _raises(message):
        config.EngineConfig.from_knobs(**knobs)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"cache_page_size": "64"}, "--cache_page_size='64' is not an integer"),
        ({"max_requests": 4.0}, "--max_requests=4.0 is not an integer"),
        ({"max_requests": True}, "--max_requests=True is not an integer"),
        ({"cache_memory_fraction": "1"}, "--cache_memory_fraction='1' is not a number"),
        ({"cache_memory_fraction": float("nan")}, "--cache_memory_fraction=nan is not a number"),
        ({"async_scheduling": 1}, "--async_scheduling=1 is not true or false"),
        ({"buckets": None}, "--buckets=None is not a text"),
    ],
)
def test_a_knob_of_another_kind_is_refused_by_its_flag(knobs, message):
    with _raises(message):
        config.EngineConfig.from_knobs(**knobs)


def test_a_whole_number_is_a_number():
    assert config.EngineConfig.from_knobs(cache_memory_fraction=1).cache.memory_fraction == 1


@pytest.mark.parametrize("name", ["float16", "", None, float, 32])
def test_an_unknown_dtype_is_refused_with_the_known_ones(name):
    with _raises(f"dtype={name!r} is not one of auto, float32, bfloat16"):
        config.EngineConfig.from_knobs(dtype=name)


@pytest.mark.parametrize("name", ["cuda", None, config.Dtype.FLOAT32])
def test_an_unknown_use_of_a_kernel_is_refused_with_the_known_ones(name):
    uses = "auto, plain, pallas, interpret, triton, interpret_triton"
    with _raises(f"kernel_gemm={name!r} is not one of {uses}"):
        config.EngineConfig.from_knobs(kernel_gemm=name)


def test_a_choice_is_named_by_text_or_by_itself():
    for name in ("float32", config.Dtype.FLOAT32):
        made = config.EngineConfig.from_knobs(dtype=name, kernel_decode_attention="interpret")
        assert made.model.dtype is config.Dtype.FLOAT32
        assert made.kernels.decode_attention is config.KernelUse.INTERPRET
        assert made.kernels.gemm is config.KernelUse.AUTO


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (
            {"tensor_parallel": 2, "data_parallel": 2},
            "--data_parallel=2 and --num_processes=2: replicas are of one process; start a job for "
            "each, which --process_count can share out",
        ),
        (
            {"tensor_parallel": 3},
            "--tensor_parallel=3 cannot be shared out evenly over --num_processes=2",
        ),
    ],
)
def test_devices_that_processes_cannot_share_out_are_refused_before_they_meet(knobs, message):
    several = {"num_processes": 2, "coordinator": "127.0.0.1:7000"}
    with _raises(message):
        config.EngineConfig.from_knobs(**several, **knobs)
    config.EngineConfig.from_knobs(**several, **knobs, process_id=1)
