"""Shapes of served operations: that they are the models', and what they cost."""

import numpy as np
import pytest

from nanoflow_jax.models import huggingface, presets
from pallas_kernels import problem_shapes
from pallas_kernels.problem_shapes import Decode, GroupedProduct, Prefill, Product


@pytest.mark.parametrize(
    ("preset", "layer"),
    [
        ("llama-3-8b", problem_shapes.LLAMA_3_8B),
        ("llama-3-70b", problem_shapes.LLAMA_3_70B),
        ("qwen3-32b", problem_shapes.QWEN3_32B),
        ("mixtral-8x7b", problem_shapes.MIXTRAL_8X7B),
    ],
)
def test_layers_are_those_of_the_presets(preset, layer):
    model = huggingface.read_config(presets.load(preset))
    experts = (0, 0) if model.moe is None else (model.moe.num_experts, model.moe.num_active)
    inner = model.intermediate_size if model.moe is None else model.moe.intermediate_size
    assert layer == problem_shapes.Layer(
        hidden_size=model.hidden_size,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        intermediate_size=inner,
        num_experts=experts[0],
        num_active=experts[1],
    )


def test_a_share_has_whole_rows_and_a_part_of_heads_and_width():
    share = problem_shapes.LAYERS["llama-3-70b-tp8"]
    assert (share.hidden_size, share.num_heads, share.num_kv_heads) == (8192, 8, 1)
    assert (share.intermediate_size, share.head_dim, share.num_shares) == (3584, 128, 8)


def test_shares_that_are_not_equal_are_refused():
    message = r"heads and width \(32, 8, 14336\) are no multiples of 3 shares"
    with pytest.raises(ValueError, match=message):
        problem_shapes.LLAMA_3_8B.share(3)


def test_products_of_a_layer_worked_by_hand():
    found = problem_shapes.products(problem_shapes.LLAMA_3_8B, 512)
    assert found == {
        "kqv": Product(num_tokens=512, depth=4096, num_columns=6144),
        "o": Product(num_tokens=512, depth=4096, num_columns=4096, residual=True),
        "gate_up": Product(num_tokens=512, depth=4096, num_columns=14336, gated=True),
        "down": Product(num_tokens=512, depth=14336, num_columns=4096, residual=True),
    }


def test_experts_have_grouped_products_and_a_share_adds_no_residual():
    experts = problem_shapes.products(problem_shapes.MIXTRAL_8X7B, 8)
    assert isinstance(experts["gate_up"], GroupedProduct)
    assert not problem_shapes.products(problem_shapes.LAYERS["qwen3-32b-tp4"], 8)["o"].residual


@pytest.mark.parametrize(
    ("shape", "flops", "num_bytes"),
    [
        # x 2 x 3, w 5 x 3, result 2 x 5.
        (Product(num_tokens=2, depth=3, num_columns=5), 60, 2 * (6 + 15 + 10)),
        (
            Product(num_tokens=2, depth=3, num_columns=5, gated=True, residual=True),
            120,
            2 * (6 + 30 + 20),
        ),
        # Two experts for each of two tokens: four rows.
        (
            GroupedProduct(num_tokens=2, depth=3, num_columns=5, num_experts=4, num_active=2),
            120,
            2 * (12 + 60 + 20),
        ),
        # 6 tokens seen by 4 heads of 8.
        (
            Decode(num_requests=2, context_len=3, num_heads=4, num_kv_heads=1, head_dim=8),
            4 * 4 * 8 * 6,
            2 * 8 * (2 * 6 + 2 * 2 * 4),
        ),
        # Queries see 6, 7 and 8 tokens.
        (
            Prefill(
                num_chunks=1, chunk_len=3, prefix_len=5, num_heads=4, num_kv_heads=2, head_dim=8
            ),
            4 * 4 * 8 * 21,
            2 * 8 * (2 * 2 * 8 + 2 * 4 * 3),
        ),
    ],
    ids=["product", "gated", "grouped", "decode", "prefill"],
)
def test_operations_and_bytes_worked_by_hand(shape, flops, num_bytes):
    assert (shape.flops, shape.num_bytes) == (flops, num_bytes)


def test_a_pair_costs_what_both_cost():
    pair = next(p.shape for p in problem_shapes.problems() if p.shape.KERNEL == "fused")
    assert pair.flops == pair.product.flops + pair.decode.flops
    assert pair.num_bytes == pair.product.num_bytes + pair.decode.num_bytes


def test_ragged_contexts_are_always_the_same_and_have_the_mean():
    ragged = problem_shapes.decode(problem_shapes.TINY, 64, 100, ragged=True)
    lens = ragged.context_lens()
    assert np.array_equal(lens, ragged.context_lens())
    assert (lens.min(), lens.max(), lens.mean()) == (1, 199, 100)
    assert (np.diff(lens) < 0).any()


def test_every_problem_has_a_name_of_its_own_and_every_kernel_comes_early():
    found = problem_shapes.problems()
    assert len({problem.name for problem in found}) == len(found) == 110
    early = {problem.shape.KERNEL for problem in found[:17]}
    assert early == set(problem_shapes.KERNELS)
    assert {problem.layer for problem in found[:17]} == set(problem_shapes.LAYERS)


def test_tiny_problems_are_one_of_each_kernel():
    found = [problem.shape.KERNEL for problem in problem_shapes.tiny_problems()]
    assert sorted(found) == sorted(problem_shapes.KERNELS)
