import logging
import re

import jax
import pytest
from engine_runs import build_small
from golden import cases

from nanoflow_jax import config
from nanoflow_jax.engine import build, model_source

_CASE = cases.load("llama")
_KNOBS = {"max_requests": 12, "dense_batch": 24, "buckets": "24:12:12", "cache_page_size": 5}


def _raises(message):
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


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
    monkeypatch.setattr(model_source.loading, "load_spans", None)
    with _raises(message):
        build_small(_CASE.path, **{**_KNOBS, **knobs})


def test_a_build_tells_what_it_chose():
    settings, programs, weights = [], [], []
    section = config.EngineConfig.from_knobs(
        model=str(_CASE.path), penalty_requests=2, **_KNOBS | {"cache_page_size": 1000}
    )
    built = build.build_engine(
        section,
        model_source.open_model(section.model),
        build.Reports(
            settings=settings.append,
            program=lambda done, total: programs.append((done.name, total)),
            weights=weights.append,
        ),
    )
    (chosen,) = settings
    assert (chosen.dtype, chosen.page_size, chosen.num_pages) == ("float32", 256, 12)
    assert (chosen.max_requests, chosen.dense_batch, chosen.max_context_len) == (12, 24, 256)
    assert (chosen.plans, chosen.executor) == ({"24:12:12": "one"}, "sequential")
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
