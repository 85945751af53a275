"""The tokens of a request do not depend on what else the engine does, nor on how it is set up."""

import dataclasses
import functools
import math

import hypothesis
import numpy as np
import pytest
from engine_runs import ask, build_small, require_gpu, run
from golden import cases
from hypothesis import strategies as st
from same_tokens import MIN_MARGIN, check_same_tokens

from checkpoints import orbax_store
from checkpoints.folder import ModelFolder
from nanoflow_jax import request

_CASE = "llama3"
_VOCAB = 307
_COMMON = {"max_requests": 8, "penalty_requests": 8}
_PLAIN = {"dense_batch": 64, "buckets": "8:8:0,64:8:8", "cache_page_size": 16, **_COMMON}
_SETUPS = {
    "plain": _PLAIN,
    # 8 pages of 16 tokens, where six short requests already take 12.
    "few pages": {**_PLAIN, "cache_num_pages": 8},
    "small pages": {**_PLAIN, "cache_page_size": 5},
    "small dense batch": {**_PLAIN, "dense_batch": 11, "buckets": "11:0:1,11:8:8"},
    "two halves": {**_PLAIN, "plan": "halves", "plan_granule": 4},
    "one step at a time": {**_PLAIN, "cache_num_pages": 8, "async_scheduling": False},
}
_PREEMPTING = ("few pages", "one step at a time")


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """Engines by the name of their set-up; "orbax" is the plain one on a converted folder."""
    folder = cases.load(_CASE).path

    @functools.cache
    def get(name):
        if name != "orbax":
            return build_small(folder, **_SETUPS[name])
        converted = tmp_path_factory.mktemp("converted") / "model"
        orbax_store.convert(ModelFolder.open(folder), converted)
        return build_small(converted, **_PLAIN)

    return get


_TOKEN = st.integers(0, _VOCAB - 1)
_SAMPLING = st.one_of(
    st.just({}),
    st.fixed_dictionaries(
        {"temperature": st.floats(0.3, 2.0)},
        optional={
            "top_p": st.floats(0.3, 1.0),
            "top_k": st.integers(1, 60),
            "min_p": st.floats(0.0, 0.2),
        },
    ),
)
_PARAMS = st.builds(
    dict.__or__,
    _SAMPLING,
    st.fixed_dictionaries(
        {"seed": st.integers(0, 2**40), "max_tokens": st.integers(20, 28)},
        optional={
            "presence_penalty": st.floats(-1.0, 2.0),
            "frequency_penalty": st.floats(-1.0, 2.0),
            "repetition_penalty": st.floats(0.7, 1.6),
            "logit_bias": st.dictionaries(_TOKEN, st.floats(-5.0, 5.0), max_size=4),
            "min_tokens": st.integers(0, 12),
            "stop_token_ids": st.lists(_TOKEN, max_size=2),
            "ignore_eos": st.booleans(),
            "priority": st.integers(-1, 1),
        },
    ),
)
_WORKLOAD = st.lists(
    st.tuples(st.lists(_TOKEN, min_size=12, max_size=36), _PARAMS), min_size=6, max_size=8
)


def _requests(workload, **more):
    # With a stop string, which the engine itself does not look for, no length is certain.
    more = {"stop": "never said", **more}
    return [ask(str(i), prompt, **params, **more) for i, (prompt, params) in enumerate(workload)]


def _alone(engine, workload):
    """Each request by itself, with the distance of the top two logits at each token."""
    outputs = []
    for one in _requests(workload, logprobs=2):
        outputs += run(engine, [one])
    return outputs


def _margins(workload, reference):
    """Distances that rounding might bridge: those of the top two logits where the larger is taken.

    Drawn tokens win a race whose margins nobody sees; they are compared to the end.
    """
    return [
        [math.inf] * len(output.token_ids) if params.get("temperature") else output.margins
        for (_, params), output in zip(workload, reference, strict=True)
    ]


def _check_same(workload, found, reference):
    tokens = [output.token_ids for output in reference]
    margins = _margins(workload, reference)
    check_same_tokens([output.token_ids for output in found], tokens, margins)
    assert [o.finish_reason for o in found] == [o.finish_reason for o in reference]


