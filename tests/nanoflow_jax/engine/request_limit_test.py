"""Requests at once: as asked, as is usual, or as many as fill the dense batch and the memory."""

import pytest

from nanoflow_jax import config
from nanoflow_jax.engine import request_limit
from nanoflow_jax.engine.request_limit import RequestLimit


def _choose(cached_tokens=0, *, usual=None, dense_batch=2048, context_len=8192, **knobs):
    return request_limit.choose(
        config.BatchSection(**knobs),
        usual=usual,
        dense_batch=dense_batch,
        context_len=context_len,
        cached_tokens=lambda: cached_tokens,
    )


def test_a_gpu_with_memory_enough_keeps_the_papers_dense_batch_full():
    wanted = RequestLimit(max_requests=1024, reason="those of 512/512 keep the batch full")
    assert _choose(1024 * 768) == wanted
    assert _choose(10**9) == wanted


def test_memory_for_fewer_limits_them_in_whole_eights():
    found = _choose(100 * 768 + 5)
    assert found == RequestLimit(max_requests=96, reason="memory holds 100 of 768 tokens")
    assert _choose(100 * 768, context_len=256).max_requests == 296
    assert _choose(3 * 768).max_requests == 3
    assert _choose(0) == RequestLimit(max_requests=1, reason="memory holds 0 of 768 tokens")


@pytest.mark.parametrize("dense_batch", [1, 2, 16])
def test_there_are_never_more_than_tokens_in_the_dense_batch(dense_batch):
    assert 1 <= _choose(10**9, dense_batch=dense_batch).max_requests <= dense_batch


def test_what_is_asked_or_usual_needs_no_reason():
    assert _choose(max_requests=7, usual=64) == RequestLimit(max_requests=7)
    assert _choose(usual=64) == RequestLimit(max_requests=64)
    assert _choose(usual=64, dense_batch=32) == RequestLimit(max_requests=32)
