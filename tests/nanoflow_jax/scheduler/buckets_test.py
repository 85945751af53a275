import re

import hypothesis
import pytest
from hypothesis import strategies as st

from nanoflow_jax.scheduler import buckets
from nanoflow_jax.scheduler.buckets import Bucket


def _bucket(tokens, decode_rows, prefill_rows):
    return Bucket(tokens=tokens, decode_rows=decode_rows, prefill_rows=prefill_rows)


def _raises(message):
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


def test_a_list_is_read_sorted_and_without_repeats():
    found = buckets.parse_buckets("64:8:4, 8:8:0 ,64:8:4")
    assert found == (_bucket(8, 8, 0), _bucket(64, 8, 4))
    assert [str(b) for b in found] == ["8:8:0", "64:8:4"]


@pytest.mark.parametrize("entry", ["", "8", "8:8", "8:8:0:1", "a:8:0", "8:-8:0", "8: 8:0", "²:1:1"])
def test_an_entry_of_another_form_is_refused(entry):
    with _raises(f"--buckets entry {entry!r} is not TOKENS:DECODE_ROWS:PREFILL_ROWS"):
        buckets.parse_buckets(f"8:8:0,{entry}")


@pytest.mark.parametrize("entry", ["0:0:1", "4:5:1"])
def test_a_bucket_of_impossible_size_is_refused(entry):
    with _raises(
        f"bucket {entry} must have at least one token and no more decode rows than tokens"
    ):
        buckets.parse_buckets(entry)


def test_a_pure_decode_bucket_has_a_row_for_each_token():
    with _raises("bucket 8:4:0 without prefill rows needs as many decode rows"):
        buckets.parse_buckets("8:4:0")


@hypothesis.given(max_requests=st.integers(1, 600), extra=st.integers(0, 5000))
def test_default_buckets_are_few_and_hold_every_step(max_requests, extra):
    dense_batch = max_requests + extra
    found = buckets.default_buckets(max_requests=max_requests, dense_batch=dense_batch)
    checked = buckets.check_buckets(found, max_requests=max_requests, dense_batch=dense_batch)
    assert checked == tuple(sorted(found))
    # With two row counts of three samplers each and two helpers, at most 17 programs.
    assert len(found) <= 9
    decode = [b for b in found if b.prefill_rows == 0]
    assert {1, max_requests} <= {b.tokens for b in decode}
    largest = found[-1]
    assert (largest.tokens, largest.decode_rows, largest.prefill_rows) == (
        dense_batch,
        max_requests,
        min(max_requests, 256),
    )


def test_default_buckets_of_many_requests_pad_few_rows_to_no_hundreds():
    found = buckets.default_buckets(max_requests=1024, dense_batch=2048)
    assert [str(b) for b in found if not b.prefill_rows] == [
        *("1:1:0", "8:8:0", "64:64:0", "256:256:0", "512:512:0", "1024:1024:0")
    ]
    assert str(found[-1]) == "2048:1024:256"


def test_default_buckets_of_the_cpu_worked_by_hand():
    found = buckets.default_buckets(max_requests=64, dense_batch=512)
    assert [str(b) for b in found] == [
        "1:1:0",
        "8:8:0",
        "16:16:0",
        "32:32:0",
        "64:64:0",
        "128:8:8",
        "256:64:64",
        "512:64:64",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "8:8:0,32:8:8",
            "the largest bucket 32:8:8 holds less than --dense_batch=64 tokens or "
            "--max_requests=8 decode rows; add 64:8:8",
        ),
        (
            "8:8:0,64:4:8",
            "the largest bucket 64:4:8 holds less than --dense_batch=64 tokens or "
            "--max_requests=8 decode rows; add 64:8:8",
        ),
        (
            "32:8:9,64:8:8",
            "the largest bucket 64:8:8 has fewer prefill rows than another (9)",
        ),
        (
            "64:64:0",
            "the largest bucket 64:64:0 has no prefill row; no prompt could run",
        ),
        (
            "8:8:0,65:8:8",
            "bucket 65:8:8 has more than --dense_batch=64 tokens, which no step fills; "
            "make it smaller or raise --dense_batch",
        ),
    ],
)
def test_a_list_that_does_not_fit_the_engine_is_refused(text, message):
    with _raises(message):
        buckets.check_buckets(buckets.parse_buckets(text), max_requests=8, dense_batch=64)


@hypothesis.given(
    sizes=st.lists(
        st.tuples(st.integers(1, 40), st.integers(0, 40), st.integers(1, 8)), min_size=1, max_size=6
    ),
    tokens=st.integers(1, 40),
    decode_rows=st.integers(0, 40),
    prefill_rows=st.integers(0, 8),
)
def test_the_smallest_bucket_that_holds_a_step_is_picked(sizes, tokens, decode_rows, prefill_rows):
    found = sorted({_bucket(t, min(d, t), p) for t, d, p in sizes} | {_bucket(80, 40, 8)})
    step = {"tokens": tokens, "decode_rows": decode_rows, "prefill_rows": prefill_rows}
    picked = buckets.pick_bucket(found, **step)
    assert picked.holds(**step)
    assert picked.tokens == min(b.tokens for b in found if b.holds(**step))


def test_a_step_that_no_bucket_holds_is_our_own_error():
    with pytest.raises(AssertionError, match="no bucket holds 9:0:1"):
        buckets.pick_bucket([_bucket(8, 8, 4)], tokens=9, decode_rows=0, prefill_rows=1)
