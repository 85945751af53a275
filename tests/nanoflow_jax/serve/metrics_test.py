import pathlib
import re

from nanoflow_jax import config, request
from nanoflow_jax.engine_process import client, messages
from nanoflow_jax.serve import metrics

_DOCUMENT = pathlib.Path(__file__).parents[3] / "docs" / "metrics.md"


def _finished(made: metrics.Metrics, first_s: float, total_s: float) -> None:
    times = messages.Times(
        started_s=first_s / 4,
        first_token_s=first_s,
        end_s=total_s,
        num_tokens=5,
        reasons=("stop",),
    )
    made.finish(times, prompt_tokens=3)


def test_every_documented_name_is_there():
    made = metrics.Metrics()
    made.watch(client.EngineClient(config.EngineConfig(), say=lambda text: None))
    made.begin(request.SamplingParams())
    _finished(made, 0.1, 0.5)
    text = made.text().decode()
    names = set(re.findall(r"`(nanoflow_\w+)", _DOCUMENT.read_text("utf-8"))) - {"nanoflow_"}
    assert len(names) > 20
    missing = {name for name in names if name not in text}
    # Known once the engine is there.
    assert missing == {"nanoflow_cache_config_info", "nanoflow_engine_resident_memory_bytes"}


def test_the_time_of_a_request_is_told_in_parts():
    made = metrics.Metrics()
    _finished(made, 2.0, 10.0)
    text = made.text().decode()
    for part, seconds in (("queue", 0.5), ("prefill", 1.5), ("decode", 8), ("inference", 9.5)):
        assert f"nanoflow_request_{part}_time_seconds_sum {seconds:.1f}\n" in text


def test_a_request_without_a_token_has_no_parts():
    made = metrics.Metrics()
    times = messages.Times(
        started_s=None, first_token_s=None, end_s=1.0, num_tokens=0, reasons=("error",)
    )
    made.finish(times, prompt_tokens=3)
    text = made.text().decode()
    assert "nanoflow_e2e_request_latency_seconds_count 1.0\n" in text
    for part in ("queue", "prefill", "decode", "inference"):
        assert f"nanoflow_request_{part}_time_seconds_count 0.0\n" in text


def test_percentiles_are_of_finished_requests():
    made = metrics.Metrics()
    assert made.percentiles()["ttft_s"] == {"p50": None, "p90": None, "p99": None, "count": 0}
    for i in range(10):
        _finished(made, i / 10, 1.0 + i / 10)
    assert made.percentiles()["ttft_s"] == {"p50": 0.5, "p90": 0.9, "p99": 0.9, "count": 10}
    assert made.percentiles()["tpot_s"]["p50"] == 0.25
    assert made.totals["stop"] == 10


def test_requests_that_are_taken_back_are_counted():
    made = metrics.Metrics()
    made.count_abort()
    assert made.totals["abort"] == 1
    assert 'nanoflow_request_success_total{finished_reason="abort"} 1.0' in made.text().decode()


def test_steps_are_counted_by_their_tokens_also_after_a_new_engine():
    made = metrics.Metrics()

    def step(**load: int) -> None:
        made.take_step(
            messages.Stepped(
                scored=(), deltas=(), completions=(), times=(), load=messages.Load(**load)
            )
        )

    step(steps=1, prefill_tokens=10)
    step(steps=2, prefill_tokens=10, decode_tokens=4)
    step(steps=2, prefill_tokens=10, decode_tokens=4)  # nothing was launched
    step(steps=1, prefill_tokens=3)  # another engine
    assert "nanoflow_iteration_tokens_total_sum 17.0" in made.text().decode()
