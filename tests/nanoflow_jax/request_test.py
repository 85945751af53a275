import math
import re

import hypothesis
import pytest
from hypothesis import strategies as st

from nanoflow_jax import request
from nanoflow_jax.request import SamplingParams


def _raises(message):
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


def test_the_defaults_are_valid_and_not_greedy():
    params = SamplingParams()
    assert not params.is_greedy
    assert not params.uses_penalties


def test_temperature_zero_is_greedy():
    assert SamplingParams(temperature=0).is_greedy
    assert SamplingParams(temperature=0.0).is_greedy
    assert not SamplingParams(temperature=1e-9).is_greedy


@pytest.mark.parametrize(
    "penalty", [{"presence_penalty": 0.1}, {"frequency_penalty": -1}, {"repetition_penalty": 1.1}]
)
def test_any_penalty_takes_a_row_of_the_penalty_table(penalty):
    assert SamplingParams(**penalty).uses_penalties


def test_lists_and_a_lone_stop_string_become_tuples():
    params = SamplingParams(
        stop="end", stop_token_ids=[1, 2], allowed_token_ids=[3], bad_words=["no"]
    )
    assert params.stop == ("end",)
    assert params.stop_token_ids == (1, 2)
    assert params.allowed_token_ids == (3,)
    assert params.bad_words == ("no",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


_NAN, _INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("name", "values", "wanted"),
    [
        ("max_tokens", [0, -1, 1.5, "3", True, 2**31, 10**30], "an integer from 1 to 2147483647"),
        ("min_tokens", [-1, None, 0.5, 2**31], "an integer from 0 to 2147483647"),
        (
            "temperature",
            [-0.1, _NAN, _INF, 1e7, "1", None, True, 10**400],
            "a number in [0, 1e+06]",
        ),
        ("top_k", [-1, 2**31, 0.5, None], "an integer from 0 to 2147483647"),
        ("top_p", [0, 0.0, 1.01, -1, _NAN, None], "a number in (0, 1]"),
        ("min_p", [-0.1, 1.1, _NAN], "a number in [0, 1]"),
        ("presence_penalty", [-2.1, 2.1, _NAN], "a number in [-2, 2]"),
        ("frequency_penalty", [-2.1, 2.1, "0"], "a number in [-2, 2]"),
        ("repetition_penalty", [0, -1, 5e-324, 101, _INF], "a number in [0.01, 100]"),
        ("logprobs", [-1, 21, True, 1.0], "an integer from 0 to 20"),
        ("prompt_logprobs", [-1, 21, "5"], "an integer from 0 to 20"),
        ("n", [0, 129, None], "an integer from 1 to 128"),
        ("seed", [-(2**63) - 1, 2**64, 0.5], f"an integer from {-(2**63)} to {2**64 - 1}"),
        ("include_stop", [None, 1, "yes"], "true or false"),
        ("ignore_eos", [None, 0], "true or false"),
        ("skip_special_tokens", [None, 1], "true or false"),
    ],
)
def test_a_value_outside_its_range_is_refused_by_name(name, values, wanted):
    for value in values:
        with _raises(f"{name}={value!r:.80} is not {wanted}"):
            SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_tokens", [1, None, 2**31 - 1]),
        ("temperature", [0, 0.0, 1e6]),
        ("top_k", [0, 2**31 - 1]),
        ("top_p", [1, 1.0, 1e-9]),
        ("min_p", [0, 1]),
        ("presence_penalty", [-2, 2.0]),
        ("repetition_penalty", [100, 0.01]),
        ("logprobs", [0, 20, None]),
        ("prompt_logprobs", [0, 20, None]),
        ("n", [1, 128]),
        ("seed", [-(2**63), 2**64 - 1, None]),
    ],
)
def test_the_ends_of_each_range_are_inside_it(name, values):
    for value in values:
        assert getattr(SamplingParams(**{name: value}), name) == value


def test_more_least_tokens_than_most_are_refused():
    with _raises("min_tokens=4 is more than max_tokens=3"):
        SamplingParams(min_tokens=4, max_tokens=3)
    assert SamplingParams(min_tokens=400, max_tokens=None).min_tokens == 400


