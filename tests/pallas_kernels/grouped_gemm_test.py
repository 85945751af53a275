"""Products of rows with their expert's weight against the reference, and the plan of the rows."""

import itertools

import deviceless
import jax
import jax.numpy as jnp
import kernel_runs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.gemm_role import GemmTile
from pallas_kernels.grouped_gemm import (
    Groups,
    combine,
    grouped_gemm,
    grouped_gemm_reference,
    max_row_tiles,
    permute,
    plan_groups,
)

_RELATIVE = {"bfloat16": 2e-3, "float32": 1e-5}
_plan = jax.jit(plan_groups, static_argnames=("num_experts", "tile_rows"))


@given(st.lists(st.permutations(range(5)), min_size=12, max_size=12), st.booleans())
def test_each_choice_has_a_row_in_a_tile_of_its_expert(choices, is_one_expert):
    experts = np.asarray(choices, np.int32)[:, :2]
    if is_one_expert:
        experts[:] = experts[0, 0]
    groups = Groups(*map(np.asarray, _plan(jnp.asarray(experts), num_experts=5, tile_rows=4)))
    assert len(np.unique(groups.places)) == 24
    for (token, choice), row in np.ndenumerate(groups.places):
        assert groups.sources[row] == token
        assert groups.tile_expert[row // 4] == experts[token, choice]
        assert row // 4 < groups.num_tiles[0]
    assert (groups.sources == 12).sum() == len(groups.sources) - 24
    assert groups.counts.tolist() == np.bincount(experts.ravel(), minlength=5).tolist()
    assert groups.num_tiles[0] == (-(-groups.counts // 4)).sum()
    assert len(groups.tile_expert) == max_row_tiles(24, 5, tile_rows=4)


def test_a_plan_worked_by_hand():
    groups = plan_groups(
        jnp.asarray([[2, 0], [2, 3], [2, 0]], jnp.int32), num_experts=4, tile_rows=2
    )
    assert groups.counts.tolist() == [2, 0, 3, 1]
    assert groups.places.tolist() == [[2, 0], [3, 6], [4, 1]]
    assert groups.tile_expert[:4].tolist() == [0, 2, 2, 3]
    assert groups.num_tiles.tolist() == [4]
    assert groups.sources[:8].tolist() == [0, 2, 0, 1, 2, 3, 1, 3]
    x = jnp.asarray([[1.0], [2.0], [3.0]])
    rows = permute(x, groups)
    assert rows[:8, 0].tolist() == [1, 3, 1, 2, 3, 0, 2, 0]
    shares = jnp.asarray([[0.5, 0.25], [1.0, 2.0], [0.0, 1.0]])
    assert combine(rows * 10, groups, shares).tolist() == [[7.5], [60.0], [30.0]]


def _operands(num_tokens, depth, weight_rows, *, experts, dtype=jnp.bfloat16, tile_rows=None):
    """Each token goes to two of the experts named, of four."""
    chosen = np.random.default_rng(num_tokens).choice(experts, (num_tokens, 2)).astype(np.int32)
    groups = plan_groups(jnp.asarray(chosen), num_experts=4, tile_rows=tile_rows)
    return {
        "x": permute(kernel_runs.normal(0, num_tokens, depth, dtype=dtype), groups),
        "w": kernel_runs.normal(1, 4, weight_rows, depth, dtype=dtype),
        "groups": groups,
    }


@kernel_runs.needs_interpreter
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("sizes", "experts", "kinds", "more"),
    [
        ((9, 72, 48), [0, 3], {"dtype": jnp.float32}, {"num_ctas": 2, "gated": True}),
        (
            (130, 128, 264),
            [2],
            {"tile_rows": 256},
            {"tile": GemmTile(rows=256), "out_dtype": jnp.float32},
        ),
    ],
    ids=["empty_experts_float32", "one_expert_in_two_larger_tiles"],
)
def test_rows_get_the_product_with_their_expert_on_any_number_of_ctas(sizes, experts, kinds, more):
    operands = _operands(*sizes, experts=experts, **kinds)
    with kernel_runs.interpreting() as interpret:
        found = grouped_gemm(**operands, **more, interpret=interpret)
    meaning = {name: more[name] for name in ("gated", "out_dtype") if name in more}
    _compare(found, grouped_gemm_reference(**operands, **meaning), operands["groups"])


def _compare(found, wanted, groups):
    used = groups.num_tiles[0] * (found.shape[0] // groups.tile_expert.shape[0])
    assert not wanted[used:].any()
    kernel_runs.check_close(found[:used], wanted[:used], relative=_RELATIVE[str(found.dtype)])


@kernel_runs.needs_interpreter
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("x_size", "w_size", "more"),
    [
        ((12,), (4, 96), {"gated": True, "num_ctas": 2}),
        ((), (4,), {"out_dtype": jnp.float32, "num_ctas": 1}),
    ],
    ids=["rows_and_channels", "tensor_and_experts"],
)
def test_float8_products_are_scaled_by_row_and_by_channel_of_the_expert(x_size, w_size, more):
    operands = _operands(12, 72, 96, experts=[0, 3], dtype=jnp.float8_e4m3fn)
    x_scale, w_scale = (
        jnp.abs(kernel_runs.normal(5, *size, dtype=jnp.float32)) for size in (x_size, w_size)
    )
    if x_size:
        x_scale = permute(x_scale, operands["groups"])
    operands |= {"x_scale": x_scale, "w_scale": w_scale}
    with kernel_runs.interpreting() as interpret:
        found = grouped_gemm(**operands, **more, interpret=interpret)
    del more["num_ctas"]
    _compare(found, grouped_gemm_reference(**operands, **more), operands["groups"])


@pytest.mark.parametrize(
    ("num_tokens", "tile_rows"), [(1, 64), (64, 64), (256, 64), (257, 128), (2048, 128)]
)
def test_tiles_are_as_small_as_the_rows_that_an_expert_of_mixtral_has(num_tokens, tile_rows):
    experts = jax.ShapeDtypeStruct((num_tokens, 2), jnp.int32)
    groups = jax.eval_shape(lambda experts: plan_groups(experts, num_experts=8), experts)
    assert groups.sources.shape[0] == groups.tile_expert.shape[0] * tile_rows


def test_the_reference_scales_each_row_and_each_channel_of_its_expert():
    groups = plan_groups(jnp.asarray([[1], [0]], jnp.int32), num_experts=2, tile_rows=1)
    given = {"x": jnp.asarray([[1.0], [2.0]]), "w": jnp.asarray([[[3.0], [5.0]], [[7.0], [9.0]]])}
    given["x"] = permute(given["x"], groups)
    found = grouped_gemm_reference(
        **given,
        groups=groups,
        x_scale=permute(jnp.asarray([10.0, 100.0]), groups),
        w_scale=jnp.asarray([[1.0, 2.0], [3.0, 4.0]]),
    )
    # Row 0 is token 1 with expert 0, row 1 token 0 with expert 1.
    assert found.tolist() == [[600.0, 2000.0], [210.0, 360.0]]


@kernel_runs.needs_interpreter
@pytest.mark.timeout(120)
def test_a_sparse_layer_is_each_token_through_its_experts():
    x = kernel_runs.normal(0, 5, 64)
    gate_up, down = kernel_runs.normal(1, 3, 64, 64) / 8, kernel_runs.normal(2, 3, 64, 32)
    experts = jnp.asarray([[0, 2], [2, 1], [2, 0], [0, 1], [2, 1]], jnp.int32)
    shares = jnp.abs(kernel_runs.normal(3, 5, 2, dtype=jnp.float32))
    groups = plan_groups(experts, num_experts=3)
    rows = permute(x, groups)
    with kernel_runs.interpreting() as interpret:
        hidden = grouped_gemm(
            rows, gate_up, groups, gated=True, token=jnp.full((3,), jnp.nan), interpret=interpret
        )
        found = combine(grouped_gemm(hidden, down, groups, interpret=interpret), groups, shares)

    def one(token, expert):
        both = jnp.einsum("D,FD->F", *(a.astype(jnp.float32) for a in (token, gate_up[expert])))
        inner = jax.nn.silu(both[:32]) * both[32:]
        return jnp.einsum("F,DF->D", inner, down[expert].astype(jnp.float32))

    mixed = [
        sum(shares[t, a] * one(x[t], experts[t, a]) for a in range(2)) for t in range(x.shape[0])
    ]
    kernel_runs.check_close(found, jnp.stack(mixed).astype(jnp.bfloat16), relative=6e-3)


# Tokens, width, weight rows of an expert, experts, experts of a token.
_SERVED = [
    ((2048, 4096, 2 * 14336, 8, 2), {"gated": True}),
    ((2048, 14336, 4096, 8, 2), {"tile": GemmTile(columns=256)}),
    ((64, 14336, 4096, 8, 2), {"tile": GemmTile(rows=64, columns=256)}),
    ((64, 4096, 2 * 14336, 8, 2), {"gated": True, "scaled": True}),
    ((256, 2048, 2 * 768, 128, 8), {"gated": True}),
]
_NAMES = ["mixtral_up", "mixtral_down", "few_rows_down", "few_rows_up_float8", "qwen3_30b_up"]


def _served(sizes, more):
    num_tokens, width, weight_rows, num_experts, active = sizes
    scaled = more.get("scaled", False)
    more = {name: value for name, value in more.items() if name != "scaled"}

    def run(x, w, experts, *scales):
        groups = plan_groups(experts, num_experts=num_experts)
        if scales:
            more["x_scale"], more["w_scale"] = permute(scales[0], groups), scales[1]
        return grouped_gemm(permute(x, groups), w, groups, **more, num_ctas=100)

    dtype = jnp.float8_e4m3fn if scaled else jnp.bfloat16
    shapes = [
        ((num_tokens, width), dtype),
        ((num_experts, weight_rows, width), dtype),
        ((num_tokens, active), jnp.int32),
    ]
    if scaled:
        shapes += [((num_tokens,), jnp.float32), ((num_experts, weight_rows), jnp.float32)]
    return run, *(jax.ShapeDtypeStruct(*one) for one in shapes)


@pytest.mark.parametrize(("sizes", "more"), _SERVED, ids=_NAMES)
def test_served_sizes_lower_for_hopper(sizes, more):
    assert "mosaic_gpu_v2" in kernel_runs.lowered(*_served(sizes, more))


def test_columns_that_fill_no_slice_lower_for_hopper():
    sizes = (70, 64, 72, 2, 1)
    assert "mosaic_gpu_v2" in kernel_runs.lowered(*_served(sizes, {}))


@pytest.mark.parametrize(("sizes", "more"), deviceless.cases(_SERVED), ids=_NAMES)
def test_served_sizes_compile_without_spills_into_warpgroup_products(sizes, more):
    (kernel,) = deviceless.compiled(*_served(sizes, more))
    assert kernel.grid == (100, 1, 1)
    assert kernel.spill_bytes == 0
    assert kernel.registers == 168
    assert kernel.shared_bytes <= 232448
    assert "wgmma.mma_async" in kernel.ptx


_GROUPS = plan_groups(jnp.zeros((3, 2), jnp.int32), num_experts=2, tile_rows=128)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"w": jnp.zeros((2, 16, 9))},
            r"x\(256, 8\) and w\(2, 16, 9\) are not \[R, D\] and \[E, F",
        ),
        ({"w": jnp.zeros((0, 16, 8))}, "must not be empty"),
        ({"x": jnp.zeros((256, 8), jnp.bfloat16)}, "x is bfloat16 and w float32; both must be"),
        ({"w": jnp.zeros((2, 12, 8))}, "12 weight rows of an expert are no multiple of 8"),
        ({"w": jnp.zeros((2, 24, 8)), "gated": True}, "24 weight rows .* no multiple of 16"),
        (
            {"x": jnp.zeros((128, 8))},
            r"x\(128, 8\) and 256 planned rows are not 256, .* 2 tiles of 128",
        ),
        (
            {"tile": GemmTile(rows=256)},
            "256 planned rows are not 512, which is 2 tiles of 256 rows",
        ),
        (
            {"x_scale": jnp.zeros((1,))},
            r"x_scale is float32\(1,\), not float32 of shape \(\) or \(256,\)",
        ),
        (
            {"w_scale": jnp.zeros((16,))},
            r"w_scale is float32\(16,\), not float32 of shape \(\) or \(2,\) or \(2, 16\)",
        ),
        ({"num_ctas": 0}, "num_ctas=0 is not at least 1"),
        ({"out_dtype": jnp.bool_}, "the dtype of a result is bool, not bfloat16 or float16 or"),
        ({"w": None}, "w is a NoneType, not an array"),
        (
            {"groups": _GROUPS._replace(num_tiles=jnp.zeros((), jnp.int32))},
            r"groups.sources\(256,\), tile_expert\(2,\) and num_tiles\(\) are not \[R\], \[C\] and",
        ),
        (
            {"groups": _GROUPS._replace(tile_expert=jnp.zeros(2))},
            "groups are .*'float32'.*, not int32; take them from plan_groups",
        ),
        ({"groups": _GROUPS._replace(sources=None)}, "groups.sources is a NoneType, not an array"),
    ],
)
def test_operands_that_do_not_fit_are_refused(change, message):
    good = {"x": jnp.zeros((256, 8)), "w": jnp.zeros((2, 16, 8)), "groups": _GROUPS}
    with pytest.raises(ValueError, match=message):
        grouped_gemm(**{**good, **change})


