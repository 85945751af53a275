"""Traces of steps: as many as asked for, in which operations have the plan's names."""

import logging
import re

import jax
import pytest
from engine_runs import ask, build_small, run
from llama_engine import CASE, KNOBS

from nanoflow_jax import config
from nanoflow_jax.bench import xplane
from nanoflow_jax.engine import step_trace
from nanoflow_jax.nanobatch import builders
from nanoflow_jax.nanobatch.operations import LayerShape

_REQUESTS = [ask(str(i), CASE.prompts[i], max_tokens=12, ignore_eos=True) for i in range(4)]


def _trace(folder, **knobs):
    engine = build_small(CASE.path, **KNOBS, profile_dir=str(folder), **knobs)
    run(engine, _REQUESTS)
    num_steps = engine.counters.steps
    engine.close()
    return num_steps


def _scopes(events):
    """Layers and nano-operations of the events of forward programs."""
    found = re.compile(r"/(layer_\d+)/(\w+\.\d+)(/|$)")
    matches = (found.search(event.scope) for event in events if event.module == "jit_forward")
    return {match.group(1, 2) for match in matches if match}


@pytest.mark.parametrize("name", ["one", "halves"])
def test_operations_of_a_trace_have_the_plans_names(name, tmp_path):
    _trace(tmp_path, plan=name, plan_granule=4, profile_steps=3, profile_after=4)
    events = xplane.read(tmp_path)
    assert len({event.run_id for event in events if event.module == "jit_forward"}) == 3
    device = builders.Device(granule=4)
    plan = {
        "one": builders.one(LayerShape(), num_tokens=24),
        "halves": builders.halves(LayerShape(), num_tokens=24, device=device),
    }[name]
    products = {key for key in plan.keys if key.partition(".")[0] in _PRODUCTS}
    wanted = {(f"layer_{i}", key) for i in range(_NUM_LAYERS) for key in products}
    assert wanted <= _scopes(events)
    assert {key for _, key in _scopes(events)} <= set(plan.keys)


_PRODUCTS = ("norm_kqv", "decode_attention", "prefill_attention", "o", "up_gate", "down")
_NUM_LAYERS = 2


def test_an_engine_that_ends_before_its_trace_writes_what_it_has(tmp_path, caplog):
    num_steps = _trace(tmp_path, profile_steps=1000, profile_after=4)
    events = xplane.read(tmp_path)
    runs = {event.run_id for event in events if event.module == "jit_forward"}
    assert len(runs) == num_steps - 4
    assert f"is in {tmp_path}" in caplog.text


def test_an_engine_that_ends_before_its_trace_begins_says_so(tmp_path, caplog):
    _trace(tmp_path, profile_steps=1, profile_after=1000)
    assert not list(tmp_path.iterdir())
    assert (
        "--profile_steps: no more than 1000 steps ran, after which a trace was to begin; lower "
        "--profile_after"
    ) in caplog.text


def test_a_trace_that_is_not_to_be_had_is_logged_and_steps_go_on(tmp_path, caplog):
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    jax.profiler.start_trace(str(tmp_path / "other"), profiler_options=options)
    try:
        with caplog.at_level(logging.ERROR):
            _trace(tmp_path / "own", profile_steps=2, profile_after=0)
    finally:
        jax.profiler.stop_trace()
    assert f"--profile_steps: no trace in {tmp_path / 'own'}: " in caplog.text
    assert not (tmp_path / "own").exists()


def test_nothing_is_recorded_unless_asked_for():
    trace = step_trace.StepTrace(config.ProfileSection())
    assert not any(trace.is_due(num_steps) for num_steps in range(100))
    trace.close()


def test_steps_without_a_folder_are_refused():
    message = "--profile_steps=3 has no place for its trace; give --profile_dir"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        config.EngineConfig.from_knobs(profile_steps=3)
