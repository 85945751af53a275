import dataclasses
import json

import pictures
import pytest

from nanoflow_jax.engine import model_source
from nanoflow_jax.models import presets
from nanoflow_jax.nanobatch import builders, operations, plan_file
from nanoflow_jax.search import plan_question, plan_search

_COMMANDS = "check, cost, draw, gate, paper, plan, profile, simulate, trace"


def _line(text, start):
    (found,) = [line for line in text.splitlines() if line.startswith(start)]
    return found.split()


def test_a_preset_is_told_with_its_bounds_its_operations_and_its_ceilings(ask):
    code, text, _ = ask("cost", "--model=llama-2-70b", "--device=paper:a100-80g", "--devices=8")
    assert code == 0
    assert "bound by compute: memory / compute 0.18, network / compute 0.277" in text
    # Of each operation and step: 2 x tokens x weights.
    tokens = float(text.split("dense batch: ")[1].split(" ")[0].replace(",", ""))
    kqv = float(_line(text, "kqv")[1].replace(",", ""))
    assert kqv == pytest.approx(2 * tokens * 8192 * 10240 * 80 / 1e9, rel=1e-3)
    rows = ("decode_attention", "prefill_attention", "o", "up_gate", "down", "collectives", "head")
    compute = sum(float(_line(text, f"{name} ")[4]) for name in ("kqv", *rows))
    assert float(_line(text, "all ")[1]) == pytest.approx(compute, abs=0.05)


def test_what_products_reach_moves_the_optimum_and_nothing_of_memory(ask):
    _, promised, _ = ask("cost", "--model=preset:llama-3-8b")
    _, reached, _ = ask("cost", "--model=llama-3-8b", "--teraflops=494.75")  # half of it
    first, second = (
        float(_line(text, "  products alone")[-4].replace(",", "")) for text in (promised, reached)
    )
    assert first == pytest.approx(2 * second, abs=2)
    memory = [text.split("memory read once ")[1].split(" ")[0] for text in (promised, reached)]
    assert memory[0] == memory[1]


def test_a_folder_is_worked_out_by_its_config(ask):
    code, text, _ = ask("cost", f"--model={model_source.embedded_folder()}", "--device=l4")
    assert code == 0
    assert "1 x L4, 512 tokens in and 512 out" in text


