"""Servers that cannot start: a message, an exit code, no traceback."""

import fcntl
import pathlib
import shutil
import socket

import pytest
import served
from golden import cases

_CASE = cases.load("qwen3")


def _refusal(folder: pathlib.Path, *flags: str) -> str:
    """The last words of a server that must not start."""
    made = served.launch(folder, *flags)
    try:
        assert made.process.wait(timeout=120) == 2, made.log
    finally:
        made.process.kill()
        made.process.wait()
    assert "Traceback" not in made.log
    last = made.log.splitlines()[-1]
    assert last.startswith("error: "), made.log
    return last


def _cut(weights: pathlib.Path) -> None:
    weights.write_bytes(weights.read_bytes()[:-100])


def _damage(weights: pathlib.Path) -> None:
    data = bytearray(weights.read_bytes())
    data[8:40] = bytes(32)
    weights.write_bytes(data)


def _exchange(weights: pathlib.Path) -> None:
    shutil.copy(cases.load("llama").path / weights.name, weights)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_cut, "the file is truncated or damaged: download it again"),
        (_damage, "the header must be 3552 bytes that begin with '{'"),
        (_exchange, "the download is incomplete or config.json belongs to another model"),
    ],
)
def test_f10_weights_that_cannot_be_used_are_a_message(tmp_path, harm, message):
    model = shutil.copytree(_CASE.path, tmp_path / "model")
    harm(model / "model.safetensors")
    assert message in _refusal(tmp_path, f"--model={model}")


def test_f5_a_pool_larger_than_the_memory_is_a_message(tmp_path):
    found = _refusal(tmp_path, f"--model={_CASE.path}", "--cache_num_pages=100000000000")
    assert "--cache_num_pages=100000000000 needs" in found
    assert "or leave it out for as many as fit" in found


def test_f12_a_second_server_on_the_same_port_is_a_message(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as first:
        port = first.getsockname()[1]
        found = _refusal(tmp_path, f"--model={_CASE.path}", f"--port={port}")
    assert f"--host=127.0.0.1 --port={port} cannot be used: Address already in use" in found
    assert "give another --port, or end the program that has it" in found


def test_f12_a_second_server_on_the_same_data_dir_is_a_message(tmp_path):
    (tmp_path / "data").mkdir()
    with open(tmp_path / "data" / ".lock", "w") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        found = _refusal(tmp_path, f"--model={_CASE.path}")
    assert "is in use by another server; give each server its own" in found
    assert f"--data_dir={tmp_path}/data" in found


def test_f4_a_data_dir_that_cannot_be_written_is_a_message(tmp_path):
    found = _refusal(tmp_path, f"--model={_CASE.path}", "--data_dir=/proc/here")
    assert "--data_dir=/proc/here cannot be used" in found
    assert "give a folder that can be written" in found
