"""Times of operations from events of a trace, worked by hand."""

import jax
import pytest

from nanoflow_jax.bench import ablation_trace
from nanoflow_jax.bench.xplane import Event


def _event(scope, start, end):
    return Event(module="m", run_id=1, op="op", scope=scope, start_ns=start * 1e9, end_ns=end * 1e9)


def test_an_operation_is_busy_while_any_of_its_events_lasts():
    events = [
        _event("jit(forward)/layer_1/o.0/dot_general", 10, 14),
        _event("jit(forward)/layer_0/o.1/add", 1, 3),
        _event("jit(forward)/layer_0/o.1", 2, 5),
        _event("jit(forward)/layer_0/o.1/while/body", 2.5, 3),
    ]
    assert ablation_trace.busy_seconds(events) == {"o": 8.0}


def test_what_operations_share_has_the_names_of_both():
    scope = "jit(forward)/layer_0/decode_attention.0/layer_0/o.1/kernel"
    events = [_event(scope, 0, 1), _event("layer_0/o.0/dot", 2, 4)]
    assert ablation_trace.busy_seconds(events) == {"decode_attention+o": 1.0, "o": 2.0}


def test_what_belongs_to_no_operation_of_a_layer_is_left_out():
    events = [_event("jit(forward)/head/dot_general", 0, 1), _event("", 1, 2)]
    assert ablation_trace.busy_seconds(events) == {}


def test_a_trace_beside_another_is_an_error_of_its_own(tmp_path):
    with jax.profiler.trace(str(tmp_path)), pytest.raises(ablation_trace.TraceError):
        ablation_trace.operation_seconds(None, None, "sequential", [])
