"""Settings every test runs under: strict promotion, eight host devices, a shared compile cache."""

import os
import pathlib
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Threads of interpreted Mosaic kernels wait for each other on XLA's pool, which has one per core:
# with fewer than four they wait for ever.
os.environ.setdefault("NPROC", "8")
_FLAGS = (
    "--xla_force_host_platform_device_count=8",
    # Compilation is most of a test run, and LLVM's passes are a quarter of it: 290 s against 380 s
    # with an empty cache on two cores.
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {' '.join(_FLAGS)}".strip()

import hypothesis
import jax
import kernel_runs
import pytest

# Compilation dominates these tests: workers and later runs share what was compiled once.
_CACHE = pathlib.Path(
    os.environ.get(
        "NANOFLOW_TEST_CACHE", pathlib.Path(tempfile.gettempdir()) / "nanoflow-test-cache"
    )
)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)

hypothesis.settings.register_profile(
    "default", deadline=None, max_examples=25, derandomize=True, database=None
)
hypothesis.settings.load_profile("default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ends a run with more interpreted kernels than CI has time for."""
    wanted = kernel_runs.needs_interpreter.mark
    interpreted = [item for item in items if wanted in item.iter_markers("skipif")]
    short = [item for item in interpreted if not item.get_closest_marker("slow")]
    if len(short) > kernel_runs.MOST_INTERPRETED:
        raise pytest.UsageError(
            f"{len(short)} tests interpret kernels, more than {kernel_runs.MOST_INTERPRETED}: let "
            "one case show several things, as the table in tests/kernel_runs.py says"
        )
