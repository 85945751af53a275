"""`simulate` and `draw` as programs."""

import json
import pathlib
import shutil

import pytest

from nanoflow_jax.nanobatch import builders, plan_file
from nanoflow_jax.nanobatch.operations import LayerShape

_ASKED = ("simulate", "--model=llama-3-8b", "--device=h200", "--input_len=64", "--output_len=8")

_PLANS = pathlib.Path(__file__).parents[3] / "configs" / "plans"
_FOUND = f"--plan={_PLANS}/h200/llama-3-8b.json"
_FOUND_TP8 = f"--plan={_PLANS}/a100-80g/llama-2-70b-tp8.json"
_PLAN = ("draw", "--model=llama-3-8b", "--plot=p.svg")


def test_rates_are_simulated_saved_and_drawn(ask, tmp_path):
    saved = tmp_path / "s.json"
    code, text, _ = ask(
        *_ASKED, "--rates=20,10", "--duration_s=3", "--data_parallel=2", f"--output={saved}"
    )
    assert code == 0
    assert text.startswith("llama-3-8b on 2 x H200 SXM, 64/8, best; nothing was measured: steps by")
    assert "30 requests, 2,160 tokens in" in text
    assert "60 requests, 4,320 tokens in" in text
    assert "200 ms a token are held at none or all of these rates" in text
    content = json.loads(saved.read_text())
    assert [run["rate"] for run in content["runs"]] == [10, 20]
    for name, ending in (("latency", "svg"), ("resources", "html"), ("throughput", "svg")):
        plot = tmp_path / f"{name}.{ending}"
        code, text, _ = ask("draw", f"--input={saved}", f"--picture={name}", f"--plot={plot}")
        assert code == 0
        assert f"shows {name} of llama-3-8b on 2 x H200 SXM" in text
        start = "<!doctype html>" if ending == "html" else "<svg "
        assert plot.read_text().startswith(start)


def test_a_plan_is_simulated_beside_the_same_loop_without_plans(ask, tmp_path):
    saved = tmp_path / "s.json"
    asked = (*_ASKED, "--output_len=64", "--requests=200", "--fixed_batch")
    code, text, _ = ask(*asked, _FOUND, f"--output={saved}")
    assert code == 0
    assert "64/64, plan 768 + 1280, attention in 2; nothing was measured: steps by" in text
    assert "speeds on shares of a device: how many SMs fill memory" in text
    assert "64/64, sequential; nothing was measured" in text
    gain = float(text.splitlines()[-1].removeprefix("at once: ").split()[0])
    (run,) = json.loads(saved.read_text())["runs"]
    plain = ask(*asked, "--mode=sequential", f"--output={saved}")[1]
    assert plain.splitlines()[2] in text.splitlines()  # the same loop to the last digit
    (without,) = json.loads(saved.read_text())["runs"]
    speeds = [one["summary"]["steady_tokens_per_s"] for one in (run, without)]
    assert speeds[0] / speeds[1] == pytest.approx(gain, abs=1e-3)


def test_the_same_flags_give_the_same_run_and_another_seed_another(ask):
    asked = (*_ASKED, "--trace=lmsys", "--requests=50", "--rate=20", "--max_tokens=1024")
    first, again, other = (ask(*asked, f"--seed={seed}")[1] for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize(("model", "beside"), [("llama-2-70b", True), ("llama-3-70b", False)])
def test_latency_of_what_nanoflow_ran_is_drawn_beside_its_own(ask, tmp_path, model, beside):
    plot = tmp_path / "p.svg"
    code, _, _ = ask(
        *(
            "simulate",
            f"--model={model}",
            "--device=paper:a100-80g",
            "--devices=8",
            "--trace=lmsys",
        ),
        *("--reached=nanoflow-a100", "--rate=10", "--requests=5", "--picture=latency"),
        f"--plot={plot}",
    )
    assert code == 0
    assert ("mean, as printed" in plot.read_text()) == beside


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium on the path")
def test_a_picture_in_pixels_has_the_size_of_the_drawing(ask, tmp_path):
    plot = tmp_path / "p.png"
    code, _, _ = ask(*_ASKED, "--requests=20", f"--plot={plot}")
    assert code == 0
    head = plot.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(head[16:20]), int.from_bytes(head[20:24])) == (778, 700)


