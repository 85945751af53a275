import pytest

from nanoflow_jax.cost import datasheets, timeline
from nanoflow_jax.cost.steady_state import Mix
from nanoflow_jax.models import huggingface, presets
from nanoflow_jax.nanobatch import builders
from nanoflow_jax.nanobatch.dependencies import Dependencies
from nanoflow_jax.overlap import workload
from nanoflow_jax.scheduler.buckets import Bucket

_8B = huggingface.read_config(presets.load("llama-3-8b"))
_BUCKET = Bucket(tokens=2048, decode_rows=1024, prefill_rows=8)
_CONTEXTS = timeline.Contexts(decode_len=1024.0, prefix_len=512.0)
_H200 = datasheets.datasheet("NVIDIA H200")


def _predict(plan):
    return timeline.predict_step(_8B, plan, _BUCKET, _CONTEXTS, _H200)


def test_nothing_starts_before_what_it_waits_for_and_lanes_never_run_two_at_once():
    plan = builders.halves(_8B.layer_shape, num_tokens=2048)
    durations = timeline.durations(plan, _8B, _BUCKET, _CONTEXTS, _H200)
    dependencies = Dependencies(plan, [plan.graph] * 4)
    spans = timeline.predict(dependencies, durations)
    by_node = dict(zip(dependencies.nodes, spans, strict=True))
    for node, span in by_node.items():
        assert span.end_s == pytest.approx(span.start_s + durations[span.key])
        for first in dependencies.waits_for(node):
            assert by_node[first].end_s <= span.start_s


def test_the_plain_pass_is_one_chain_and_halves_are_not():
    one = _predict(builders.one(_8B.layer_shape, num_tokens=2048))
    assert one.critical_fraction == pytest.approx(1.0)
    assert one.period_s == pytest.approx(one.sum_s) == one.plain_s
    halves = _predict(builders.halves(_8B.layer_shape, num_tokens=2048))
    assert halves.critical_fraction < 0.9
    assert halves.period_s < one.sum_s == halves.plain_s < halves.sum_s


@pytest.mark.parametrize(("prompt", "output"), [(512, 512), (1024, 512)])
def test_the_papers_requests_leave_a_chain_of_at_most_70_percent_at_2048_tokens(prompt, output):
    work = workload.Workload(mix=Mix(prompt_len=prompt, output_len=output), num_tokens=2048)
    plan = builders.halves(_8B.layer_shape, num_tokens=2048)
    found = timeline.predict_step(_8B, plan, work.bucket, work.contexts, _H200)
    assert found.critical_fraction < 0.60
    assert found.period_s < 0.80 * found.plain_s
