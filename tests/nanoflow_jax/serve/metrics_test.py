import pathlib
import re

from nanoflow_jax import config, request
from nanoflow_jax.engine_process import client, messages
from nanoflow_jax.serve import metrics

_DOCUMENT = pathlib.Path(__file__).parents[3] / "docs" / "metrics.md"


def _finished(made: metrics.Metrics, first_s: float, total_s: float) -> None:
    made.finish(
        prompt_tokens=3,
        output_tokens=5,
        reasons=("stop",),
        first_token_s=first_s,
        total_s=total_s,
    )


def test_every_documented_name_is_there():
    made = metrics.Metrics()
    made.watch(client.EngineClient(config.EngineConfig(), say=lambda text: None))
    made.begin(request.SamplingParams())
    _finished(made, 0.1, 0.5)
    text = made.text().decode()
    names = set(re.findall(r"`(nanoflow_\w+)", _DOCUMENT.read_text("utf-8"))) - {"nanoflow_"}
    assert len(names) > 20
    missing = {name for name in names if name not in text}
    assert missing == {"nanoflow_cache_config_info"}  # known once the engine is ready


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
