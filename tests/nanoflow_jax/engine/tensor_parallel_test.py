"""Engines whose model lies on several devices."""

import functools
import re

import jax
import numpy as np
import pytest
import random_folder
from engine_runs import ask, build_small, run
from same_tokens import check_same_tokens

from nanoflow_jax.nanobatch import builders, plan_file
from nanoflow_jax.nanobatch.operations import LayerShape

_SHAPE = {"max_requests": 6, "dense_batch": 20, "buckets": "20:6:6", "cache_page_size": 8}
_EXPERTS = {
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return random_folder.write(tmp_path_factory.mktemp("models") / "dense", seed=1)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    return random_folder.write(tmp_path_factory.mktemp("models") / "sparse", seed=2, **_EXPERTS)


def _answers(folder, **knobs):
    """Greedy, drawn and penalised requests together, with logprobs of prompts and outputs."""
    random = np.random.default_rng(0)
    kinds = (
        {},
        {"temperature": 0.9, "top_k": 20},
        {"temperature": 1.1, "top_p": 0.8, "presence_penalty": 0.5},
        {
            "temperature": 0.7,
            "min_p": 0.1,
            "logit_bias": {3: 2.0},
            "allowed_token_ids": tuple(range(60)),
        },
        {"repetition_penalty": 1.3},
        {"prompt_logprobs": 4},
    )
    requests = [
        ask(
            str(i),
            random.integers(0, 101, 5 + 7 * i).tolist(),
            max_tokens=16,
            ignore_eos=True,
            seed=i,
            logprobs=4,
            **kind,
        )
        for i, kind in enumerate(kinds)
    ]
    served = build_small(folder, **{**_SHAPE, **knobs})
    try:
        return run(served, requests)
    finally:
        served.close()


@functools.cache
def _of_one(folder):
    return _answers(folder)


def _check_same(found, folder):
    """That answers are those of one device."""
    wanted = _of_one(folder)
    check_same_tokens(
        [output.token_ids for output in found],
        [output.token_ids for output in wanted],
        [output.margins for output in wanted],
    )
    for one, other in zip(found, wanted, strict=True):
        entries = one.logprobs + one.prompt_logprobs
        others = other.logprobs + other.prompt_logprobs
        assert [entry.rank for entry in entries] == [entry.rank for entry in others]
        assert [entry.logprob for entry in entries] == pytest.approx(
            [entry.logprob for entry in others], abs=1e-4
        )


def test_eight_devices_give_the_tokens_and_logprobs_of_one(dense):
    _check_same(_answers(dense, tensor_parallel=8), dense)


def test_experts_on_eight_devices_whole_or_shared_give_the_tokens_of_one(sparse):
    for whole in (True, False):
        _check_same(_answers(sparse, tensor_parallel=8, expert_parallel=whole), sparse)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_sums_of_one_half_beside_products_of_the_other_give_the_tokens_of_one(kind, request):
    folder = request.getfixturevalue(kind)
    knobs = {"tensor_parallel": 4, "plan": "halves", "plan_granule": 5}
    _check_same(_answers(folder, **knobs), folder)


@pytest.mark.parametrize(
    ("kind", "num_devices", "columns"),
    [("dense", 2, {"o"}), ("dense", 4, {"o", "down"}), ("sparse", 4, {"o"})],
)
def test_gathers_around_products_give_the_tokens_of_one(
    kind, num_devices, columns, request, tmp_path
):
    folder = request.getfixturevalue(kind)
    shape = LayerShape(is_sparse=kind == "sparse", num_devices=num_devices)
    path = tmp_path / "plans.json"
    path.write_text(plan_file.to_json([builders.one(shape, num_tokens=20, by_columns=columns)]))
    # The smaller bucket has no plan in the file and multiplies with the same weights.
    knobs = {**_SHAPE, "buckets": "6:6:0,20:6:6", "plan": str(path)}
    _check_same(_answers(folder, **knobs, tensor_parallel=num_devices), folder)


def test_weights_that_a_plan_gathers_around_lie_by_columns_and_are_held_once(dense, tmp_path):
    path = tmp_path / "plans.json"
    shape = LayerShape(num_devices=4)
    path.write_text(plan_file.to_json([builders.one(shape, num_tokens=20, by_columns={"o"})]))
    served = build_small(dense, **_SHAPE, tensor_parallel=4, plan=str(path))
    shapes = {array.shape: array.sharding.shard_shape(array.shape) for array in _weights(served)}
    served.close()
    assert shapes[32, 8, 2, 2] == (8, 8, 2, 2)  # o [D, K, G, H], by D
    assert shapes[32, 48] == (32, 12)  # down [D, F], by F
    assert sum(len(found) == 4 for found in map(tuple, shapes)) == 2  # the other one is KQV


def _weights(served):
    return served._runner._weights


def test_each_device_holds_its_share_of_weights_and_pages(dense):
    served = build_small(dense, **_SHAPE, tensor_parallel=4)
    weights, caches = _weights(served), served._runner._caches
    whole = sum(array.nbytes for array in weights)
    each = [0] * 4
    for array in weights:
        for shard in array.addressable_shards:
            each[shard.device.id] += shard.data.nbytes
    assert len(set(each)) == 1
    assert each[0] < 0.3 * whole  # norms are everywhere
    for array in jax.tree.leaves(caches):
        assert {shard.data.nbytes for shard in array.addressable_shards} == {array.nbytes // 4}
    served.close()


def test_more_devices_than_there_are_is_refused(dense):
    message = (
        "--tensor_parallel=4 and --data_parallel=3 need 12 devices and there are 8; on a CPU "
        "XLA_FLAGS=--xla_force_host_platform_device_count=12 makes as many"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build_small(dense, **_SHAPE, tensor_parallel=4, data_parallel=3)


def test_a_number_of_devices_that_does_not_fit_is_refused_before_a_weight_is_read(dense):
    message = "--tensor_parallel=3: 8 kv heads of 2 queries each cannot be shared out evenly"
    with pytest.raises(ValueError, match=re.escape(message)):
        build_small(dense, **_SHAPE, tensor_parallel=3)
