"""Steps of the simulator whose layers run by plans."""

import dataclasses

import pytest

from nanoflow_jax.cost import datasheets, serving
from nanoflow_jax.cost.steady_state import Mix
from nanoflow_jax.models import huggingface, presets
from nanoflow_jax.nanobatch import builders
from nanoflow_jax.nanobatch.operations import LayerShape
from nanoflow_jax.nanobatch.plan import TokenRange
from nanoflow_jax.search import interference, plan_steps
from nanoflow_jax.simulator import calibration
from nanoflow_jax.simulator.step_time import DATASHEET, Mode, Roofline

_TOKENS = 1024
_MIX = Mix(prompt_len=512, output_len=512)


def _of(model, device, num_devices):
    cluster = serving.Cluster(accelerator=datasheets.accelerator(device), num_devices=num_devices)
    return huggingface.read_config(presets.load(model)), cluster


_8B = _of("llama-3-8b", "h200", 1)
_70B = _of("llama-2-70b", "a100-80g", 8)


def _step(where, plan, *, reached=DATASHEET, tokens=_TOKENS):
    steps = plan_steps.PlanSteps(
        *where, reached, plans={plan.num_tokens: plan}, speeds=interference.ROOFLINE
    )
    return steps.predict(calibration.steady_work(_MIX, tokens))


def _sequential(where, *, reached=DATASHEET, tokens=_TOKENS):
    times = Roofline(*where, reached, Mode.SEQUENTIAL)
    return times.predict(calibration.steady_work(_MIX, tokens))


@pytest.mark.parametrize("reached", [DATASHEET, calibration.nanoflow_a100()])
@pytest.mark.parametrize("columns", [(), ("o", "down")])
def test_a_plan_that_cuts_nothing_takes_what_the_sequential_step_takes(reached, columns):
    shape = LayerShape(num_devices=8)
    plan = builders.one(shape, num_tokens=_TOKENS, by_columns=columns)
    found, wanted = _step(_70B, plan, reached=reached), _sequential(_70B, reached=reached)
    assert found.device_s == pytest.approx(wanted.device_s)
    assert found.busy_s == wanted.busy_s


def test_halves_hide_attention_but_for_the_first_and_the_last_layer():
    """Attention of a half runs on a third of the SMs at full speed, products beside it on the rest.

    By hand: decode attention is hidden behind products at two thirds of their speed.
    """
    shape = LayerShape()
    device = builders.Device(num_sms=132, attention_ctas=44)
    plan = builders.halves(shape, num_tokens=_TOKENS, device=device)
    work = calibration.steady_work(_MIX, _TOKENS)
    parts = Roofline(*_8B, DATASHEET, Mode.SEQUENTIAL).operations_s(
        dataclasses.replace(
            work,
            tokens=_TOKENS // 2,
            decode_rows=work.decode_rows // 2,
            decode_context=work.decode_context / 2,
            chunk_pairs=work.chunk_pairs / 2,
        )
    )
    whole = Roofline(*_8B, DATASHEET, Mode.SEQUENTIAL).operations_s(work)
    products = 2 * 1.5 * sum(parts[n] for n in ("kqv", "prefill_attention", "o", "up_gate", "down"))
    attention = parts["decode_attention"]
    assert attention < products / 4  # and so all of it can be hidden
    at_ends = 2 * attention / 32  # of 32 layers
    found = _step(_8B, plan).device_s - whole["head"]
    assert products < found <= products + at_ends


def test_steps_of_other_sizes_run_without_plans():
    plan = builders.halves(LayerShape(), num_tokens=_TOKENS)
    assert _step(_8B, plan, tokens=512) == _sequential(_8B, tokens=512)


def test_decode_rows_lie_where_the_plan_deals_them():
    plan = builders.halves(LayerShape(), num_tokens=_TOKENS)
    uneven = dataclasses.replace(plan, decode_weights=(3, 1))
    halves = TokenRange(0, 512), TokenRange(512, 1024)
    assert [uneven.decode_share(half) for half in halves] == [0.75, 0.25]
    assert plan.decode_share(TokenRange(0, 1024)) == 1.0
    # All rows in one half leave nothing to overlap with in the other.
    one_sided = dataclasses.replace(plan, decode_weights=(1000, 1))
    assert _step(_8B, one_sided).device_s > _step(_8B, plan).device_s


def test_a_plan_that_cuts_pays_what_cutting_costs():
    plan = builders.halves(LayerShape(), num_tokens=_TOKENS)
    costly = dataclasses.replace(DATASHEET, cut_s=1e-4)
    free, paid = (_step(_8B, plan, reached=r).device_s for r in (DATASHEET, costly))
    # It is paid with the products after norms, on their share of the SMs.
    share = plan.num_ctas([nano.operation for nano in plan.order].index("up_gate")) / plan.num_sms
    assert paid - free == pytest.approx(1e-4 * _8B[0].num_layers / share)
