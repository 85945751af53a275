"""With --batch_invariant the last bits of a request do not depend on its batch; without they do."""

import dataclasses
import functools
import re

import numpy as np
import pytest
import random_folder
from engine_runs import ask, build_small, run
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow_jax import request
from nanoflow_jax.engine import invariance
from nanoflow_jax.nanobatch import builders
from nanoflow_jax.nanobatch.operations import LayerShape
from nanoflow_jax.scheduler.buckets import Bucket, parse_buckets

_VOCAB = 101
_SHAPE = {"max_requests": 6, "dense_batch": 24, "cache_page_size": 8}
# 12 pages of 8 tokens, where two long requests take 16.
_FEW_PAGES = {**_SHAPE, "cache_num_pages": 12}
_EXPERTS = {
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
}
_WINDOWS = {"architectures": ["MistralForCausalLM"], "sliding_window": 11}
_FOLDERS = {"dense": {}, "sparse": _EXPERTS, "windows": _WINDOWS}
_SETUPS = {
    "dense float32": ("dense", _FEW_PAGES),
    "dense bfloat16": ("dense", {**_FEW_PAGES, "dtype": "bfloat16"}),
    "sparse float32": ("sparse", _FEW_PAGES),
    "sparse bfloat16": ("sparse", {**_FEW_PAGES, "dtype": "bfloat16"}),
    "windows bfloat16": ("windows", {**_FEW_PAGES, "dtype": "bfloat16"}),
    "two halves": (
        "dense",
        {**_FEW_PAGES, "plan": "halves", "plan_granule": 4, "dtype": "bfloat16"},
    ),
    "four devices": ("dense", {**_FEW_PAGES, "tensor_parallel": 4}),
    "experts on four devices": (
        "sparse",
        {**_FEW_PAGES, "tensor_parallel": 4, "expert_parallel": True, "dtype": "bfloat16"},
    ),
}
_KINDS = (
    {},
    {"logprobs": 5, "prompt_logprobs": 3},
    {"temperature": 0.9, "top_k": 20},
    {"temperature": 1.1, "top_p": 0.8, "presence_penalty": 0.5, "logprobs": 5},
    {"temperature": 1.0},
    {"repetition_penalty": 1.3, "logprobs": 1, "logit_bias": {3: 2.0}},
)
_MIXED = {"logprobs": 5, "prompt_logprobs": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    @functools.cache
    def get(name):
        path = tmp_path_factory.mktemp("models") / name
        return random_folder.write(path, seed=1, **_FOLDERS[name])

    return get


def _requests(count):
    """Requests of all kinds; with a stop string, which is never said, no length is certain."""
    random = np.random.default_rng(0)
    return [
        ask(
            str(i),
            random.integers(0, _VOCAB, int(random.integers(1, 50))).tolist(),
            max_tokens=int(random.integers(5, 35)),
            ignore_eos=True,
            seed=i,
            stop="never said",
            **_KINDS[i % len(_KINDS)],
        )
        for i in range(count)
    ]


_COUNT = 12
_SCHEDULE = st.lists(
    st.tuples(st.integers(0, _COUNT - 1), st.integers(0, 25)),
    min_size=2,
    max_size=_COUNT,
    unique_by=lambda pair: pair[0],
)


def _teach_short_outputs(engine):
    """Sixteen requests end after one token though they might run long, so that the scheduler
    takes in more requests than its pages can hold to their end."""
    lesson = {"max_tokens": 60, "allowed_token_ids": (9,), "stop_token_ids": (9,)}
    outputs = run(engine, [ask(f"lesson {i}", [1], **lesson) for i in range(16)])
    assert all(output.finish_reason is request.FinishReason.STOP for output in outputs)


@pytest.mark.parametrize("setup", _SETUPS)
def test_a_request_has_the_same_bits_alone_and_in_any_batch(folder, setup):
    model, knobs = _SETUPS[setup]
    engine = build_small(folder(model), batch_invariant=True, **knobs)
    requests = _requests(_COUNT)
    alone = [run(engine, [one])[0] for one in requests]
    assert engine.num_preemptions == 0

    @settings(max_examples=4)
    @given(schedule=_SCHEDULE)
    def check(schedule):
        _teach_short_outputs(engine)
        chosen = sorted(schedule, key=lambda pair: pair[1])
        found = run(engine, [requests[i] for i, _ in chosen], arrivals=[step for _, step in chosen])
        assert found == [alone[i] for i, _ in chosen]

    check()
    everybody = [(i, 0) for i in reversed(range(_COUNT))]
    _teach_short_outputs(engine)
    assert run(engine, [requests[i] for i, _ in everybody]) == alone[::-1]
    assert engine.num_preemptions > 0
    engine.close()


def _bits(outputs):
    return [[entry.logprob for entry in output.logprobs] for output in outputs]


def test_without_the_setting_logprobs_depend_on_the_batch(folder):
    engine = build_small(folder("dense"), **_SHAPE)
    requests = [dataclasses.replace(one, request_id=f"{i}") for i, one in enumerate(_same(4))]
    alone = [run(engine, [one])[0] for one in requests]
    together = run(engine, requests)
    assert [o.token_ids for o in together] == [o.token_ids for o in alone]
    assert _bits(together) != _bits(alone)
    engine.close()


def test_what_a_preempted_request_had_generated_must_not_come_back_in_chunks(folder):
    engine = build_small(folder("dense"), batch_invariant=True, **_FEW_PAGES)
    planner = engine._scheduler
    planner._limits = dataclasses.replace(planner._limits, fixed_ways=False)
    requests = [
        dataclasses.replace(one, params=dataclasses.replace(one.params, logprobs=1))
        for one in _requests(_COUNT)
    ]
    alone = [run(engine, [one])[0] for one in requests]
    _teach_short_outputs(engine)
    assert _bits(run(engine, requests)) != _bits(alone)
    assert engine.num_preemptions > 0
    engine.close()


def _same(count):
    return [ask("", [7, 3, 9], max_tokens=8, ignore_eos=True, **_MIXED) for _ in range(count)]


def test_several_buckets_are_refused():
    message = (
        "--batch_invariant runs every step in one bucket, and --buckets=6:6:0,24:6:4 has 2: "
        "products of other numbers of rows have other bits; leave 24:6:4"
    )
    asked = "6:6:0,24:6:4"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        invariance.one_bucket(parse_buckets(asked), asked=asked)


def test_the_largest_bucket_is_left_where_nobody_chose_any():
    few, full = parse_buckets("6:6:0,24:6:4")
    assert invariance.one_bucket([few, full], asked="") == (full,)
    assert invariance.one_bucket([full], asked="24:6:4") == (full,)


_BUCKET = Bucket(tokens=24, decode_rows=6, prefill_rows=4)


def _halves(first, granule=4):
    device = builders.Device(granule=granule)
    return builders.halves(LayerShape(), num_tokens=24, first=first, device=device)


def test_plans_of_unequal_parts_are_refused():
    message = (
        "--batch_invariant: plan 'halves' cuts decode_attention into parts of 8 and 16 tokens, and "
        "a token's bits would depend on its part; split alike"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        invariance.check_plans({_BUCKET: _halves(8)})
    invariance.check_plans({_BUCKET: _halves(12)})


def test_parts_with_unequal_decode_rows_are_refused():
    message = (
        "--batch_invariant: plan 'halves' deals 5 decode rows into parts of 2 and 3, and a token's "
        "bits would depend on its part; split equally, and make --max_requests a multiple of its "
        "parts"
    )
    bucket = dataclasses.replace(_BUCKET, decode_rows=5)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        invariance.check_plans({bucket: _halves(12)})


def test_an_engine_refuses_what_the_setting_cannot_hold_in(folder):
    for knobs, message in (
        ({"buckets": "6:6:0,24:6:4"}, "--batch_invariant runs every step in one bucket"),
        ({"plan": "halves", "plan_granule": 16, "dense_batch": 40}, "parts of 16 and 24 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            build_small(folder("dense"), batch_invariant=True, **{**_SHAPE, **knobs})
