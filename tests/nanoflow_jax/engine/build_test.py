import json
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_runs import build_small
from golden import cases

from nanoflow_jax import config
from nanoflow_jax.engine import build, kernel_choice
from nanoflow_jax.kv_cache import layout
from nanoflow_jax.models import loading

_CASE = cases.load("llama")
_KNOBS = {"max_requests": 12, "dense_batch": 24, "buckets": "24:12:12", "cache_page_size": 5}


def _raises(message):
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


def _open(**knobs):
    return build.open_model(config.ModelSection(**knobs))


def test_a_preset_needs_random_weights():
    with _raises(
        "--model=preset:llama-3-8b is a shape without weights; add --random_weights, or name a "
        "folder"
    ):
        _open(model="preset:llama-3-8b")
    opened = _open(model="preset:llama-3-8b", random_weights=True)
    assert opened.folder is None
    assert opened.config.hidden_size == 4096
    assert opened.stored_dtype == "bfloat16"
    assert opened.eos_ids == frozenset()


def test_a_name_that_is_no_folder_is_answered_with_the_download_command():
    with _raises(
        "--model=meta/Llama-9 is no folder. To download a model from Hugging Face:\n"
        "  pip install huggingface_hub && hf download meta/Llama-9 --local-dir Llama-9\n"
        "then use --model=Llama-9"
    ):
        _open(model="meta/Llama-9")


@pytest.mark.parametrize("name", ["/models/llama", "./llama", "~/llama", "a/b/c"])
def test_a_path_that_is_no_folder_is_not_offered_for_download(name):
    with _raises(
        f"--model={name} is no folder; give the path of a model folder, or a name as on Hugging "
        "Face: OWNER/MODEL"
    ):
        _open(model=name)


def test_an_opened_folder_knows_its_shape_and_its_ends():
    opened = _open(model=str(cases.load("llama3").path))
    assert opened.config.vocab_size == 307
    assert len(opened.eos_ids) == 3  # of generation_config.json
    assert opened.stored_dtype == "float32"


def _with_ends(folder, ids):
    source = cases.load("llama").path
    raw = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "eos_token_id": ids}))
    (folder / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    return _open(model=str(folder))


def test_ends_outside_the_vocabulary_are_left_out_and_named(tmp_path, caplog):
    assert _with_ends(tmp_path, [2, 353]).eos_ids == {2}
    assert "end-of-text ids [353] of" in caplog.text
    assert "are outside the vocabulary of 353 and are left out" in caplog.text


def test_more_ends_than_a_row_can_ban_are_refused(tmp_path):
    assert len(_with_ends(tmp_path, list(range(84))).eos_ids) == 84
    with _raises(
        f"{tmp_path} names 85 end-of-text ids, more than 84; name fewer in generation_config.json "
        "and config.json"
    ):
        _with_ends(tmp_path, list(range(85)))


@pytest.mark.parametrize(
    ("choice", "stored", "platform", "wanted"),
    [
        ("auto", "bfloat16", "cpu", jnp.float32),
        ("auto", "bfloat16", "gpu", jnp.bfloat16),
        ("auto", "float16", "gpu", jnp.bfloat16),
        ("auto", "float32", "gpu", jnp.float32),
        ("bfloat16", "float32", "cpu", jnp.bfloat16),
        ("float32", "bfloat16", "gpu", jnp.float32),
    ],
)
def test_the_run_dtype_follows_device_and_checkpoint_unless_it_is_named(
    choice, stored, platform, wanted
):
    assert build.run_dtype(config.Dtype(choice), stored, platform) == wanted


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (
            {"dense_batch": 11},
            "--dense_batch=11 is less than --max_requests=12: each running request needs a token "
            "of room",
        ),
        ({"max_context_len": 257}, "--max_context_len=257 is more than the model's 256"),
        ({"buckets": "24:12"}, "--buckets entry '24:12' is not TOKENS:DECODE_ROWS:PREFILL_ROWS"),
        (
            {"buckets": "20:12:12"},
            "the largest bucket 20:12:12 holds less than --dense_batch=24 tokens or "
            "--max_requests=12 decode rows; add 24:12:8",
        ),
    ],
)
def test_knobs_that_do_not_fit_are_refused_before_weights_are_read(knobs, message, monkeypatch):
    monkeypatch.setattr(build.loading, "load_model", None)
    with _raises(message):
        build_small(_CASE.path, **{**_KNOBS, **knobs})


def test_f5_memory_for_less_than_a_page_is_refused(monkeypatch):
    monkeypatch.setattr(build, "_free_bytes", lambda device: 100)
    with _raises(
        "no memory for a single page of the KV cache; use a smaller model, --dtype=bfloat16, or "
        "raise --cache_memory_fraction"
    ):
        build_small(_CASE.path, **_KNOBS)