@pytest.mark.parametrize(
    ("experts", "more", "message"),
    [
        (jnp.zeros((3,), jnp.int32), {}, r"experts is int32\(3,\), not integers \[T, A\]"),
        (jnp.zeros((3, 2)), {}, r"experts is float32\(3, 2\), not integers \[T, A\]"),
        (jnp.zeros((3, 2), jnp.int32), {"num_experts": 0}, "num_experts=0 or tile_rows=None is"),
        (jnp.zeros((3, 2), jnp.int32), {"tile_rows": 0}, "num_experts=2 or tile_rows=0 is not"),
    ],
)
def test_what_is_no_choice_of_experts_is_refused(experts, more, message):
    with pytest.raises(ValueError, match=message):
        plan_groups(experts, **{"num_experts": 2, **more})


def test_a_batch_without_tokens_is_refused():
    groups = plan_groups(jnp.zeros((0, 2), jnp.int32), num_experts=2)
    x = permute(jnp.zeros((0, 8)), groups)
    with pytest.raises(ValueError, match=r"x\(0, 8\) and w\(2, 16, 8\) must not be empty"):
        grouped_gemm(x, jnp.zeros((2, 16, 8)), groups)


@pytest.mark.gpu
def test_grouped_products_on_a_gpu_are_their_references():
    for experts, gated in itertools.product([[1], [0, 1, 3]], [False, True]):
        operands = _operands(700, 4096, 2048, experts=experts)
        groups = operands["groups"]
        used = groups.num_tiles[0] * (groups.sources.size // groups.tile_expert.size)
        wanted = grouped_gemm_reference(**operands, gated=gated)
        for num_ctas in (1, 40, 132):
            found = grouped_gemm(**operands, gated=gated, num_ctas=num_ctas)
            kernel_runs.check_close(found[:used], wanted[:used], relative=5e-3)
