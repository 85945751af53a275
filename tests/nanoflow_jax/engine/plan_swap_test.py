"""Plans change while an engine runs: the tokens stay, and a file that is wrong changes nothing."""

import logging
import os
import re
import time

import pytest
from engine_runs import Output, ask, build_small, take
from golden import cases

from nanoflow_jax import config
from nanoflow_jax.engine import kernel_choice, plan_swap, step_choice
from nanoflow_jax.nanobatch import builders, plan_file
from nanoflow_jax.nanobatch.operations import LayerShape

_TOKENS = 16
_KNOBS = {"max_requests": 4, "dense_batch": _TOKENS, "buckets": f"{_TOKENS}:4:2"}
_LIMIT_S = 120


def _halves():
    return builders.halves(LayerShape(), num_tokens=_TOKENS, device=builders.Device(granule=8))


def _write(path, text):
    """As people should: the file is another in one moment."""
    new = path.with_suffix(".new")
    new.write_text(text)
    os.replace(new, path)


@pytest.fixture
def plans(tmp_path):
    path = tmp_path / "plans.json"
    _write(path, plan_file.to_json([builders.one(LayerShape(), num_tokens=_TOKENS)]))
    return path


def _serve_until(served, is_done):
    """Serves one request after another until then, and one more; what each of them got."""
    found, end = [], time.monotonic() + _LIMIT_S
    is_last = False
    while not is_last:
        assert time.monotonic() < end, "it never came to it"
        is_last = is_done()
        output = Output()
        served.add(ask(str(len(found)), range(5, 25), max_tokens=12, ignore_eos=True))
        while served.has_work:
            for update in served.step():
                take(output, update)
        found.append(output.token_ids)
    served.check()
    assert served.num_late_compiles == 0
    return found


def test_plans_of_a_file_are_swapped_under_requests_that_get_the_same_tokens(plans, caplog):
    served = build_small(cases.load("llama3").path, plan=str(plans), plan_watch=True, **_KNOBS)
    alone = _serve_until(served, lambda: True)[0]
    assert len(alone) == 12
    _write(plans, plan_file.to_json([_halves()]))
    found = _serve_until(served, lambda: "run from now on" in caplog.text)
    assert all(tokens == alone for tokens in found)
    assert f"{plans} has changed; its plans are compiled beside the steps" in caplog.text
    said = f"plans of {plans} run from now on: {_TOKENS}:4:2 by halves"
    assert said in caplog.text
    served.close()


def test_a_file_of_plans_that_is_wrong_is_told_and_changes_nothing(plans, caplog):
    served = build_small(cases.load("llama3").path, plan=str(plans), plan_watch=True, **_KNOBS)
    alone = _serve_until(served, lambda: True)[0]
    _write(plans, "{")
    found = _serve_until(served, lambda: "not JSON" in caplog.text)
    (record,) = [one for one in caplog.records if one.levelno == logging.ERROR]
    assert record.message.startswith(f"the plans that run are kept: {plans}: not JSON: ")
    _write(plans, plan_file.to_json([_halves()]))
    found += _serve_until(served, lambda: "by halves" in caplog.text)
    assert all(tokens == alone for tokens in found)
    served.close()


def test_a_file_that_is_gone_for_a_moment_has_not_changed(plans):
    file = plan_swap.WatchedFile(plans)
    assert not file.has_changed()
    text = plans.read_text()
    plans.unlink()
    assert not file.has_changed()
    _write(plans, text)
    assert file.has_changed()
    assert not file.has_changed()


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (
            {"plan": "halves"},
            "--plan_watch reads a file of plans again, and --plan=halves is none; name a file, or "
            "leave --plan_watch out",
        ),
        (
            {
                "plan": "plans.json",
                "num_processes": 2,
                "tensor_parallel": 2,
                "coordinator": "127.0.0.1:7000",
            },
            "--plan_watch takes other plans in one process, and --num_processes=2; leave it out, "
            "and start all of them again for other plans",
        ),
    ],
)
def test_what_cannot_be_watched_is_refused(knobs, message):
    asked = config.EngineConfig.from_knobs(plan_watch=True, **knobs)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        plan_swap.watched(asked)


def test_without_the_flag_no_file_is_watched():
    assert plan_swap.watched(config.EngineConfig.from_knobs(plan="plans.json")) is None


def _chosen(*columns):
    return step_choice.Chosen(
        plans={},
        by_columns=frozenset(columns),
        executor=config.Executor.SEQUENTIAL,
        kernels=kernel_choice.Choices(by_operation={}, num_ctas=1),
        ways={},
    )


def test_plans_that_want_weights_otherwise_than_they_were_loaded_are_refused():
    step_choice.check_swap(_chosen("o"), _chosen("o"))
    message = (
        "weights split by columns are those of down, o, and of none since the start; start again "
        "with these plans"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        step_choice.check_swap(_chosen(), _chosen("o", "down"))