def _layout(free, monkeypatch, *, page_major=False, num_devices=1, num_replicas=1, **knobs):
    monkeypatch.setattr(build, "_free_bytes", lambda device: free)
    opened = _open(model=str(_CASE.path))
    placement = loading.place_model(opened.config, jax.devices()[:num_devices])
    share = loading.share_of_one_device(opened.config, placement)
    return build.make_layout(
        placement,
        config.CacheSection(**knobs),
        kernel_choice.Served(config=share, dtype=np.dtype(np.float32), page_size=16),
        most_pages=50,
        page_major=page_major,
        num_replicas=num_replicas,
    )


def test_the_cache_takes_its_share_of_memory_and_no_more_than_all_requests_need(monkeypatch):
    # A page of 16 tokens: keys and values of 4 heads, 8 wide, 4 bytes, in 2 layers.
    page = 2 * 16 * 4 * 8 * 4 * 2
    found = _layout(80 * page, monkeypatch, memory_fraction=0.5)  # a CPU: a quarter of it
    assert isinstance(found, layout.TokenMinorLayout)
    assert found.shape.num_pages == 10
    found = _layout(80 * page, monkeypatch, memory_fraction=0.5, page_major=True)
    assert isinstance(found, layout.PageMajorLayout)
    assert _layout(1000 * page, monkeypatch).shape.num_pages == 50
    assert _layout(80 * page, monkeypatch, num_pages=70).shape.num_pages == 70


def test_two_devices_each_keep_half_of_the_heads_in_as_many_pages_as_one_host_has_room_for(
    monkeypatch,
):
    page = 2 * 16 * 4 * 8 * 4 * 2
    found = _layout(80 * page, monkeypatch, memory_fraction=0.5, num_devices=2)
    assert (found.shape.num_kv_heads, found.shape.num_pages) == (2, 10)
    found = _layout(80 * page, monkeypatch, memory_fraction=0.5, num_replicas=2)
    assert (found.shape.num_kv_heads, found.shape.num_pages) == (4, 5)


def test_f5_more_pages_than_there_is_memory_are_refused_with_the_most_that_fit(monkeypatch):
    page = 2 * 16 * 4 * 8 * 4 * 2
    with _raises(
        f"--cache_num_pages=81 needs {81 * page} bytes and {80 * page + 1} are free; ask for at "
        "most 80, or leave it out for as many as fit"
    ):
        _layout(80 * page + 1, monkeypatch, num_pages=81)


def test_a_build_tells_what_it_chose():
    settings, programs, weights = [], [], []
    section = config.EngineConfig.from_knobs(
        model=str(_CASE.path), penalty_requests=2, **_KNOBS | {"cache_page_size": 1000}
    )
    built = build.build_engine(
        section,
        build.open_model(section.model),
        build.Reports(
            settings=settings.append,
            program=lambda done, total: programs.append((done.name, total)),
            weights=weights.append,
        ),
    )
    (chosen,) = settings
    assert (chosen.dtype, chosen.page_size, chosen.num_pages) == ("float32", 256, 12)
    assert (chosen.max_requests, chosen.dense_batch, chosen.max_context_len) == (12, 24, 256)
    assert chosen.buckets == ("24:12:12",)
    assert chosen.cache_bytes == 12 * 2 * 256 * 4 * 8 * 4 * 2
    assert weights[-1].done_bytes == weights[-1].total_bytes == chosen.model_bytes
    assert sorted(name for name, _ in programs) == sorted(built.compile_seconds)
    assert {total for _, total in programs} == {len(programs)}
    built.close()


@pytest.fixture
def no_cache_dir():
    before = jax.config.jax_compilation_cache_dir
    names = ("persistent_cache_min_compile_time_secs", "persistent_cache_min_entry_size_bytes")
    limits = {f"jax_{name}": getattr(jax.config, f"jax_{name}") for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    for name, value in limits.items():
        jax.config.update(name, value)


def test_programs_are_kept_under_the_users_cache_folder(no_cache_dir, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.use_compile_cache("auto")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "nanoflow_jax" / "programs")
    assert (tmp_path / "nanoflow_jax" / "programs").is_dir()


def test_an_empty_folder_name_keeps_no_programs(no_cache_dir):
    build.use_compile_cache("")
    assert jax.config.jax_compilation_cache_dir is None


def test_somebody_elses_choice_of_a_cache_folder_stands(no_cache_dir, tmp_path):
    jax.config.update("jax_compilation_cache_dir", "/elsewhere")
    build.use_compile_cache(str(tmp_path))
    assert jax.config.jax_compilation_cache_dir == "/elsewhere"


def test_f11_a_cache_folder_that_cannot_be_made_is_a_warning(no_cache_dir, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        build.use_compile_cache(str(tmp_path / "file" / "programs"))
    assert jax.config.jax_compilation_cache_dir is None
    assert "no compilation cache in" in caplog.text
    assert "every start will compile" in caplog.text