def test_the_plot_has_the_asked_workload_beside_the_public_ones(ask, tmp_path):
    path = tmp_path / "plot.svg"
    code, _, _ = ask(
        "cost", "--model=llama-3-8b", "--input_len=100", "--output_len=2000", f"--plot={path}"
    )
    assert code == 0
    picture = pictures.parse(path.read_text())
    texts = pictures.texts(picture)
    assert {"asked, 100/2000", "lmsys", "splitwise", "sharegpt", "512/512"} <= set(texts)
    title = "llama-3-8b on 1 x H200 SXM"
    assert pictures.titles(picture) == [title, "asked, 100/2000"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], f"say what to do: one of {_COMMANDS}; got nothing"),
        (["price"], f"say what to do: one of {_COMMANDS}; got price"),
        (["trace"], "--output names the CSV file that the requests go into"),
        (["trace", "--compare=a.csv"], "--compare=a.csv needs --trace: which one the file has"),
        (
            ["trace", "--trace=lmsys", "--compare=/nowhere/a.csv"],
            "/nowhere/a.csv cannot be read as",
        ),
        (["trace", "--output=/nowhere/t.csv"], "--output=/nowhere/t.csv cannot be written: No"),
        (["trace", "--output=x", "--input_len=1.5"], "trace '1.5/512' is neither one of"),
        (["plan"], "--model names the model to work it out for"),
        (
            ["plan", "--model=llama-3-8b", "--device=paper:h200"],
            "--device=paper:h200 does not say how many SMs it has",
        ),
        (
            ["plan", "--model=llama-3-8b", "--dense_batch=1000"],
            "--dense_batch=1000 cannot be split: give a multiple of 128, from 256 on",
        ),
        (
            ["plan", "--model=llama-3-8b", "--dense_batch=128000"],
            "--dense_batch=128000 is more than memory can feed, which is 2,482",
        ),
        (
            ["plan", "--model=llama-3-8b", "--profile=paper"],
            "--profile=paper has times of llama-2-70b on 8 of a100-80g with 2048 tokens alone",
        ),
        (["cost"], "--model names the model to work it out for"),
        (["gate", "--model=llama-3-8b", "--plot=x.svg"], "gate draws nothing: leave --plot out"),
        (["cost", "--model=gpt"], "--model=gpt is neither a folder, nor a config.json, nor one of"),
        (["cost", "--model=llama-3-8b", "--device=tpu"], "accelerator 'tpu' is not known; take"),
        (["cost", "--model=llama-3.1-405b"], "weights of 812 GB do not fit in 141 GB; take more"),
        (
            ["cost", "--model=llama-3-8b", "--output_len=0"],
            "requests without output fill no memory; give a dense batch",
        ),
        (
            ["cost", "--model=llama-3-8b", "--input_len=0"],
            "requests of 0 tokens and 512 more are none; give a prompt at least one token",
        ),
        (
            ["cost", "--model=llama-3-8b", "--dense_batch=1e6"],
            "--dense_batch=1e+06 is more than memory can feed: it holds",
        ),
        (
            ["cost", "--model=llama-3-8b", "--devices=3", "--stages=2"],
            "3 devices cannot be 2 equal stages",
        ),
        (
            ["cost", "--model=llama-3-8b", "--plot=/nowhere/plot.svg"],
            "--plot=/nowhere/plot.svg cannot be written: No such file or directory",
        ),
    ],
)
def test_what_cannot_be_answered_is_a_message(ask, arguments, message):
    code, text, complaint = ask(*arguments)
    assert (code, text) == (2, "")
    assert complaint.startswith(f"error: {message}")


def test_prompts_alone_are_worked_out_for_a_given_dense_batch(ask):
    code, text, _ = ask("cost", "--model=llama-3-8b", "--output_len=0", "--dense_batch=2048")
    assert code == 0
    assert "nothing is generated, so nothing stays cached" in text
    assert float(_line(text, "decode_attention")[1]) == 0.0


def test_made_up_requests_are_written_and_summed_up(ask, tmp_path):
    path = tmp_path / "requests.csv"
    arguments = ("trace", "--trace=lmsys", "--requests=500", "--rate=10", f"--output={path}")
    code, text, _ = ask(*arguments)
    assert code == 0
    assert text.startswith("500 requests like lmsys: ")
    written = path.read_text()
    assert len(written.splitlines()) == 501
    ask(*arguments)
    assert path.read_text() == written
    ask(*arguments, "--seed=1")
    assert path.read_text() != written


def test_made_up_requests_are_told_beside_those_of_a_file(ask, tmp_path):
    path = tmp_path / "requests.csv"
    ask("trace", "--trace=sharegpt", "--requests=2000", f"--output={path}")
    code, text, _ = ask("trace", "--trace=sharegpt", f"--compare={path}", "--seed=1")
    assert code == 0
    assert "2,000 of the file / as many made up" in text
    assert "quantile in steps of 1 % is off by more than 3% and a token; the worst is " in text


def test_a_plan_is_found_told_of_drawn_and_written_as_engines_load_it(ask, tmp_path):
    path, plot = tmp_path / "plan.json", tmp_path / "plan.svg"
    arguments = ("--model=qwen3-8b", "--device=h200", "--dense_batch=1024", "--time_limit_s=5")
    code, text, _ = ask("plan", *arguments, f"--output={path}", f"--plot={plot}")
    assert code == 0
    assert "nothing was measured" in text
    for start in ("best plan: ", "nothing split, "):
        assert _line(text, start)
    (plan,) = plan_file.read(path)
    assert plan.num_tokens == 1024
    assert plan.name in text
    assert pictures.titles(pictures.parse(plot.read_text())) == ["qwen3-8b on 1 x H200 SXM"]


