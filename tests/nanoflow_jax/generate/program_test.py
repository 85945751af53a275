"""The program as a user runs it: in processes of its own where that matters."""

import errno
import io
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import batch_runs
import pytest
from absl import flags

from nanoflow_jax import console
from nanoflow_jax import flags as knob_flags
from nanoflow_jax.bench import xplane
from nanoflow_jax.engine import build
from nanoflow_jax.generate import __main__ as program
from nanoflow_jax.generate import batch_run, command_line

_ROOT = pathlib.Path(__file__).parents[3]


def _run(
    *arguments: str,
    code: int = 0,
    program: Sequence[str] = (sys.executable,),
    start: Sequence[str] = ("-m", "nanoflow_jax.generate"),
) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(
        [*program, *start, *arguments],
        env=batch_runs.environment(),
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def _batch(arguments: Sequence[str]) -> tuple[int, str]:
    """The same in this process, where programs need no second start: exit code and messages."""
    values = flags.FlagValues()
    command_line.define(values)
    values(["generate", *arguments])
    said: list[str] = []
    config = knob_flags.engine_config(values)
    code = console.run(
        lambda: batch_run.run(
            values, config, command_line.sampling(values), say=said.append, stream=io.StringIO()
        ),
        say=said.append,
        debug=False,
    )
    return code, "\n".join(said)


_LIST_MODULES = """
import atexit, runpy, sys
names = ("grain", "minijinja", "nanoflow_jax.tokenizer.chat_template")
atexit.register(lambda: print("loaded:", [n for n in names if n in sys.modules]))
runpy.run_module("nanoflow_jax.generate", run_name="__main__", alter_sys=True)
"""


def test_a_prompt_with_random_weights_is_streamed_without_grain_and_templates() -> None:
    done = _run(
        *(*batch_runs.flags(), "--random_weights", "--prompt_ids=5,6,7", "--max_tokens=6"),
        start=("-c", _LIST_MODULES),
    )
    text, last = done.stdout.rstrip("\n").rsplit("\n", 1)
    assert text
    assert last == "loaded: []"
    for wanted in (
        r"loading: .* of .* s",
        r"device: cpu; model: float32",
        r"buckets: 8:8:0, 32:8:8",
        r"compiled 7 of 7: .* s",
        r"3 tokens in, \d out, .* tokens/s",
    ):
        assert re.search(wanted, done.stderr), done.stderr


def test_the_quickstart_finishes_and_a_second_start_finds_nothing_to_do(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    quickstart = f"--flagfile={_ROOT / 'configs' / 'quickstart.flags'}"
    arguments = [quickstart, *batch_runs.flags(cache_num_pages=32), "--max_tokens=4"]
    code, said = _batch(arguments)
    assert code == 0
    rows = batch_runs.read(tmp_path / "quickstart_output.jsonl")
    assert len(rows) == 12
    assert all(row["error"] is None for row in rows)
    tokens = sum(row["response"]["body"]["usage"]["completion_tokens"] for row in rows)
    assert re.search(rf"rows: 12 ok, 0 failed; tokens: \d+ in, {tokens} out; .* tokens/s", said)
    assert "answers are in quickstart_output.jsonl" in said
    before = (tmp_path / "quickstart_output.jsonl").read_bytes()
    code, said = _batch(arguments)
    assert code == 0
    assert "12 of 12 rows are there already" in said
    assert "nothing is left to do (--restart begins again)" in said
    assert (tmp_path / "quickstart_output.jsonl").read_bytes() == before
    code, said = _batch([*arguments, "--seed=5"])
    assert code == 2
    assert "error: quickstart_output.jsonl was begun with other settings: --seed changed" in said


def test_f4_a_full_disk_is_a_message_and_the_next_run_goes_on(tmp_path: pathlib.Path) -> None:
    row = {"prompt": "x" * 60, "echo": True, "logprobs": 2, "max_tokens": 1, "model": "gpt-x"}
    source = batch_runs.write(tmp_path / "in.jsonl", [row] * 40)
    arguments = batch_runs.flags(input=source, output=tmp_path / "out.jsonl")
    # Writing beyond 64 kB of a file fails as on a full disk.
    limited = 'ulimit -f 64; exec "$0" -m nanoflow_jax.generate "$@"'
    done = _run(*arguments, code=1, program=("bash", "-c", limited), start=(sys.executable,))
    found = re.search(r"error: .*File too large; (\d+) of 40 rows are done and kept", done.stderr)
    assert found is not None, done.stderr
    assert "run the same command again to go on" in done.stderr
    assert 0 < int(found[1]) < 40
    code, said = _batch(arguments)
    assert code == 0
    assert "note: rows name other models, such as 'gpt-x'; all were answered by the model" in said
    assert batch_runs.numbers(batch_runs.read(tmp_path / "out.jsonl")) == list(range(40))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_f2_a_signal_keeps_finished_rows_and_says_how_to_go_on(
    tmp_path: pathlib.Path, number: signal.Signals
) -> None:
    rows = [{"prompt": "x", "max_tokens": 100, "ignore_eos": True}] * 400
    source = batch_runs.write(tmp_path / "in.jsonl", rows)
    output = tmp_path / "out.jsonl"
    arguments = batch_runs.flags(input=source, output=output)
    with subprocess.Popen(
        [sys.executable, "-m", "nanoflow_jax.generate", *arguments],
        env=batch_runs.environment(),
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 200
        while process.poll() is None and time.monotonic() < deadline:
            if output.exists() and output.stat().st_size:
                break
            time.sleep(0.01)
        process.send_signal(number)
        said = process.communicate(timeout=100)[1]
    assert process.returncode == 130, said
    assert "Traceback" not in said
    found = re.search(r"interrupted: (\d+) of 400 rows are in .*run the same command again", said)
    assert found is not None, said
    assert int(found[1]) == len(batch_runs.read(output))


def test_an_unknown_flag_is_refused() -> None:
    done = _run("--tempratur=1", code=2)
    assert "Unknown command line flag 'tempratur'" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt=x", "more"], "error: unknown argument 'more'; flags begin with --"),
        ([], "error: nothing to do"),
        (["--model=meta-llama/Llama-3", "--prompt=x"], "hf download meta-llama/Llama-3"),
        (["--model=preset:llama-3-8b", "--prompt=x"], "add --random_weights"),
        (
            ["--model=preset:llama-3-8b", "--random_weights", "--prompt=x"],
            "has no tokenizer; give --prompt_ids=1,2,3 in the place of --prompt",
        ),
        (
            [*batch_runs.flags(), "--max_context_len=9999", "--prompt=x"],
            "--max_context_len=9999 is",
        ),
    ],
)
def test_what_is_wrong_is_one_message_and_exit_code_two(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    code = _main(arguments)
    stderr = capfd.readouterr().err
    assert code == 2
    assert message in stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt_ids=1,200000"], "error: prompt: 200000 is not a token id of this model"),
        (["--prompt_ids="], "error: the prompt is empty"),
        (["--prompt_ids=" + ",".join("1" * 64)], "error: the prompt has 64 tokens and the context"),
        (["--prompt_ids=1", "--stop=x"], "error: stop strings need a tokenizer"),
    ],
)
def test_a_prompt_that_cannot_be_served_is_refused_before_the_model_is_read(
    arguments: list[str],
    message: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(build, "build_engine")  # Reading this one would take minutes.
    model = ["--model=preset:llama-3-8b", "--random_weights", "--max_context_len=64"]
    assert _main([*model, *arguments]) == 2
    assert capfd.readouterr().err.startswith(message)


@pytest.mark.parametrize("place", ["/proc/out.jsonl", "/dev/null/out.jsonl", "none/out.jsonl", "."])
def test_an_output_that_cannot_be_written_is_refused_before_the_model_is_read(
    place: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = batch_runs.write(tmp_path / "in.jsonl", [{"prompt": "x"}])
    code, said = _batch(batch_runs.flags(input=source, output=place))
    assert code == 2
    assert said.startswith(f"error: --output={place}")
    assert "Errno" not in said


def _fail_to_begin(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, error: OSError, *, of: str
) -> str:
    """What is said where a part of the job raises an error as it begins."""

    def fail(*_: object) -> None:
        raise error

    source = batch_runs.write(tmp_path / "in.jsonl", [{"prompt": "x"}])
    monkeypatch.setattr(of, fail)
    code, said = _batch(batch_runs.flags(input=source, output=tmp_path / "out.jsonl"))
    assert code == 2
    return said


def test_f4_a_disk_that_is_full_at_the_start_is_a_message_with_the_name_of_the_output(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    said = _fail_to_begin(tmp_path, monkeypatch, full, of="checkpoints.files.write_atomic")
    output = tmp_path / "out.jsonl"
    assert f"--output={output}: {output} cannot be used (No space left on device); mend" in said


def test_an_input_that_cannot_be_read_is_not_called_the_output(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = str(tmp_path / "in.jsonl")
    closed = PermissionError(errno.EACCES, os.strerror(errno.EACCES), source)
    said = _fail_to_begin(
        tmp_path, monkeypatch, closed, of="nanoflow_jax.batch.source.check_plain_file"
    )
    assert (
        said == f"error: {source} cannot be read (Permission denied); check its permissions "
        "and the disk"
    )


def test_a_damaged_model_is_one_message(
    tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for path in batch_runs.FOLDER.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    assert _main([f"--model={tmp_path}", "--prompt=x"]) == 2
    stderr = capfd.readouterr().err
    assert "model.safetensors" in stderr
    assert stderr.startswith("error: ")


def test_several_choices_are_printed_whole_by_an_engine_of_their_size(
    capfd: pytest.CaptureFixture[str],
) -> None:
    arguments = [f"--model={batch_runs.FOLDER}", "--dense_batch=16", "--max_context_len=64"]
    assert _main([*arguments, "--prompt=ab", "--n=2", "--max_tokens=3"]) == 0
    shown = capfd.readouterr()
    assert "of at most 2 requests" in shown.err
    lines = shown.out.splitlines()
    assert lines[0] == "--- 1 of 2 ---"
    assert "--- 2 of 2 ---" in lines


def test_a_prompt_whose_bits_are_those_of_any_batch_gets_an_engine_for_any_batch(
    capfd: pytest.CaptureFixture[str],
) -> None:
    arguments = [f"--model={batch_runs.FOLDER}", "--dense_batch=16", "--max_context_len=64"]
    assert _main([*arguments, "--prompt=ab", "--max_tokens=3", "--batch_invariant"]) == 0
    assert "of at most 16 requests; buckets: 16:16:16; batch invariant" in capfd.readouterr().err


def test_steps_after_the_warm_up_are_recorded_for_xprof(tmp_path: pathlib.Path) -> None:
    arguments = [f"--model={batch_runs.FOLDER}", "--dense_batch=16", "--max_context_len=64"]
    arguments += ["--profile_steps=2", "--profile_after=3", f"--profile_dir={tmp_path}"]
    assert _main([*arguments, "--prompt=ab", "--max_tokens=12", "--ignore_eos"]) == 0
    events = [event for event in xplane.read(tmp_path) if event.module == "jit_forward"]
    assert len({event.run_id for event in events}) == 2
    assert any("/layer_0/norm_kqv.0/" in event.scope for event in events)


def _main(arguments: list[str]) -> int:
    """The program's `_run` under its own error handling, with flags of its own."""
    values = flags.FlagValues()
    command_line.define(values)
    left = values(["generate", *arguments])
    return console.run(lambda: program._run(values, left[1:]), say=program._say, debug=False)
