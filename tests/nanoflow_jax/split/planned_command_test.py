"""`profile` writes what `client --profiles` plans each request with."""

import dataclasses
import io
import json
import sys

import pytest
import split_choices
import split_model
import split_program
import split_runs

from nanoflow_jax import request
from nanoflow_jax.split import client_command, profile_files
from nanoflow_jax.split.planning.choosing import Ends

_IDS = "--prompt_ids=5,6,7,8"
_PROMPT = (5, 6, 7, 8)
_PARAMS = request.SamplingParams(max_tokens=4, temperature=0.0, seed=0, ignore_eos=True)
_TOKENS = " ".join(map(str, split_model.generate(_PROMPT, _PARAMS)))
_ASKED = (_IDS, "--max_tokens=4", "--ignore_eos")


@pytest.fixture
def ask(capsys, monkeypatch):
    """Runs the program over the toy model."""
    monkeypatch.setenv("NANOFLOW_API_KEY", split_runs.TOKEN)
    split_program.use_toy_model(monkeypatch)
    return lambda *arguments: split_program.run(capsys, *arguments)


@pytest.fixture(scope="module")
def gateway():
    with split_program.toy_gateway() as found:
        yield found


@pytest.fixture
def profiles(tmp_path):
    """A folder of profiles that promise a quick link."""

    def of(**of_ends):
        ends = split_choices.ends(**of_ends)
        named = [dataclasses.replace(one, model="embedded") for one in (ends.client, ends.server)]
        made = Ends(model=ends.model, client=named[0], server=named[1], link=ends.link)
        profile_files.write(tmp_path / "profiles", made)
        return f"--profiles={tmp_path / 'profiles'}"

    return of


def test_what_is_profiled_can_be_planned_with(ask, gateway, tmp_path):
    out = tmp_path / "a" / "profiles"
    at = (f"--gateway={gateway.quick}", "--layers=0:2")
    code, text, said = ask(
        "profile",
        *at,
        f"--out={out}",
        "--prompt_lens=4,8,16",
        "--num_steps=2",
        "--probe_bytes=1000",
    )
    assert code == 0, said
    lines = text.splitlines()
    assert ": measured 20" in lines[0] and "jax " in lines[0]
    assert lines[1].startswith(f"gateway {gateway.quick}: measured ")
    assert lines[3].startswith("round trip ")
    # The server begins at layer 0, 1 or 2; here one layer, the other, or both are run.
    assert said.count("the gateway, layers ") == 3 * 3
    assert said.count("this end, layers ") == 3 * 3
    server = json.loads((out / "server.json").read_text())
    assert server["measured"]["model"] == "embedded"
    assert "% off for prompts" in server["source"]
    code, text, said = ask("client", *at, f"--profiles={out}", *_ASKED)
    assert (code, text) == (0, f"{_TOKENS}\n")
    assert "predicted" in said and "planned with client x1.00" in said


class _Words:
    """Encodes a text as the numbers in it."""

    def encode(self, text):
        return [int(word) for word in text.split()]

    def decode(self, token_ids):
        return " ".join(map(str, token_ids))


def test_each_prompt_is_planned_with_what_the_one_before_it_showed(
    ask, profiles, gateway, tmp_path, monkeypatch
):
    monkeypatch.setattr(client_command, "_words", lambda source: _Words())
    lines, report = tmp_path / "prompts", tmp_path / "report.jsonl"
    lines.write_text("5 6 7 8\n5 6 7 8\n")
    asked = ("client", f"--gateway={gateway.slow}", "--layers=0:2", *_ASKED[1:], profiles())
    asked += ("--tpot_ms=50", f"--prompts_file={lines}", f"--report={report}")
    code, text, said = ask(*asked)
    assert (code, text) == (0, f"{_TOKENS}\n{_TOKENS}\n"), said
    assert said.startswith("split: client [0, 2), server [2, 6); ")
    assert "\nall_server: server [0, 6); " in said
    first, second = [json.loads(line) for line in report.read_text().splitlines()]
    assert (first["verdict"], second["verdict"]) == ("split", "all_server")
    rows = {row["name"]: row for row in first["rows"]}
    assert rows["each further"]["measured"] > 200 > 50 > rows["each further"]["predicted"]
    assert second["corrections"]["rtt_s"] > 0.1