def _teach_short_outputs(engine):
    """Sixteen requests end after one token though they might run long, so that the scheduler
    takes in more requests than its pages can hold to their end."""
    lesson = {"max_tokens": 100, "allowed_token_ids": (9,), "stop_token_ids": (9,)}
    outputs = run(engine, [ask(f"lesson {i}", [1], **lesson) for i in range(16)])
    assert all(output.finish_reason is request.FinishReason.STOP for output in outputs)


def _check_workload(engines, workload):
    reference = _alone(engines("plain"), workload)
    # Where rounding decides, either token is right: such an example proves nothing.
    hypothesis.assume(min(map(min, _margins(workload, reference))) >= MIN_MARGIN)
    for name in [*_SETUPS, "orbax"]:
        engine = engines(name)
        if name in _PREEMPTING:
            _teach_short_outputs(engine)
        _check_same(workload, run(engine, _requests(workload)), reference)


@hypothesis.given(workload=_WORKLOAD)
@hypothesis.settings(max_examples=4)
def _check_any_workload(engines, workload):
    _check_workload(engines, workload)


def test_tokens_do_not_depend_on_the_batch_the_cache_or_the_checkpoint(engines):
    _check_any_workload(engines)
    assert all(engines(name).num_preemptions > 0 for name in _PREEMPTING)


@pytest.mark.gpu
def test_tokens_on_a_gpu_do_not_depend_on_the_batch_the_cache_or_the_checkpoint(engines):
    require_gpu()
    _check_any_workload(engines)
    assert all(engines(name).num_preemptions > 0 for name in _PREEMPTING)


def test_long_requests_are_preempted_and_give_the_same_tokens(engines):
    random = np.random.default_rng(3)
    shared = {"max_tokens": 90, "ignore_eos": True}
    kinds = (
        {},
        {"temperature": 0.8, "top_p": 0.9, "seed": 5},
        {"temperature": 1.2, "seed": 6, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
        {"presence_penalty": 0.5, "frequency_penalty": 0.5},
        {"temperature": 1.0, "min_p": 0.05, "top_k": 40, "seed": 7, "logit_bias": {4: 3.0}},
    )
    workload = [
        (random.integers(0, _VOCAB, 7 + 3 * i).tolist(), {**shared, **kind})
        for i, kind in enumerate(kinds)
    ]
    reference = _alone(engines("plain"), workload)
    engine = engines("few pages")
    _teach_short_outputs(engine)
    before = engine.num_preemptions
    _check_same(workload, run(engine, _requests(workload, prompt_logprobs=3)), reference)
    assert engine.num_preemptions > before


def test_prompt_logprobs_come_once_though_a_request_is_preempted(engines):
    golden = cases.load(_CASE)
    workload = [(golden.prompts[i], {"max_tokens": 60, "ignore_eos": True}) for i in (6, 7, 8, 9)]
    reference = run(engines("plain"), _requests(workload, prompt_logprobs=5))
    engine = engines("few pages")
    _teach_short_outputs(engine)
    before = engine.num_preemptions
    found = run(engine, _requests(workload, prompt_logprobs=5))
    assert engine.num_preemptions > before
    for (prompt, _), output, wanted in zip(workload, found, reference, strict=True):
        assert [entry.token_id for entry in output.prompt_logprobs] == prompt[1:]
        for entry, other in zip(output.prompt_logprobs, wanted.prompt_logprobs, strict=True):
            assert dataclasses.replace(entry, logprob=0.0, top=()) == dataclasses.replace(
                other, logprob=0.0, top=()
            )
            assert entry.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_a_seed_draws_the_same_alone_and_among_others_and_another_seed_does_not(engines):
    engine = engines("plain")
    prompt = cases.load(_CASE).prompts[3]
    params = {"temperature": 1.0, "max_tokens": 20, "ignore_eos": True}
    seeds = [0, 1, 2, 0, 2**32, 2**63]
    alone = [run(engine, [ask("a", prompt, **params, seed=seed)])[0].token_ids for seed in seeds]
    together = run(
        engine, [ask(str(i), prompt, **params, seed=seed) for i, seed in enumerate(seeds)]
    )
    assert [output.token_ids for output in together] == alone
    assert alone[0] == alone[3]
    assert len({tuple(tokens) for tokens in alone}) == 5
