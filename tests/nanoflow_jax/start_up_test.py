"""What is said while an engine starts."""

import dataclasses

from nanoflow_jax import start_up
from nanoflow_jax.config import Executor
from nanoflow_jax.engine import build, compiler, kernel_choice
from nanoflow_jax.models import loading

_SETTINGS = build.Settings(
    num_replicas=1,
    device="cpu",
    dtype="float32",
    model_bytes=3_200_000_000,
    cache_bytes=500,
    num_pages=7,
    page_size=64,
    max_requests=8,
    dense_batch=32,
    max_context_len=128,
    plans={"8:8:0": "one", "32:8:8": "one"},
    executor=Executor.SEQUENTIAL,
    kernels=kernel_choice.Choices(
        by_operation={
            operation: kernel_choice.Choice(maker=kernel_choice.Maker.PLAIN, reason=f"why {i}")
            for i, operation in enumerate(kernel_choice.Operation)
        },
        num_ctas=2,
    ),
)


def test_loading_is_said_every_two_seconds_and_at_the_end() -> None:
    now = 0.0
    said: list[str] = []
    reports = start_up.reports(said.append, clock=lambda: now)
    for now, done in ((0.5, 1), (2.1, 2), (3.0, 3), (3.5, 4)):
        gigabytes = 1_000_000_000
        reports.weights(
            loading.Progress(done_bytes=done * gigabytes, total_bytes=4 * gigabytes, seconds=now)
        )
    assert said == ["loading: 2.0 GB of 4.0 GB, 2.1 s", "loading: 4.0 GB of 4.0 GB, 3.5 s"]


def test_programs_are_counted_as_they_are_ready() -> None:
    said: list[str] = []
    reports = start_up.reports(said.append)
    for name in ("a", "b"):
        reports.program(compiler.Compiled(name=name, call=print, seconds=1.25), 2)
    assert said == ["compiled 1 of 2: a, 1.2 s", "compiled 2 of 2: b, 1.2 s"]


def test_programs_of_each_replica_are_counted_from_one() -> None:
    said: list[str] = []
    reports = start_up.reports(said.append)
    for _ in range(4):
        reports.program(compiler.Compiled(name="a", call=print, seconds=1.25), 2)
    assert said == ["compiled 1 of 2: a, 1.2 s", "compiled 2 of 2: a, 1.2 s"] * 2


def test_it_is_said_which_buckets_run_by_which_plan() -> None:
    plans = {"8:8:0": "one", "32:8:8": "halves", "64:8:8": "halves"}
    graph = dataclasses.replace(_SETTINGS, plans=plans, executor=Executor.GRAPH)
    wanted = "plan: one (8:8:0), halves (32:8:8 64:8:8); executor: graph\n"
    assert wanted in start_up.describe(graph)


def test_settings_are_said_and_handed_on() -> None:
    said: list[str] = []
    chosen: list[build.Settings] = []
    start_up.reports(said.append, also_settings=chosen.append).settings(_SETTINGS)
    assert chosen == [_SETTINGS]
    assert said[0].splitlines() == [
        "device: cpu; model: float32, 3.2 GB",
        "cache: 7 pages of 64 tokens, 500 B; context: 128 tokens",
        "dense batch: 32 tokens of at most 8 requests; buckets: 8:8:0, 32:8:8",
        "plan: one; executor: sequential",
        "kernels: gemm plain (why 0), grouped gemm plain (why 1), decode attention plain (why 2), "
        "prefill attention plain (why 3)",
    ]
    reasoned = dataclasses.replace(_SETTINGS, max_requests_reason="memory holds 9 of 64 tokens")
    assert "at most 8 requests (memory holds 9 of 64 tokens); buckets: " in start_up.describe(
        reasoned
    )
    invariant = dataclasses.replace(_SETTINGS, batch_invariant=True)
    assert "buckets: 8:8:0, 32:8:8; batch invariant\n" in start_up.describe(invariant)
