"""Every family through the real engine against what transformers answers."""

import numpy as np
import pytest
from engine_runs import ask, build_small, require_gpu, run
from golden import cases
from jaxtyping import Float
from same_tokens import check_same_tokens

from nanoflow_jax import request

_TOLERANCE = 1e-4
# 314 prompt tokens: one step of 320 takes them whole, steps of 24 or 13 cut most of them.
_WHOLE = {"dense_batch": 320, "buckets": "12:12:0,320:12:12"}
_SHAPES = {
    "whole": {"cache_page_size": 128, **_WHOLE},
    "chunked": {"cache_page_size": 5, "dense_batch": 24, "buckets": "24:12:12"},
    "narrow": {"cache_page_size": 8, "dense_batch": 13, "buckets": "12:12:0,13:12:2"},
    "Triton": {
        "cache_page_size": 5,
        "kernel_decode_attention": "interpret_triton",
        "kernel_prefill_attention": "interpret_triton",
        "dense_batch": 24,
        "buckets": "24:12:12",
    },
}
_SHAPES |= {
    "2 devices": {"tensor_parallel": 2, **_SHAPES["chunked"]},
    "4 devices": {"tensor_parallel": 4, **_SHAPES["chunked"]},
    "4 devices with whole experts": {
        "tensor_parallel": 4,
        "expert_parallel": True,
        **_SHAPES["narrow"],
    },
}
# Every case chunked and, those of few odds as a slow test, whole; the narrow shape where windows or
# key groups are odd.
_ODD = ("llama3", "gemma2", "qwen2_window", "qwen3_moe")
_PAIRS = [(case, "chunked") for case in cases.CASES]
_PAIRS += [
    pytest.param(case, "whole", marks=() if case in _ODD else pytest.mark.slow)
    for case in cases.CASES
]
_PAIRS += [(case, "narrow") for case in ("llama3", "mistral", "gemma2") if case in cases.CASES]
# Kernels for GPUs before Hopper: with groups of queries, and with windows and a soft-cap.
_PAIRS += [(case, "Triton") for case in ("llama3", "gemma2") if case in cases.CASES]
# Biases, windows, tied and untied embeddings, query norms; kv heads kept twice; experts.
_PAIRS += [(case, "2 devices") for case in ("qwen2", "qwen3_moe")]
_PAIRS += [(case, "4 devices") for case in ("llama_bias", "mistral")]
_PAIRS += [("mixtral", "4 devices with whole experts")]


def _log_softmax(logits: Float[np.ndarray, "T V"]) -> Float[np.ndarray, "T V"]:
    wide = logits.astype(np.float64)
    wide = wide - wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def _check_position(found: request.TokenLogprobs, logits: np.ndarray, wanted: np.ndarray) -> None:
    assert found.logprob == pytest.approx(wanted[found.token_id], abs=_TOLERANCE)
    higher = np.count_nonzero(logits > logits[found.token_id] + _TOLERANCE)
    at_least = np.count_nonzero(logits >= logits[found.token_id] - _TOLERANCE)
    assert higher < found.rank <= at_least
    ids = [token for token, _ in found.top]
    assert len(set(ids)) == request.MAX_LOGPROBS
    np.testing.assert_allclose(
        [value for _, value in found.top], wanted[ids], rtol=0, atol=_TOLERANCE
    )
    largest = np.sort(wanted)[::-1][: request.MAX_LOGPROBS]
    np.testing.assert_allclose(wanted[ids], largest, rtol=0, atol=_TOLERANCE)


def _check_case(case: str, shape: str) -> None:
    golden = cases.load(case)
    served = build_small(golden.path, max_requests=12, **_SHAPES[shape])
    outputs = run(
        served,
        [
            ask(str(i), prompt, max_tokens=48, ignore_eos=True, prompt_logprobs=20)
            for i, prompt in enumerate(golden.prompts)
        ],
    )
    tokens = [output.token_ids for output in outputs]
    assert check_same_tokens(tokens, golden.tokens.tolist(), golden.margins.tolist()) == 0
    # The last position of a prompt answers with the first generated token.
    picked = sorted(golden.logits)
    firsts = run(
        served,
        [
            ask(f"first {i}", golden.prompts[i], max_tokens=1, ignore_eos=True, logprobs=20)
            for i in picked
        ],
    )
    for i, first in zip(picked, firsts, strict=True):
        prompt, logits = golden.prompts[i], golden.logits[i]
        found = outputs[i].prompt_logprobs + first.logprobs
        assert [entry.token_id for entry in found] == [*prompt[1:], golden.tokens[i][0]]
        wanted = _log_softmax(logits)
        for place, entry in enumerate(found):
            _check_position(entry, logits[place], wanted[place])
    served.close()


@pytest.mark.parametrize(("case", "shape"), _PAIRS)
def test_engine_answers_as_transformers_does(case, shape):
    _check_case(case, shape)


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "shape"), _PAIRS)
def test_engine_on_a_gpu_answers_as_transformers_does(case, shape):
    require_gpu()
    _check_case(case, shape)
