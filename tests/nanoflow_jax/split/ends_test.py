"""Both ends as programs: their text is that of one process, and what is wrong is said."""

import contextlib
import pathlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import batch_runs
import process_runs
import pytest
from absl import flags as absl_flags

from checkpoints import folder as model_folder
from nanoflow_jax.split import __main__ as program
from nanoflow_jax.split import client_command, command_flags

_KEY = "a-key"
_LAYERS = 4
_SMALL = [
    "--max_requests=2",
    "--dense_batch=16",
    "--max_context_len=64",
    "--buckets=2:2:0,16:2:2",
]
_PROMPT = "--prompt=def main():"
_ASKED = [_PROMPT, "--max_tokens=12", "--ignore_eos"]


def _start(folder: pathlib.Path, name: str, *arguments: str) -> "subprocess.Popen[bytes]":
    environment = batch_runs.environment(NANOFLOW_API_KEY=_KEY)
    with open(folder / f"out.{name}", "wb") as out, open(folder / f"err.{name}", "wb") as err:
        return subprocess.Popen(
            [sys.executable, "-m", "nanoflow_jax.split", *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
        )


@contextlib.contextmanager
def _gateway(folder: pathlib.Path) -> Iterator[tuple["subprocess.Popen[bytes]", str]]:
    """A gateway with borders before layers 1 and 2, and its address."""
    process = _start(
        folder, "serve", "serve", "--grid=1,2", "--port=0", "--share_weights=all", *_SMALL
    )
    said = folder / "err.serve"
    try:
        process_runs.wait_until(
            lambda: "ready" in said.read_text() or process.poll() is not None,
            tell=said.read_text,
        )
        found = re.search(r"ready: split sessions at (127\.0\.0\.1:\d+)", said.read_text())
        assert found is not None, said.read_text()
        yield process, found[1]
    finally:
        process.kill()
        process.wait()


def _ask(
    folder: pathlib.Path, address: str, layers: str, *more: str, key: str = _KEY
) -> tuple[int, str, str]:
    """A client's exit code, text, and what it said."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "nanoflow_jax.split", "client", f"--gateway={address}"),
            *(f"--layers={layers}", *_SMALL, *_ASKED, *more),
        ],
        env=batch_runs.environment(NANOFLOW_API_KEY=key),
        capture_output=True,
        text=True,
        timeout=process_runs.LIMIT_S,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def _run(*arguments: str) -> int:
    """The exit code of a program that runs in this process."""
    values = absl_flags.FlagValues()
    chosen = program.command(["split", *arguments])
    assert chosen is not None
    chosen.define(values)
    return program.main(list(values(["split", *arguments])), chosen, values)


def test_clients_of_a_gateway_get_the_text_of_one_process(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOFLOW_API_KEY", _KEY)
    with _gateway(tmp_path) as (process, address):
        off_grid = _run("client", f"--gateway={address}", "--layers=0:3", *_SMALL, *_ASKED)
        said_off_grid = capsys.readouterr().err
        all_server = _ask(tmp_path, address, "")
        fetching = ["--fetch_weights", f"--weights_folder={tmp_path / 'fetched'}"]
        split = _ask(tmp_path, address, "0:1,2:4", *fetching)
        refused = _ask(tmp_path, address, "", key="another")
        process.send_signal(signal.SIGTERM)
        assert process.wait(process_runs.LIMIT_S) == 0
    assert off_grid == 1
    assert "error: layers: sessions enter and leave at layers [0, 1, 2, 4]; " in said_off_grid
    assert not {"loading", "compiled"} & set(re.findall(r"\w+", said_off_grid))
    for code, _, said in (all_server, split):
        assert code == 0, said
        assert "Traceback" not in said
        assert "12 tokens: time to first token " in said
    assert "client [0, 1), server [1, 2), client [2, 4)" in split[2]
    assert "server [0, 4); " in all_server[2]
    # Of the four layers, the second stays where it is.
    fetched = model_folder.ModelFolder.open(tmp_path / "fetched").tensors
    assert {name.split(".")[2] for name in fetched if ".layers." in name} == {"0", "2", "3"}
    one = subprocess.run(
        [sys.executable, "-m", "nanoflow_jax.generate", *_SMALL, *_ASKED, "--temperature=0"],
        env=batch_runs.environment(),
        capture_output=True,
        text=True,
        timeout=process_runs.LIMIT_S,
        check=True,
    )
    assert len(one.stdout) > 12
    assert all_server[1] == split[1] == one.stdout
    code, text, said = refused
    assert (code, text) == (1, "")
    assert "error: unauthorized: the token is not one of the server's" in said
    text = (tmp_path / "err.serve").read_text()
    assert text.endswith("stopping\n")
    assert len(re.findall(r"^\d\d:\d\d:\d\d session \w+: closed$", text, re.M)) == 2
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("layers", "server"),
    [((), (0, 4)), (((0, 1),), (1, 4)), (((2, 4),), (0, 2)), (((0, 1), (3, 4)), (1, 3))],
)
def test_the_server_has_what_clients_leave(layers, server):
    cut = client_command.cut_of(layers, _LAYERS)
    assert (cut.start, cut.stop) == server


@pytest.mark.parametrize(
    "layers", [((0, 4),), ((1, 2),), ((0, 2), (2, 4)), ((0, 1), (2, 3)), ((3, 5),)]
)
def test_a_client_that_leaves_no_range_is_refused(layers):
    with pytest.raises(
        ValueError, match="a client runs the first layers, the last of the model's 4"
    ):
        client_command.cut_of(layers, _LAYERS)


@pytest.mark.parametrize("texts", [["2", "1"], ["1", "1"], ["a"], ["1.5"], [""]])
def test_a_grid_that_does_not_ascend_is_refused(texts):
    with pytest.raises(ValueError, match="is no ascending list of layers such as 2,4,6"):
        command_flags.borders(texts)


@pytest.mark.parametrize("text", ["2:1", "1", "a:b", "1:", ":2", "0:1:2"])
def test_what_is_no_range_of_layers_is_refused(text):
    with pytest.raises(ValueError, match="is no range START:STOP of layers, such as 0:2"):
        command_flags.ranges([text])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["client", "--gateway=here", _PROMPT], "--gateway=here is not HOST:PORT"),
        (["client", "--layers=0:1"], "give one of --prompt"),
        (["client", "--prompt_ids=1,a"], "--prompt_ids=1,a are no token ids"),
        (["client", "--gateway=10.0.0.9:1", _PROMPT], "10.0.0.9 is not this machine"),
        (["serve", "--host=0.0.0.0"], "0.0.0.0 is not this machine"),
        (["serve", "--grid=9"], "grid"),
        (["serve", "--http_port=0", "--grid=9"], "grid"),
        (
            ["serve", "--max_queue=3"],
            "--max_queue is for ordinary requests; give --http_port to answer these too, or leave "
            "--max_queue out",
        ),
        (["serve", "--share_weights=0:9"], "--share_weights=0:9: '0:9' is none of all, embed"),
        (
            ["serve", "--share_weights=all", "--model=preset:llama-3-8b", "--random_weights"],
            "--share_weights needs a model's folder; random weights have none",
        ),
        (["client", "--weights_folder=w", _PROMPT], "--weights_folder is for --fetch_weights"),
        (["client", "--fetch_weights", _PROMPT], "--fetch_weights needs --weights_folder=DIR"),
        (
            ["client", "--fetch_weights", "--weights_folder=w", _PROMPT],
            "--fetch_weights needs --layers: without layers no weights are needed",
        ),
        (
            ["client", "--fetch_weights", "--weights_folder=w", "--layers=0:1", "--model=m"],
            "--fetch_weights gets the model: leave out --model and --random_weights",
        ),
    ],
)
def test_flags_that_are_wrong_are_said_before_a_weight_is_read(capsys, arguments, message):
    assert _run(*arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said
    assert "loading" not in said


def test_gateway_that_does_not_give_weights_ends_the_client_with_its_reason(capsys, tmp_path):
    arguments = ["client", "--fetch_weights", f"--weights_folder={tmp_path}", "--layers=0:1"]
    arguments += ["--gateway=127.0.0.1:1", "--split_client_max_attempts=1", _PROMPT]
    assert _run(*arguments) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: link: unavailable: ")
    assert said.endswith("(attempt 1 of 1, 0 bytes fetched; run it again and it goes on)\n")


def test_without_the_extra_it_is_said_what_to_install():
    script = (
        "import runpy, sys; sys.modules['grpc'] = None; sys.argv = ['split', 'serve'];"
        "runpy.run_module('nanoflow_jax.split', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=batch_runs.environment(),
        capture_output=True,
        text=True,
        timeout=process_runs.LIMIT_S,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "error: serve needs the package grpc: pip install 'nanoflow_jax[split]', or pip install -e "
        "'.[split]' in a clone\n"
    )