def test_rejected_requests_are_told_the_best_and_fail_the_program(ask, profiles, gateway):
    asked = (
        "client",
        f"--gateway={gateway.quick}",
        "--layers=0:2",
        *_ASKED,
        profiles(rtt_ms=100.0),
    )
    code, text, said = ask(*asked, "--ttft_ms=10")
    assert (code, text) == (1, "")
    assert "the first token takes 100.3 ms at best, 9.0 are allowed after the guard" in said
    assert "error: 1 of 1 requests were rejected: no cut meets their deadlines; give" in said
    code, text, _ = ask(*asked, "--ttft_ms=10", "--best_effort")
    assert (code, text) == (0, f"{_TOKENS}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["client", _IDS, "--ttft_ms=5"], "--ttft_ms is of requests that are planned; give --prof"),
        (["client", _IDS, "--report=x"], "--report is of requests that are planned; give --profil"),
        (
            ["client", _IDS, "--profiles=/nowhere"],
            "/nowhere/client.json is missing; python -m nano",
        ),
        (
            ["client", _IDS, "--prompts_file=x"],
            'give one of --prompt="...", --prompt_ids=1,2,3 and',
        ),
        (["client", "--prompts_file=x"], "the model has no tokenizer; give --prompt_ids in place"),
        (["profile"], "--out names the folder that the profiles are written to"),
        (["profile", "--out=x", "--prompt_lens=1,2"], "--prompt_lens=1,2 are not three or more"),
        (["profile", "--out=x", "--prompt_lens=1,2,a"], "--prompt_lens=1,2,a are not three or mo"),
    ],
)
def test_flags_that_are_wrong_are_said(ask, arguments, message):
    code, text, said = ask(*arguments)
    assert (code, text) == (2, "")
    assert said.startswith(f"error: {message}")


def test_files_that_cannot_be_written_are_said(ask, profiles, tmp_path):
    code, _, said = ask("client", _IDS, profiles(), f"--report={tmp_path}/no/report")
    assert code == 2
    assert (
        said == f"error: --report={tmp_path}/no/report cannot be written: No such file or dir"
        "ectory\n"
    )
    (tmp_path / "file").write_text("")
    ends = split_choices.ends()
    with pytest.raises(ValueError, match=r"--out=.*/file/x cannot be written: Not a directory"):
        profile_files.write(tmp_path / "file" / "x", ends)


@pytest.mark.parametrize("name", ["client", "profile"])
def test_a_gateway_that_is_not_there_is_an_error_before_anything_is_loaded(
    ask, profiles, tmp_path, name
):
    more = [_IDS, profiles()] if name == "client" else [f"--out={tmp_path}/out"]
    code, _, said = ask(name, "--gateway=127.0.0.1:9", *more)
    assert code == 1
    assert said.startswith("error: link: ")
    assert not (tmp_path / "out").exists()


def test_each_line_of_a_file_or_of_standard_input_is_a_prompt(
    ask, profiles, gateway, tmp_path, monkeypatch
):
    monkeypatch.setattr(client_command, "_words", lambda source: _Words())
    lines = tmp_path / "prompts"
    lines.write_text("5 6 7 8\n\n5 6 7\n")
    expected = "".join(
        " ".join(map(str, split_model.generate(prompt, _PARAMS))) + "\n"
        for prompt in (_PROMPT, _PROMPT[:3])
    )
    asked = ("client", f"--gateway={gateway.quick}", "--layers=0:2", *_ASKED[1:])
    assert ask(*asked, f"--prompts_file={lines}")[:2] == (0, expected)
    assert ask(*asked, f"--prompts_file={lines}", profiles())[:2] == (0, expected)
    monkeypatch.setattr(sys, "stdin", io.StringIO("5 6 7 8\n5 6 7\n"))
    assert ask(*asked, "--prompts_file=-")[:2] == (0, expected)
    lines.write_text("\n")
    for path, message in ((lines, "has no line; each is a prompt"), ("/no", "cannot be read: ")):
        code, _, said = ask("client", f"--prompts_file={path}")
        assert code == 2
        assert said.startswith(f"error: --prompts_file={path} {message}")
