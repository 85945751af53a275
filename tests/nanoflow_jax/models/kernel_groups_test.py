"""Kernels of several operations in one: what each has to do, and those that have nothing to do;
engine.kernels_in_engine_test has what they compute.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from nanoflow_jax.models import architecture, kernel_attention, kernel_operations
from nanoflow_jax.models.kernel_groups import KernelGroups
from nanoflow_jax.models.operations import Place
from nanoflow_jax.models.transformer import AttentionSpec
from nanoflow_jax.nanobatch.executor import Call, Member
from nanoflow_jax.nanobatch.operations import LayerShape, layer_graph
from nanoflow_jax.nanobatch.plan import TokenRange

_MODEL = architecture.ModelConfig(
    family="llama",
    num_layers=1,
    hidden_size=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=192,
    vocab_size=20,
    max_context_len=96,
    norm_eps=1e-5,
    rope=architecture.RopeConfig(),
    query_scale=1.0,
    windows=(None,),
    moe=architecture.MoeConfig(
        num_experts=8,
        num_active=2,
        intermediate_size=32,
        normalise=True,
        sparse_layers=(True,),
    ),
)
_GROUPS = KernelGroups(
    config=_MODEL,
    products=True,
    expert_products=True,
    decode_attention=True,
    prefill_attention=False,
    interpret=None,
)
_TOKENS = TokenRange(8, 18)


def _works(groups, *, is_sparse):
    graph = layer_graph(LayerShape(is_sparse=is_sparse))
    found = {op.name: groups.work(op, _TOKENS) for op in graph.operations}
    return {name: work for name, work in found.items() if work is not None}


def test_the_work_of_a_product_is_its_multiplications_and_of_attention_nothing_is_known():
    assert _works(_GROUPS, is_sparse=False) == {
        "norm_kqv": 10 * 64 * (4 + 2 * 2) * 16,
        "decode_attention": 0,
        "o": 10 * 64 * 4 * 16,
        "up_gate": 10 * 64 * 2 * 192,
        "down": 10 * 64 * 192,
    }


def test_a_product_by_columns_has_the_work_of_one_along_the_summed_axis():
    graph = layer_graph(LayerShape(num_devices=2))
    works = {op.name: _GROUPS.work(op, _TOKENS) for op in graph.operations}
    assert works["o_columns"] == works["o"]
    assert works["down_columns"] == works["down"]
    assert works["o_reduce"] is None


def test_a_token_multiplies_with_the_weights_of_its_own_experts():
    works = _works(_GROUPS, is_sparse=True)
    assert works["up_gate"] == 10 * 2 * 64 * 2 * 32
    assert "route" not in works


@pytest.mark.parametrize(
    ("made", "is_sparse", "wanted"),
    [
        ({"products": False}, True, {"decode_attention", "up_gate", "down"}),
        ({"expert_products": False}, True, {"decode_attention", "norm_kqv", "o"}),
        (
            {"products": False, "prefill_attention": True, "decode_attention": False},
            False,
            {"prefill_attention"},
        ),
    ],
)
def test_what_is_no_kernel_has_no_work(made, is_sparse, wanted):
    groups = dataclasses.replace(_GROUPS, **made)
    assert _works(groups, is_sparse=is_sparse).keys() == wanted


def _member(operation, num_ctas, *reads):
    call = Call(
        layer=0,
        operation=operation,
        key=f"{operation}.0",
        tokens=_TOKENS,
        num_ctas=num_ctas,
        token=None,
    )
    return Member(call=call, reads=reads)


def _run_operation(call, *reads):
    """A product that is doubled, or attention without rows."""
    if call.operation == "decode_attention":
        return (None,)
    products = kernel_operations.KernelProducts(num_ctas=7, interpret=None)
    made = products.product(*reads, bias=None, residual=None, place=Place.of(call))
    return 2 * made


def _trace(*members):
    def run(x, w):
        given = [dataclasses.replace(m, reads=(x, w)[: len(m.reads)]) for m in members]
        return _GROUPS.run(given, _run_operation)

    shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((4096, 64), (4096, 64))]
    return jax.make_jaxpr(run)(*shapes), jax.eval_shape(run, *shapes)


def test_a_product_beside_attention_without_rows_has_the_sms_of_both():
    traced, (decoded, product) = _trace(
        _member("decode_attention", 48), _member("up_gate", 84, "x", "w")
    )
    assert decoded == (None,)
    assert product.shape == (4096, 4096)
    assert str(traced).count("Mesh(grid=(") == str(traced).count("Mesh(grid=(132,)") == 1


def test_two_products_are_one_kernel_and_each_is_finished_by_its_operation():
    traced, made = _trace(_member("o", 32, "x", "w"), _member("up_gate", 84, "x", "w"))
    assert [one.shape for one in made] == [(4096, 4096)] * 2
    assert str(traced).count("Mesh(grid=(") == str(traced).count("Mesh(grid=(116,)") == 1


def test_where_nothing_is_to_do_there_is_no_kernel():
    traced, made = _trace(_member("decode_attention", 48), _member("decode_attention", 84))
    assert made == [(None,), (None,)]
    assert "Mesh(" not in str(traced)


_SPEC = AttentionSpec(scale=0.5, window=24, softcap=None)


def _decode(**made):
    attention = kernel_attention.KernelDecode(works={24: "plan"}, num_ctas=48, **made)
    return lambda place: attention("q", "cache", "pages", "lens", _SPEC, place=place)


def _prefill(**made):
    attention = kernel_attention.KernelPrefill(tiles={24: "plan"}, num_ctas=48, **made)
    return lambda place: attention("q", "cache", "pages", _SPEC, place=place)


@pytest.mark.parametrize("make", [_decode, _prefill])
def test_attention_hands_its_kernel_to_who_runs_it_and_runs_it_itself_elsewhere(make):
    def attend(*operands, num_ctas, token, **form):
        return "attended", operands, form, num_ctas, token

    def prepare(*operands, **form):
        assert form.pop("merge_ctas") == 48
        return "kernel", operands, form

    attention = make(attend=attend, prepare=prepare)
    place = Place(run_kernel=lambda kernel: ("ran", kernel))
    ran, (kernel, operands, form) = attention(place)
    assert (ran, kernel) == ("ran", "kernel")
    assert form == {"scale": 0.5, "window": 24, "softcap": None}
    assert operands[-1] == "plan"
    for num_ctas, given in ((48, Place()), (5, Place(num_ctas=5))):
        assert attention(given) == ("attended", operands, form, num_ctas, None)
