"""Tokens that any right run draws, and those that rounding may decide."""

import numpy as np
import pytest

from nanoflow_jax.bench import ablation_compare
from nanoflow_jax.bench.ablation_device import Judged

_LIMIT = ablation_compare.Rounding(most_error=0.1, tie=0.2)


def _judged(tokens, best, margins):
    return Judged(
        tokens=np.asarray(tokens, np.int32),
        best=np.asarray(best, np.float32),
        margins=np.asarray(margins, np.float32),
    )


# The mean best logit is 2: what is nearer than 0.4 is a tie.
_REFERENCE = [_judged([1, 2], [1.0, 3.0], [0.5, 0.1]), _judged([3], [2.0], [1.0])]


def _compare(first, last, best=2.0):
    found = [_judged(first, [1.0, 3.0], [0.5, 0.1]), _judged([last], [best], [1.0])]
    return ablation_compare.compare(found, _REFERENCE, _LIMIT)


def test_equal_tokens_are_right():
    found = _compare([1, 2], 3)
    assert (found["tokens"], found["ties"], found["wrong"], found["error"]) == (3, 1, 0, 0.0)


def test_a_tie_may_be_drawn_either_way_and_changes_no_hash():
    other = _compare([1, 9], 3)
    assert other["wrong"] == 0
    assert other["tokens_sha256"] == _compare([1, 2], 3)["tokens_sha256"]


def test_another_token_is_wrong_and_changes_the_hash():
    other = _compare([1, 2], 9)
    assert other["wrong"] == 1
    assert other["tokens_sha256"] != _compare([1, 2], 3)["tokens_sha256"]


def test_the_error_is_the_worst_of_the_best_logits_as_a_share_of_their_mean():
    found = _compare([1, 2], 3, best=2.5)
    assert (found["error"], found["most_error"]) == (0.25, 0.1)


@pytest.mark.parametrize("best", [np.nan, np.inf])
def test_a_token_of_logits_that_are_no_numbers_is_wrong(best):
    found = _compare([1, 2], 3, best=best)
    assert (found["wrong"], found["error"]) == (1, 0.0)
    broken = [_judged([1], [best], [np.nan])]
    itself = ablation_compare.compare(broken, broken, _LIMIT)
    assert (itself["wrong"], itself["error"]) == (1, 0.0)


def test_steps_without_samples_compare_to_nothing():
    nothing = [_judged([], [], [])]
    found = ablation_compare.compare(nothing, nothing, _LIMIT)
    assert (found["tokens"], found["error"]) == (0, 0.0)


def test_every_token_counts_in_float32():
    wide = ablation_compare.rounding("float32", num_layers=32)
    assert wide.tie == 0.0
    assert wide.most_error == pytest.approx(8 * 2.0**-17)


def test_bfloat16_rounds_twice_a_layer():
    narrow = ablation_compare.rounding("bfloat16", num_layers=32)
    assert (narrow.most_error, narrow.tie) == (1 / 32, 1 / 16)


def test_hashes_tell_tokens_apart():
    assert ablation_compare.hash_of([1, 2]) == ablation_compare.hash_of(np.array([1, 2], np.int64))
    assert ablation_compare.hash_of([1, 2]) != ablation_compare.hash_of([2, 1])
