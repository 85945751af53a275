"""What a server refuses when it starts, and the exit codes of the program."""

import pathlib
import socket

import pytest
import served

from nanoflow_jax import config
from nanoflow_jax.serve import run


def _serve(*, max_context_len: int = 0, **knobs: object) -> list[str]:
    """Starts a server of random weights that should not come far; what it said."""
    said: list[str] = []
    model = config.ModelSection(
        model="preset:llama-3-8b", random_weights=True, max_context_len=max_context_len
    )
    run.serve(
        config.ServerSection(data_dir="", **knobs),
        config.EngineConfig(model=model),
        folder=None,
        model_name="made-up",
        say=said.append,
    )
    return said


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("", "--host is empty; give the address to listen on: 127.0.0.1 for this machine alone"),
        ("192.0.2.1", "cannot be used: Cannot assign requested address; give --host an address of"),
        ("no-such-host.invalid", "cannot be used: .*; give --host an address of this machine"),
    ],
)
def test_an_address_that_is_not_this_machines_is_refused(host: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _serve(host=host, port=0)


def test_a_port_in_use_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        message = "Address already in use; give another --port, or end the program that has it"
        with pytest.raises(ValueError, match=message):
            _serve(port=taken.getsockname()[1])


def test_knobs_that_the_engine_refuses_are_wrong_input_and_not_a_lost_engine() -> None:
    with pytest.raises(ValueError, match=r"--max_context_len=999999 is more than the model's"):
        _serve(port=0, max_context_len=999_999)


def test_a_misspelt_flag_ends_the_program_with_code_two(tmp_path: pathlib.Path) -> None:
    made = served.launch(tmp_path, "--prot=80")
    assert made.process.wait(timeout=120) == 2
    assert made.log.startswith("error: Unknown command line flag 'prot'. Did you mean: port")


def test_a_signal_while_programs_are_compiled_ends_it_at_once(tmp_path: pathlib.Path) -> None:
    made = served.launch(tmp_path, *served.SMALL, "--compile_cache_dir=")
    try:
        made.wait_said("\ndense batch: ")
        assert made.stop() == 0
    finally:
        made.process.kill()
        made.process.wait()
    assert made.log.endswith("stopping\n")
    assert "Traceback" not in made.log