def test_pixels_need_a_browser(ask, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    code, _, complaint = ask(*_ASKED, "--requests=20", f"--plot={tmp_path}/p.png")
    assert code == 2
    assert complaint.startswith("error: a .png needs chromium on the path; take .svg or .html")


def test_a_browser_that_makes_no_picture_is_told_of(ask, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/false")
    code, _, complaint = ask(*_ASKED, "--requests=20", f"--plot={tmp_path}/p.png")
    assert code == 1
    assert complaint.startswith("error: /bin/false made no picture")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*_ASKED, "--rates=1,x"), "--rates=1,x are not all numbers"),
        ((*_ASKED, "--rates=1,2", "--rate=1"), "--rate and --rates cannot both be given"),
        ((*_ASKED, "--rates=-1"), "a rate of -1 requests/s brings none"),
        ((*_ASKED, "--duration_s=3"), "--duration_s needs --rate or --rates: without, all"),
        ((*_ASKED, "--warm_up_s=1"), "no request comes after 1 s of warm-up; simulate for longer"),
        ((*_ASKED, "--device=l4", "--page_size=1000000"), "the weights leave no room for a page"),
        ((*_ASKED, "--requests=2", "--output=/nowhere/s"), "--output=/nowhere/s cannot be written"),
        ((*_ASKED, "--requests=2", "--plot=/nowhere/s.svg"), "--plot=/nowhere/s.svg cannot be"),
        ((*_ASKED, "--requests=2", "--plot=p.gif"), "--plot ends in '.gif'; pictures are .svg"),
        ((*_ASKED, "--plan=/nowhere"), "--plan=/nowhere cannot be read: No such file"),
        (
            (*_ASKED, _FOUND, "--mode=split"),
            "--mode=split and --plan cannot both be given: a plan says how the operations",
        ),
        (
            (*_ASKED, _FOUND, "--dense_batch=1024"),
            f"--dense_batch=1024: {_PLANS}/h200/llama-3-8b.json has plans for 2048",
        ),
        (
            (*_ASKED, _FOUND_TP8),
            f"{_FOUND_TP8}: plan '1280 + 768, attention in 2, o reduced' is for dense layers on 8 "
            "devices, and the model has dense layers on 1 device; give the model and --devices",
        ),
        (
            (*_ASKED, _FOUND, "--model=mixtral-8x7b"),
            f"{_FOUND}: plan '768 + 1280, attention in 2' is for dense layers on 1 device, and the "
            "model has sparse layers on 1 device; give",
        ),
        (
            (*_ASKED, _FOUND, "--device=h100-pcie"),
            f"{_FOUND}: plan '768 + 1280, attention in 2' shares out 132 SMs, and a H100 PCIe has "
            "114; give the --device that it is made for",
        ),
        (
            (*_ASKED, _FOUND, "--device=paper:h200"),
            "--device=paper:h200 has no number of SMs, which plans share out; take one without",
        ),
        (("draw",), "--input names files that simulate wrote, or --plan one of plans; and"),
        (("draw", "--plan=p"), "--input names files that simulate wrote, or --plan one of plans"),
        ((*_PLAN, "--plan=/nowhere"), "--plan=/nowhere cannot be read: No such file"),
        ((*_PLAN, "--plan=p", "--device=paper:h200"), "--device=paper:h200 has no number of SMs"),
        (("draw", "--input=/nowhere", "--plot=p.svg"), "--input=/nowhere cannot be read: No such"),
    ],
)
def test_what_cannot_be_simulated_or_drawn_is_a_message(ask, arguments, message):
    code, text, complaint = ask(*arguments)
    assert (code, text) == (2, "")
    assert complaint.startswith(f"error: {message}")


def test_one_picture_of_latency_shows_one_simulation(ask, tmp_path):
    saved = tmp_path / "s.json"
    ask(*_ASKED, "--rate=10", "--requests=20", f"--output={saved}")
    code, _, complaint = ask(
        "draw", f"--input={saved},{saved}", "--picture=latency", "--plot=p.svg"
    )
    assert code == 2
    assert complaint.startswith("error: --picture=latency shows one simulation; give one --input")


def test_the_pipeline_of_a_plan_is_drawn_with_its_predicted_time(ask, tmp_path):
    shape = LayerShape(is_sparse=False)
    plans = [builders.halves(shape, num_tokens=tokens) for tokens in (1024, 2048)]
    path, plot = tmp_path / "plans.json", tmp_path / "plan.html"
    path.write_text(plan_file.to_json(plans))
    asked = ("draw", "--model=llama-3-8b", f"--plan={path}", f"--plot={plot}")
    code, text, _ = ask(*asked)
    assert code == 0
    assert "halves, 2048 tokens of 512/512, H200 SXM: a layer in" in text
    page = plot.read_text()
    assert "layer 15 up_gate.0:" in page
    assert "layer 18 " not in page
    assert "halves, 1024 tokens" in ask(*asked, "--dense_batch=1024")[1]
    code, _, complaint = ask(*asked, "--dense_batch=512")
    assert code == 2
    assert complaint.startswith(f"error: --dense_batch=512: {path} has plans for 1024, 2048")
