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

from pallas_kernels.gemm import GemmTile
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


def _operands(num_tokens, depth, weight_rows, *, experts, dtype=jnp.bfloat16, tile_rows=128):
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
        ((4, 128, 136), [0, 2, 3], {}, {"num_ctas": 1}),
        ((70, 64, 160), [1], {}, {"num_ctas": 132, "gated": True}),
        ((9, 72, 48), [0, 3], {"dtype": jnp.float32}, {"num_ctas": 2, "gated": True}),
        (
            (130, 128, 264),
            [2],
            {"tile_rows": 256},
            {"tile": GemmTile(rows=256), "out_dtype": jnp.float32},
        ),
    ],
    ids=["an_empty_expert", "one_expert_in_two_tiles", "float32", "larger_tiles"],
)
def test_rows_get_the_product_with_their_expert_on_any_number_of_ctas(sizes, experts, kinds, more):
    operands = _operands(*sizes, experts=experts, **kinds)
    with kernel_runs.interpreting() as interpret:
        found = grouped_gemm(**operands, **more, interpret=interpret)
    meaning = {name: more[name] for name in ("gated", "out_dtype") if name in more}
    wanted = grouped_gemm_reference(**operands, **meaning)
    groups = operands["groups"]
    used = groups.num_tiles[0] * (found.shape[0] // groups.tile_expert.shape[0])
    assert not wanted[used:].any()
    kernel_runs.check_close(found[:used], wanted[:used], relative=_RELATIVE[str(found.dtype)])


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
_SERVED = pytest.mark.parametrize(
    ("sizes", "gated", "tile"),
    [
        ((2048, 4096, 2 * 14336, 8, 2), True, GemmTile()),
        ((2048, 14336, 4096, 8, 2), False, GemmTile(columns=256)),
        ((256, 2048, 2 * 768, 128, 8), True, GemmTile()),
    ],
    ids=["mixtral_up", "mixtral_down", "qwen3_30b_up"],
)


def _served(sizes, gated, tile):
    num_tokens, width, weight_rows, num_experts, active = sizes

    def run(x, w, experts):
        groups = plan_groups(experts, num_experts=num_experts)
        return grouped_gemm(permute(x, groups), w, groups, gated=gated, tile=tile, num_ctas=100)

    shapes = (
        jax.ShapeDtypeStruct((num_tokens, width), jnp.bfloat16),
        jax.ShapeDtypeStruct((num_experts, weight_rows, width), jnp.bfloat16),
        jax.ShapeDtypeStruct((num_tokens, active), jnp.int32),
    )
    return run, *shapes


@_SERVED
def test_served_sizes_lower_for_hopper(sizes, gated, tile):
    assert "mosaic_gpu_v2" in kernel_runs.lowered(*_served(sizes, gated, tile))


@_SERVED
def test_served_sizes_compile_without_spills_into_warpgroup_products(sizes, gated, tile):
    (kernel,) = deviceless.compiled(*_served(sizes, gated, tile))
    assert kernel.grid == (100, 1, 1)
    assert kernel.spill_bytes == 0
    assert kernel.registers == 168
    assert kernel.shared_bytes <= 232448
    assert "wgmma.mma_async" in kernel.ptx


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
        ({"num_ctas": 0}, "num_ctas=0 is not at least 1"),
    ],
)
def test_operands_that_do_not_fit_are_refused(change, message):
    groups = plan_groups(jnp.zeros((3, 2), jnp.int32), num_experts=2)
    good = {"x": jnp.zeros((256, 8)), "w": jnp.zeros((2, 16, 8)), "groups": groups}
    with pytest.raises(ValueError, match=message):
        grouped_gemm(**{**good, **change})


@pytest.mark.gpu
def test_grouped_products_on_a_gpu_are_their_references():
    for experts, gated in itertools.product([[1], [0, 1, 3]], [False, True]):
        operands = _operands(700, 4096, 2048, experts=experts)
        used = operands["groups"].num_tiles[0] * 128
        wanted = grouped_gemm_reference(**operands, gated=gated)
        for num_ctas in (1, 40, 132):
            found = grouped_gemm(**operands, gated=gated, num_ctas=num_ctas)
            kernel_runs.check_close(found[:used], wanted[:used], relative=5e-3)
