import json
import shutil
import subprocess
import sys
import xml.etree.ElementTree

import pytest
import split_profiles
import split_program

from nanoflow_jax.results import svg
from nanoflow_jax.split.planning import study_command

_SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def ask(capsys):
    """Runs the program; gives its exit code, what it printed, and what it complained of."""

    return lambda *arguments: split_program.run(capsys, *arguments)


def _plan(client="mac", server="h100", link="fibre"):
    ends = {"client": client, "server": server, "link": link}
    paths = [f"--{name}={split_profiles.FOLDER / one}.json" for name, one in ends.items()]
    return ["plan", "--model=llama-3-8b", "--prompt_len=1024", *paths]


_SPLIT = [*_plan(), "--ttft_ms=800", "--tpot_ms=60"]


def _line(text, start):
    (found,) = [line for line in text.splitlines() if line.startswith(start)]
    return found


def _ms(line):
    return [float(word.replace(",", "")) for word in line.split() if word[0].isdigit()]


def test_a_split_is_told_with_its_placement_its_times_and_what_it_saves(ask):
    code, text, _ = ask(*_SPLIT)
    assert code == 0
    assert text.startswith("llama-3-8b, 1024 tokens in and 128 out: mac and h100-class over fibre")
    assert "verdict: split: sharing the layers charges the server least" in text
    assert _line(text, "all tokens  ").endswith("client: attention 21 to head")
    assert "35 % saved" in _line(text, "server time (marginal): ")
    planned, usual, limit = _ms(_line(text, "first token   "))
    assert usual < planned <= limit == 720.0
    # What it is made of is what it takes.
    assert sum(_ms(_line(text, "first token: "))) == pytest.approx(planned, abs=0.3)
    step, usual, limit = _ms(_line(text, "each further  "))
    assert usual < step <= limit == 54.0
    assert sum(_ms(_line(text, "each further: "))) == pytest.approx(step, abs=0.3)


def test_the_frontier_is_shown_from_the_dearest_to_the_cheapest(ask):
    _, text, _ = ask(*_SPLIT)
    lines = text.split("what other deadlines would cost:\n")[1].splitlines()[1:]
    charges = [float(line.split()[1]) for line in lines]
    assert charges == sorted(charges, reverse=True)
    assert lines[0].endswith("all_server")
    assert lines[-1].endswith("all_client")
    assert len(lines) == 12


def test_migrating_plans_show_prefill_and_decode_apart(ask):
    code, text, _ = ask(
        *_plan(client="phone", link="lan"), "--prompt_len=256", "--ttft_ms=1000", "--tpot_ms=150",
        "--migrate", "--grid=8",
    )  # fmt: skip
    assert code == 0
    assert _line(text, "prefill  ") != _line(text, "decode   ")
    assert "cached tokens moving" in _line(text, "first token: ")


def test_what_nothing_meets_is_rejected_with_the_best_there_is(ask):
    code, text, _ = ask(*_plan(), "--ttft_ms=20")
    assert code == 0
    assert "verdict: reject: no placement meets the deadlines: the first token takes" in text
    assert _line(text, "at best, each by itself: first token ")
    code, text, _ = ask(*_plan(), "--ttft_ms=20", "--best_effort")
    assert "verdict: all_server: no placement meets" in text
    code, text, _ = ask(*_plan(), "--ttft_ms=1")
    assert text.endswith("no deadlines up to four times as long can be met\n")


def test_pins_and_held_layers_are_flags(ask):
    code, text, _ = ask(
        *_SPLIT, "--client_layers=0:4,28:32", "--client_first=2", "--client_last=1", "--grid=1",
        "--ttft_ms=3000",
    )  # fmt: skip
    assert code == 0
    placed = _line(text, "all tokens  ").split(" | ")
    assert placed == [
        "all tokens  client: embedding to mlp 3",
        "server: attention 4 to mlp 27",
        "client: attention 28 to head",
    ]


def test_without_deadlines_the_frontier_goes_by_the_whole_answer(ask):
    code, text, _ = ask(*_plan())
    assert code == 0
    assert "answer in s" in text


def test_the_plot_shows_the_placement_the_parts_and_the_frontier(ask, tmp_path):
    path = tmp_path / "plan.svg"
    code, _, _ = ask(*_SPLIT, f"--plot={path}")
    assert code == 0
    picture = xml.etree.ElementTree.fromstring(path.read_text())
    texts = {one.text for one in picture.iter(f"{_SVG}text")}
    assert {"prefill", "decode", "first token", "each further", "times the deadlines"} <= texts
    tips = [one.text for one in picture.iter(f"{_SVG}title")]
    assert "client: attention 21 to head" in tips
    assert any(tip.startswith("server: ") and tip.endswith(" ms") for tip in tips)
    assert len(list(picture.iter(f"{_SVG}circle"))) > 12


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium on the path")
def test_the_plot_in_pixels_has_the_size_of_the_drawing(ask, tmp_path):
    drawn, seen = tmp_path / "plan.svg", tmp_path / "plan.png"
    for path in (drawn, seen):
        code, _, _ = ask(*_SPLIT, f"--plot={path}")
        assert code == 0
    head = seen.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    size = (int.from_bytes(head[16:20]), int.from_bytes(head[20:24]))
    assert size == svg.size(drawn.read_text())