@pytest.mark.parametrize("stop", [("",), ("a", ""), (1,), 5, {"a"}])
def test_stop_is_a_list_of_texts(stop):
    with _raises(f"stop={stop!r} is not a list of non-empty strings"):
        SamplingParams(stop=stop)


@pytest.mark.parametrize("stop", [("a",) * 17, ("a" * 1025,)])
def test_stop_strings_are_few_and_short(stop):
    with _raises(f"stop has {len(stop)} strings; at most 16 of at most 1024 characters are taken"):
        SamplingParams(stop=stop)


@pytest.mark.parametrize("words", [("",), ("a", " \n"), (1,), 5, "ab", None])
def test_bad_words_are_a_list_of_texts(words):
    with _raises(f"bad_words={words!r} is not a list of texts that are more than white space"):
        SamplingParams(bad_words=words)


@pytest.mark.parametrize("words", [("a",) * 129, ("a" * 257,)])
def test_bad_words_are_few_and_short(words):
    with _raises(
        f"bad_words has {len(words)} texts; at most 128 of at most 256 characters are taken"
    ):
        SamplingParams(bad_words=words)


@pytest.mark.parametrize("ids", [(-1,), (1.0,), (True,), ("1",), (2**31,), 3, None])
def test_stop_tokens_are_ids(ids):
    with _raises(f"stop_token_ids={ids!r} is not a list of token ids"):
        SamplingParams(stop_token_ids=ids)


def test_stop_tokens_are_few():
    with _raises("stop_token_ids has 129 ids; at most 128 are taken"):
        SamplingParams(stop_token_ids=tuple(range(129)))


@pytest.mark.parametrize("ids", [(), (-1,), (0.5,), (10**30,), "12", 3])
def test_allowed_tokens_are_ids_and_at_least_one(ids):
    with _raises("allowed_token_ids is not a non-empty list of token ids"):
        SamplingParams(allowed_token_ids=ids)


def test_allowed_tokens_are_not_too_many():
    with _raises("allowed_token_ids has 8193 ids; at most 8192 are taken"):
        SamplingParams(allowed_token_ids=(1,) * 8193)
    assert SamplingParams(allowed_token_ids=[1] * 8192).allowed_token_ids == (1,) * 8192


def test_a_complaint_is_short_however_long_the_value():
    for name in ("stop", "stop_token_ids", "temperature", "max_tokens", "include_stop"):
        with pytest.raises(ValueError, match=name) as caught:
            SamplingParams(**{name: "a" * 100_000 if name != "stop" else (1,) * 16})
        assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "bias", [[(1, 2.0)], {"1": 2.0}, {-1: 2.0}, {1: 101}, {1: -100.5}, {1: _NAN}, {1: None}, None]
)
def test_logit_bias_maps_ids_to_numbers(bias):
    with _raises("logit_bias is not a map from token ids to numbers in [-100, 100]"):
        SamplingParams(logit_bias=bias)


def test_logit_bias_is_short():
    with _raises("logit_bias has 301 entries; at most 300 are taken"):
        SamplingParams(logit_bias=dict.fromkeys(range(301), 1.0))
    assert len(SamplingParams(logit_bias=dict.fromkeys(range(300), 1.0)).logit_bias) == 300


def test_the_first_complaint_is_the_one_reported():
    with pytest.raises(ValueError, match=r"^temperature=-1 is not a number in \[0, 1e\+06\]$"):
        SamplingParams(temperature=-1, top_p=7)


_ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(-2, 5) | st.text(max_size=2) | st.floats(), max_size=3),
    st.dictionaries(st.integers(-2, 5) | st.text(max_size=1), st.floats() | st.none(), max_size=2),
)


@hypothesis.given(
    fields=st.dictionaries(
        st.sampled_from(sorted(SamplingParams.__dataclass_fields__)), _ANYTHING, max_size=5
    )
)
@hypothesis.settings(max_examples=300)
def test_whatever_json_holds_is_taken_or_refused_with_a_message(fields):
    try:
        params = SamplingParams(**fields)
    except ValueError as error:
        message = str(error)
    else:
        message = None
        assert params.max_tokens is None or params.min_tokens <= params.max_tokens
    assert message is None or message.startswith(tuple(fields))


def test_finish_reasons_are_openais():
    assert [str(reason) for reason in request.FinishReason] == ["stop", "length", "abort", "error"]
