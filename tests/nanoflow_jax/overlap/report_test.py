"""What is said of programs made by hand, and why they are not as they should be."""

import dataclasses

import planned_programs
import pytest
from planned_programs import EIGHT, HALVES

from nanoflow_jax import config
from nanoflow_jax.config import Executor
from nanoflow_jax.cost import datasheets, timeline
from nanoflow_jax.deviceless.program import Instruction
from nanoflow_jax.models import huggingface, presets
from nanoflow_jax.nanobatch import builders, legality
from nanoflow_jax.nanobatch.dependencies import Rule
from nanoflow_jax.nanobatch.operations import Resource
from nanoflow_jax.overlap import analysis, report, step
from nanoflow_jax.scheduler.buckets import Bucket

_8B = huggingface.read_config(presets.load("llama-3-8b"))
_CONTEXTS = timeline.Contexts(decode_len=768.0, prefix_len=256.0)
_ATTENTION = "decode attention may run beside products of other tokens"
_SUMS = "sums over devices may run beside computing for other tokens"
_PRODUCTS = "products wait for each other"
_CHAIN = "the longest chain takes at most 70% of the sum of predicted times"
_SMS = "what runs at once fits the 132 SMs"
_CALLS = "each product and each sum of the plan is one call"
_CACHE = "the cache is changed in place"
_SPILLS = "no kernel of ours spills registers"


def _check(program, plan=HALVES, *, decode_rows=256):
    """What does not hold, and why."""
    asked = step.Step(
        model=step.first_layers(_8B, planned_programs.NUM_LAYERS),
        bucket=Bucket(tokens=512, decode_rows=decode_rows, prefill_rows=2),
        plan=plan,
        executor=Executor.GRAPH,
        kernels=config.KernelsSection(),
        num_devices=plan.shape.num_devices,
    )
    prediction = "nothing is known of sums"
    if asked.num_devices == 1:
        sheet = datasheets.datasheet("NVIDIA H200")
        prediction = timeline.predict_step(_8B, plan, asked.bucket, _CONTEXTS, sheet)
    found = report.check(analysis.of_step(program, asked), asked, prediction)
    text = report.text(found, program, asked, prediction)
    for one in found:
        assert f"{'ok  ' if one.holds else 'NOT '} {one.claim}: {one.detail}" in text
    return {one.claim: one.detail for one in found if not one.holds}, text


def test_a_program_as_its_plan_wants_it_is_as_it_should_be():
    failed, text = _check(planned_programs.program(HALVES))
    assert failed == {}
    for claim in (_ATTENTION, _PRODUCTS, _CHAIN, _SMS, _CALLS, _CACHE, _SPILLS):
        assert f"ok   {claim}: " in text
    assert "compiled to overlap, not measured; by the datasheet a layer takes " in text


def test_a_chain_hides_no_attention_and_is_as_long_as_the_sum():
    failed, _ = _check(planned_programs.program(HALVES, planned_programs.chain(HALVES)))
    assert set(failed) == {_ATTENTION, _CHAIN}
    assert failed[_ATTENTION] == (
        "nothing is beside layer 0 decode_attention.0, layer 0 decode_attention.1, "
        "layer 1 decode_attention.0 and 5 more"
    )
    assert "of those compiled 100.0%, of which the plan wants" in failed[_CHAIN]


def test_the_plan_that_splits_nothing_hides_no_attention():
    plan = builders.one(planned_programs.SHAPE, num_tokens=512)
    failed, _ = _check(planned_programs.program(plan), plan)
    assert set(failed) == {_ATTENTION, _CHAIN}
    assert failed[_ATTENTION].startswith("nothing is beside layer 0 decode_attention.0, layer 1")
    assert failed[_CHAIN].startswith("100.0% over all layers")


def test_two_kernels_of_all_sms_at_once_do_not_fit():
    order = tuple(
        dataclasses.replace(nano, num_ctas=None if nano.lane is None else 132)
        for nano in HALVES.order
    )
    plan = dataclasses.replace(HALVES, order=order)
    with pytest.raises(ValueError, match="may run at once and ask for 264 CTAs of 132 SMs"):
        legality.check(plan)
    failed, _ = _check(planned_programs.program(plan), plan)
    assert failed == {_SMS: "264 CTAs: layer 0 prefill_attention.0 and layer 0 decode_attention.0"}


def test_products_beside_products_are_said():
    other = {HALVES.order[i].tokens for i in HALVES.by_operation["o"][:1]}
    order = tuple(
        dataclasses.replace(nano, lane=Resource.NETWORK, num_ctas=50)
        if nano.lane is Resource.COMPUTE and nano.tokens in other
        else dataclasses.replace(nano, num_ctas=nano.num_ctas and min(nano.num_ctas, 50))
        for nano in HALVES.order
    )
    plan = dataclasses.replace(HALVES, order=order)
    edges = planned_programs.wanted_edges(plan)
    program = planned_programs.program(plan, edges)
    nodes = (
        dataclasses.replace(node, kind="kCustomCall", kernel=node.kernel or "ctas_50")
        if node.kind == "kAllReduce"
        else node
        for node in program.order.nodes
    )
    program = dataclasses.replace(
        program, order=dataclasses.replace(program.order, nodes=tuple(nodes))
    )
    failed, _ = _check(program, plan)
    assert set(failed) == {_PRODUCTS}
    assert failed[_PRODUCTS].startswith("layer 0 norm_kqv.")


def test_products_that_nothing_orders_ask_for_too_many_sms_too():
    edges = planned_programs.wanted_edges(HALVES, rules=(Rule.VALUE, Rule.CACHE))
    failed, _ = _check(planned_programs.program(HALVES, edges))
    assert set(failed) == {_PRODUCTS, _SMS}
    assert failed[_SMS].startswith("264 CTAs: ")


def test_sums_that_run_alone_are_said():
    whole, _ = _check(planned_programs.program(EIGHT), EIGHT)
    assert whole == {}
    failed, text = _check(planned_programs.program(EIGHT, planned_programs.chain(EIGHT)), EIGHT)
    assert failed[_SUMS].startswith("nothing is beside layer 0 o_reduce.0, layer 0 o_reduce.1")
    assert set(failed) == {_SUMS, _ATTENTION.replace("products", "products or sums")}
    assert "no times are predicted: nothing is known of sums" in text


def test_doubled_products_copies_of_the_cache_spills_and_kernels_too_large_are_said():
    def spoil(kernel):
        return dataclasses.replace(kernel, spill_bytes=8, shared_bytes=240_000)

    copy = Instruction(
        name="copy", opcode="copy", shape="", num_bytes=1 << 30, operands=(), scope=""
    )
    program = planned_programs.program(
        HALVES,
        doubled=["o.1"],
        change=spoil,
        instructions=(copy, dataclasses.replace(copy, num_bytes=8)),
    )
    failed, text = _check(program)
    assert set(failed) == {_CALLS, _CACHE, _SPILLS, _SMS}
    assert failed[_CALLS].startswith("layer 0 o.1 has 2 calls")
    assert failed[_CACHE].endswith("bytes aliased, 1 copies")
    assert failed[_SPILLS] == "16 bytes"
    assert failed[_SMS].endswith("too large for an SM: ctas_100, ctas_32")
    assert "1    32        168              8        240000" in text


def test_nothing_is_said_of_attention_where_no_row_decodes():
    _, text = _check(planned_programs.program(HALVES), decode_rows=0)
    assert "attention may run" not in text