def test_a_rejected_request_is_drawn_with_its_frontier_alone(ask, tmp_path):
    path = tmp_path / "plan.svg"
    ask(*_plan(), "--ttft_ms=20", f"--plot={path}")
    picture = xml.etree.ElementTree.fromstring(path.read_text())
    texts = [one.text for one in picture.iter(f"{_SVG}text")]
    assert "prefill" not in texts
    assert any(text.startswith("reject: ") for text in texts)
    ask(*_plan(), "--ttft_ms=1", f"--plot={path}")
    picture = xml.etree.ElementTree.fromstring(path.read_text())
    assert not list(picture.iter(f"{_SVG}circle"))


@pytest.mark.parametrize(("name", "flag"), [("plan", "--ttft_ms"), ("study", "--[no]region")])
def test_help_of_a_command_lists_its_flags(name, flag):
    command = [sys.executable, "-m", "nanoflow_jax.split", name, "--help"]
    shown = subprocess.run(command, capture_output=True, text=True)
    assert shown.returncode == 0
    assert flag in shown.stdout


def test_planning_loads_no_jax():
    code = "import sys; from nanoflow_jax.split import __main__ as p; p.command(['', 'plan']); "
    code += "p.command(['', 'study']); assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say what to do first: one of client, plan, profile, serve, study; got nothing"),
        (["price"], "say what to do first: one of client, plan, profile, serve, study; got price"),
        (
            [*_SPLIT, "more"],
            "say what to do first: one of client, plan, profile, serve, study; got plan more",
        ),
        (["plan"], "--model names the model to work it out for: a folder, or one of"),
        (["plan", "--model=gpt"], "--model=gpt is neither a folder, nor a config.json, nor one of"),
        (["plan", "--model=llama-3-8b"], "--client names the JSON profile of the client, as in"),
        ([*_SPLIT, "--link="], "--link names the JSON profile of the link, as in configs/split"),
        ([*_SPLIT, "--server=/no.json"], "[Errno 2] No such file or directory: '/no.json'"),
        ([*_SPLIT, "--ttft_ms=0"], "ttft_s=0 is no deadline; give a positive time, or none"),
        ([*_SPLIT, "--prompt_len=0"], "prompt_len=0 is under 1; a prompt has a token"),
        ([*_SPLIT, "--guard=2"], "guard=2 is outside (0, 1]; 0.9 keeps a tenth in hand"),
        ([*_SPLIT, "--client_layers=4"], "--client_layers has '4'; wanted START:STOP, as 0:8"),
        ([*_SPLIT, "--client_layers=0:99"], "the client cannot hold layers 0:99 of llama-3-8b"),
        ([*_SPLIT, "--plot=/nowhere/p.svg"], "--plot=/nowhere/p.svg cannot be written: No such"),
        ([*_SPLIT, "--plot=p.gif"], "--plot ends in '.gif'; pictures are .svg, .html or .png"),
    ],
)
def test_what_cannot_be_answered_is_a_message(ask, arguments, message):
    code, text, complaint = ask(*arguments)
    assert (code, text) == (2, "")
    assert complaint.startswith(f"error: {message}")


def test_a_broken_profile_is_a_message_with_its_file(ask, tmp_path):
    path = tmp_path / "phone.json"
    path.write_text(json.dumps({"schema": 1}))
    code, _, complaint = ask(*_SPLIT, f"--client={path}")
    assert code == 2
    assert complaint == f"error: {path}: the file.device is missing; wanted a string\n"


def test_a_study_is_a_table_of_each_accounting_and_of_where_a_third_is_saved(ask, monkeypatch):
    monkeypatch.setattr(study_command, "_SLACKS", (2.0,))
    monkeypatch.setattr(study_command, "_RTTS_MS", (10,))
    code, text, _ = ask(
        "study", f"--profiles={split_profiles.FOLDER}", "--requests=1", "--accounting=average"
    )
    assert code == 0
    assert text.startswith("average accounting, 1 requests for each setting:\n\n| setting | load |")
    rows = [line for line in text.splitlines() if line.startswith(("| h100, answer", "| l4, tok"))]
    assert len(rows) == 6
    assert all(0 <= float(row.split(" | ")[1]) <= 1 for row in rows)
    assert "| l4, deadlines of tokens | 2x |" in text
    assert text.count("| round trip 10 ms | ") == 4


def test_a_study_without_its_profiles_is_a_message(ask):
    code, _, complaint = ask("study", "--profiles=/nowhere")
    assert code == 2
    assert "No such file or directory: '/nowhere/phone.json'" in complaint
