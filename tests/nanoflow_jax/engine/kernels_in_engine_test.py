"""Engines whose operations are kernels, interpreted, beside engines of the plain path."""

import contextlib
import dataclasses

import kernel_runs
import numpy as np
import pytest
from engine_runs import ask, run

from nanoflow_jax import compat, config
from nanoflow_jax.engine import build, model_source
from nanoflow_jax.models import architecture, kernel_groups
from pallas_kernels.side_by_side import side_by_side

_LAYERS = 2
# So many tokens that the log-probabilities of an output token are those of all tokens.
_VOCABULARY = 20
_MODEL = architecture.ModelConfig(
    family="llama",
    num_layers=_LAYERS,
    hidden_size=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    intermediate_size=192,
    vocab_size=_VOCABULARY,
    max_context_len=96,
    norm_eps=1e-5,
    rope=architecture.RopeConfig(),
    # With small random weights: enough that some tokens count for much more than others.
    query_scale=3.0,
    windows=(24, None),
)
_EXPERTS = architecture.MoeConfig(
    num_experts=4,
    num_active=2,
    intermediate_size=64,
    normalise=True,
    sparse_layers=(True, False),
)
# In steps of 24 tokens: two chunks, of which one goes on with its context, share the second; then
# a decode row and a chunk; contexts longer and shorter than the window.
_PROMPT_LENS = (37, 5, 11)
# Between two right orders of rounding to bfloat16 (2 ** -8) of a sum of a few layers, as a
# difference of log-probabilities. Their spread over the vocabulary is 0.2.
_BOUND = 0.01


def _engine(model, *interpreted, **knobs):
    section = config.EngineConfig.from_knobs(
        dtype="bfloat16",
        random_weights=True,
        max_requests=4,
        dense_batch=24,
        cache_page_size=16,
        cache_num_pages=24,
        **{f"kernel_{operation}": "interpret" for operation in interpreted},
        **{"buckets": "4:4:0,24:4:3", **knobs},
    )
    source = model_source.ModelSource(
        config=model, folder=None, eos_ids=frozenset(), stored_dtype="bfloat16"
    )
    return build.build_engine(section, source)


@contextlib.contextmanager
def _both(model, *interpreted, **knobs):
    """An engine of the plain path, and one that interprets some kernels."""
    try:
        yield _engine(model), _engine(model, *interpreted, **knobs)
    finally:
        compat.reset_interpreter()


def _ask(prompts, counts):
    return [
        ask(
            f"{i}",
            prompt,
            max_tokens=count,
            ignore_eos=True,
            logprobs=_VOCABULARY,
            prompt_logprobs=_VOCABULARY,
        )
        for i, (prompt, count) in enumerate(zip(prompts, counts, strict=True))
    ]


def _table(entries):
    """Log-probabilities of all tokens, a row for each position."""
    rows = np.full((len(entries), _VOCABULARY), np.nan)
    for row, entry in zip(rows, entries, strict=True):
        for token, value in entry.top:
            row[token] = value
    assert np.isfinite(rows).all()
    return rows


def _compare(engines, prompts, counts):
    """Steps in which the next token was too near a tie to be the same in both.

    Until there, tokens are the same; after it, both go on from the plain path's token.
    """
    plain, kernels = (run(engine, _ask(prompts, counts)) for engine in engines)
    again, num_ties = [], 0
    for prompt, count, one, other in zip(prompts, counts, plain, kernels, strict=True):
        assert (one.error, other.error) == (None, None)
        assert len(one.token_ids) == len(other.token_ids) == count
        same = [a == b for a, b in zip(one.token_ids, other.token_ids, strict=True)]
        length = same.index(False) if False in same else count
        seen = slice(0, length + 1)
        _check_near(_table(one.prompt_logprobs[1:]), _table(other.prompt_logprobs[1:]))
        _check_near(_table(one.logprobs[seen]), _table(other.logprobs[seen]))
        if length < count:
            num_ties += 1
            assert one.margins[length] <= 2 * _BOUND
            if length + 1 < count:
                again.append((prompt + one.token_ids[: length + 1], count - length - 1))
    return num_ties + (_compare(engines, *zip(*again, strict=True)) if again else 0)


def _check_near(one, other):
    assert np.abs(one - other).max(initial=0) <= _BOUND


@kernel_runs.needs_interpreter
@pytest.mark.timeout(240)
def test_kernels_on_two_halves_give_the_plain_paths_tokens():
    random = np.random.default_rng(0)
    prompts = [random.integers(0, _VOCABULARY, size=n).tolist() for n in _PROMPT_LENS]
    kernels = ("decode_attention", "prefill_attention")
    with _both(_MODEL, *kernels, plan="halves", plan_granule=12) as engines:
        num_ties = _compare(engines, prompts, [2] * len(prompts))
    assert num_ties <= 1


@kernel_runs.needs_interpreter
@pytest.mark.timeout(240)
def test_products_and_attention_in_one_kernel_give_the_plain_paths_tokens(monkeypatch):
    together = []
    monkeypatch.setattr(kernel_groups, "side_by_side", _noting(together))
    random = np.random.default_rng(0)
    prompts = [random.integers(0, _VOCABULARY, size=n).tolist() for n in _PROMPT_LENS]
    halves = {"plan": "halves", "plan_granule": 12, "executor": "fused"}
    with _both(_MODEL, "gemm", "decode_attention", **halves) as engines:
        assert together == [(1, 2)] * 2 * _LAYERS
        num_ties = _compare(engines, prompts, [2] * len(prompts))
    assert num_ties <= 1


def _noting(together):
    """Notes the shares of kernels that run as one."""

    def run(kernels, shares, *, num_ctas, **how):
        together.append((*shares, num_ctas - sum(shares)))
        return side_by_side(kernels, shares, num_ctas=num_ctas, **how)

    return run


def test_kernels_in_one_are_refused_where_there_is_none():
    with pytest.raises(ValueError, match=r"--executor=fused runs .* there is no GPU here"):
        _engine(_MODEL, plan="halves", plan_granule=12, executor="fused")


@kernel_runs.needs_interpreter
@pytest.mark.timeout(240)
def test_kernels_give_a_request_the_same_bits_alone_and_among_others():
    random = np.random.default_rng(0)
    prompts = [random.integers(0, _VOCABULARY, size=n).tolist() for n in _PROMPT_LENS]
    kernels = ("decode_attention", "prefill_attention")
    try:
        engine = _engine(_MODEL, *kernels, batch_invariant=True, buckets="24:4:3")
        together = run(engine, _ask(prompts, [2] * len(prompts)))
        # Its second chunk then lay behind another request's, and its token beside two others.
        assert run(engine, _ask(prompts[:1], [2])) == together[:1]
    finally:
        compat.reset_interpreter()


@kernel_runs.needs_interpreter
@pytest.mark.timeout(240)
def test_products_of_experts_by_a_kernel_give_the_plain_paths_tokens():
    # Only these are kernels: what is routed is then the same in both, where a rounding could
    # otherwise send a token to another expert.
    model = dataclasses.replace(_MODEL, moe=_EXPERTS)
    random = np.random.default_rng(0)
    prompts = [random.integers(0, _VOCABULARY, size=n).tolist() for n in _PROMPT_LENS]
    with _both(model, "grouped_gemm") as engines:
        num_ties = _compare(engines, prompts, [2] * len(prompts))
    assert num_ties <= 1
