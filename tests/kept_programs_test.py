"""Where test helpers keep compiled programs, and that they keep none where jax keeps none."""

import pathlib
import subprocess
import sys

import batch_runs
import deviceless
import jax
import pytest


@pytest.fixture(params=[None, "programs"])
def kept(request, tmp_path):
    """Where jax keeps programs meanwhile: nowhere, or in a folder."""
    before = jax.config.jax_compilation_cache_dir
    folder = None if request.param is None else str(tmp_path / request.param)
    jax.config.update("jax_compilation_cache_dir", folder)
    yield folder
    jax.config.update("jax_compilation_cache_dir", before)


def test_programs_for_gpus_are_kept_beside_jaxs_or_nowhere(kept):
    assert deviceless.cache_folder() == (kept and pathlib.Path(kept) / "deviceless")


def test_a_program_that_a_test_starts_keeps_what_it_compiles_there_or_nowhere(kept, tmp_path):
    compiled = "import jax; jax.jit(lambda x: x + 3)(1.0).block_until_ready()"
    environment = batch_runs.environment(JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    subprocess.run(
        [sys.executable, "-c", compiled], env=environment, cwd=tmp_path, timeout=200, check=True
    )
    assert [path.name for path in tmp_path.iterdir()] == ([] if kept is None else ["programs"])
