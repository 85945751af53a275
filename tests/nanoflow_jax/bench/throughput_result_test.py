import dataclasses
import hashlib
import json
import pathlib

import batch_runs
import msgspec
import pytest

from nanoflow_jax import config
from nanoflow_jax.bench import throughput, throughput_result
from nanoflow_jax.engine import build, kernel_choice, model_source
from nanoflow_jax.results import folder, manifest, provenance
from nanoflow_jax.results import throughput as throughput_kind
from nanoflow_jax.workload.file import WorkRequest

_WORKLOAD = {"a": [{"prompt": [1, 2, 3], "out": 4}, {"prompt": [4], "out": 2}]}


def test_a_result_says_which_work_was_done_with_which_knobs(tmp_path: pathlib.Path) -> None:
    workload = tmp_path / "work.json"
    workload.write_text(json.dumps(_WORKLOAD))
    knobs = config.EngineConfig(
        model=config.ModelSection(model="", random_weights=True, weight_seed=7),
        batch=config.BatchSection(max_requests=4),
        compile=config.CompileSection(cache_dir=str(tmp_path)),
    )
    asked = throughput_result.Asked(
        name="try", workload=workload, mixes=["a", "b"], repeats=3, engine=knobs, command=["x"]
    )
    found = throughput_result.planned(asked, model_source.open_model(knobs.model))

    assert found.setting == {
        "workload_sha256": hashlib.sha256(workload.read_bytes()).hexdigest(),
        "mixes": ["a", "b"],
        "repeats": 3,
        "knobs": {"random_weights": True, "weight_seed": 7, "max_requests": 4},
    }
    assert (found.num_samples, found.seed) == (6, 7)
    assert found.model["num_layers"] == 4
    assert found.device.platform == "cpu"
    trained = dataclasses.replace(asked, engine=config.EngineConfig())
    assert throughput_result.planned(trained, model_source.open_model(knobs.model)).seed is None


def _settings(**makers: kernel_choice.Maker) -> build.Settings:
    choices = {
        kernel_choice.Operation(name): kernel_choice.Choice(maker=maker, reason="asked for")
        for name, maker in makers.items()
    }
    return build.Settings(
        num_replicas=2,
        device="cpu",
        dtype="float32",
        model_bytes=1,
        cache_bytes=2,
        num_pages=3,
        page_size=16,
        max_requests=4,
        dense_batch=32,
        max_context_len=64,
        plans={"4:4:0": "one"},
        executor=config.Executor.SEQUENTIAL,
        kernels=kernel_choice.Choices(by_operation=choices, num_ctas=48),
    )


def test_a_plan_leaves_out_what_depends_on_free_memory() -> None:
    settings = _settings(
        gemm=kernel_choice.Maker.PLAIN, decode_attention=kernel_choice.Maker.MOSAIC
    )
    assert throughput_result.plan(settings) == {
        "num_replicas": 2,
        "dtype": "float32",
        "page_size": 16,
        "max_requests": 4,
        "dense_batch": 32,
        "max_context_len": 64,
        "plans": {"4:4:0": "one"},
        "executor": "sequential",
        "kernels": {"gemm": "plain", "decode_attention": "Mosaic kernel"},
        "num_ctas": 48,
        "interpreted": False,
        "batch_invariant": False,
    }


@pytest.mark.parametrize(
    ("makers", "modules"),
    [
        ({"gemm": "plain", "grouped_gemm": "plain"}, []),
        (dict.fromkeys(kernel_choice.Operation, "Mosaic kernel"), [*kernel_choice.Operation]),
        ({"decode_attention": "Triton kernel"}, ["decode_attention_triton"]),
    ],
)
def test_an_engines_kernels_are_modules_whose_sources_are_found(
    makers: dict[str, str], modules: list[str]
) -> None:
    chosen = {name: kernel_choice.Maker(maker) for name, maker in makers.items()}
    found = throughput_result.kernels(_settings(**chosen))
    assert found == modules
    sources = provenance.kernel_sources(found)
    assert {f"pallas_kernels/{name}.py" for name in modules} <= sources.keys()


def test_every_maker_of_kernels_is_known() -> None:
    for maker in set(kernel_choice.Maker) - {kernel_choice.Maker.PLAIN}:
        assert throughput_result.kernels(_settings(decode_attention=maker))


def test_a_run_is_a_sample_of_its_kind() -> None:
    run = throughput.Throughput(
        requests=2,
        input_tokens=4,
        output_tokens=6,
        seconds=0.5,
        steps=4,
        first_token_s=(0.1, 0.2),
        per_token_s=(0.1,),
        tokens_sha256="5e",
    )
    mix = [WorkRequest(prompt_ids=(1,), output_len=n) for n in (4, 2)]
    made = throughput_result.sample("a", 1, mix, run)
    found = msgspec.convert(made, throughput_kind.Sample)
    assert (found.case, found.round, found.asked_tokens, found.output_tokens) == ("a", 1, 6, 6)


def test_a_benchmark_leaves_a_result_folder(tmp_path: pathlib.Path) -> None:
    (tmp_path / "work.json").write_text(json.dumps(_WORKLOAD))
    command = [
        *("throughput", "--workload=work.json", "--result_name=try", "--results=results"),
        *("--repeats=2", *batch_runs.flags()),
    ]
    done = batch_runs.bench(tmp_path, *command)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "results").glob("*/*-try")
    result = folder.read(path)
    found = result.manifest
    assert (found.status, found.message, found.num_samples) == ("done", "", 2)
    assert folder.damages(path, found, result.kind) == []
    assert [one.output_tokens for one in result.samples] == [6, 6]
    assert len({one.tokens_sha256 for one in result.samples}) == 1
    output = found.figures[0]
    assert f"a: output: median {output.median:.1f} tokens/s" in done.stdout
    assert f"result: results/{found.folder}\n" in done.stdout
    assert found.run.command[:3] == ("python", "-m", "nanoflow_jax.bench")
    assert found.run.plan["dense_batch"] == batch_runs.KNOBS["dense_batch"]
    log = (path / manifest.LOG).read_text()
    assert log.startswith("start ")
    assert "a run 2 of 2\n" in log

    again = batch_runs.bench(tmp_path, *command)
    assert again.returncode == 2
    assert "is there already; give the result another name, or delete it" in again.stderr