def test_where_splitting_gains_nothing_the_plan_splits_nothing(ask):
    """Prompts alone keep products busy all the time: there is nothing to run beside them."""
    arguments = ("--model=mixtral-8x7b", "--devices=1", "--device=h200", "--output_len=0")
    code, text, _ = ask("plan", *arguments, "--dense_batch=256", "--time_limit_s=5")
    assert code == 0
    assert "best plan: one, " in text
    assert "splitting does not pay here" in text


def test_all_that_the_paper_prints_is_told_beside_its_prediction(ask):
    code, text, _ = ask("paper", "--requests=40")
    assert code == 0
    lines = text.splitlines()
    assert "Nothing was measured here" in lines[0]
    assert "Tables 2 and 3, and the 512/512 column" in lines[1]
    assert "split 982 / 982 +0.0 %" in " ".join(_line(text, "  512/512 (fitted)"))
    starts = {line.split()[0] for line in lines}
    assert {"512/0", "512/512", "llama-3-8b", "splitwise", "lmsys", "sharegpt"} <= starts
    assert sum(line.endswith(" %") for line in lines) == 4 + 3 + 6
    assert any("traces of 40 requests" in line for line in lines)


def test_the_papers_times_are_taken_where_they_are_asked_for(ask):
    arguments = ("--model=llama-2-70b", "--device=a100-80g", "--devices=8", "--output_len=1024")
    code, text, _ = ask("plan", *arguments, "--profile=paper", "--time_limit_s=1")
    assert code == 0
    assert "Table 2, measured on 8 A100" in text
    assert "nothing split, one after another: 2,81" in text


def test_dense_batches_are_looked_at_from_the_smallest_that_can_be_split(ask, tmp_path):
    path = tmp_path / "plans.json"
    arguments = ("--model=llama-3-8b", "--dense_batch=640", "--time_limit_s=3")
    code, text, _ = ask("gate", *arguments, f"--output={path}")
    assert code == 0
    assert [plan.num_tokens for plan in plan_file.read(path)] == [256, 512, 640]
    assert "splitting does not win" in text or "splitting wins from" in text


def test_splitting_wins_from_the_size_below_which_it_once_does_not():
    def outcome(name):
        plan = dataclasses.replace(builders.one(operations.LayerShape(), num_tokens=256), name=name)
        return plan_search.Outcome(sequential_s=1.0, plan=plan, period_s=1.0, bound_s=1.0)

    one, split = outcome("one"), outcome("halves")
    assert plan_question.gate({256: split, 512: one, 1024: split, 2048: split}) == 1024
    assert plan_question.gate({256: split, 512: one}) is None


def test_a_model_and_a_device_that_nobody_has_seen_need_one_command(ask, tmp_path):
    config = {
        **presets.load("llama-3-8b"),
        "hidden_size": 3072,
        "intermediate_size": 9216,
        "num_attention_heads": 24,
        "num_hidden_layers": 30,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    device = tmp_path / "x.json"
    device.write_text(
        json.dumps(
            {
                "name": "Accelerator X",
                "num_sms": 96,
                "teraflops": 450,
                "memory_gb": 64,
                "memory_gb_per_s": 2600,
            }
        )
    )
    code, text, complaint = ask(
        "plan", f"--model={tmp_path}", f"--device={device}", "--time_limit_s=1"
    )
    assert (code, complaint) == (0, "")
    for shown in ("on 1 x Accelerator X", "best plan: ", "nothing split", "why, in us a layer"):
        assert shown in text


@pytest.mark.parametrize(("text", "message"), [("{", "not JSON"), ("[]", "is list in JSON")])
def test_a_config_that_is_none_is_a_message(ask, tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text)
    code, _, complaint = ask("cost", f"--model={path}")
    assert code == 2
    assert str(path) in complaint
    assert message in complaint
