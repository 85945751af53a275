import pytest

from nanoflow_jax import llm
from nanoflow_jax import request as request_lib
from nanoflow_jax.bench import soak
from nanoflow_jax.workload.file import WorkRequest


class _FakeModel:
    """Gives 5, 6, 7 for any prompt, with the margins it was told."""

    def __init__(self, margins):
        self._margins = margins

    def generate(self, prompts, params):
        assert [p.max_tokens for p in params] == [3] * len(prompts)
        logprobs = tuple(
            request_lib.TokenLogprobs(
                token_id=token, logprob=-1.0, rank=1, top=((token, -1.0), (9, -1.0 - margin))
            )
            for token, margin in zip((5, 6, 7), self._margins, strict=True)
        )
        choice = llm.Choice(
            index=0,
            text="abc",
            token_ids=(5, 6, 7),
            finish_reason=llm.FinishReason.LENGTH,
            logprobs=logprobs,
        )
        return [llm.Result(prompt_ids=p, choices=(choice,), prompt_logprobs=None) for p in prompts]


def _expected(margins=(1.0, 1.0, 1.0)):
    (made,) = soak.expect(_FakeModel(margins), [WorkRequest(prompt_ids=(1, 2), output_len=3)])
    return made


@pytest.mark.parametrize(
    ("token_ids", "text", "found"),
    [
        ((5, 6, 7), "abc", None),
        ((5, 6), "ab", "2 tokens instead of 3"),
        ((5, 9, 7), "abc", "token 1: 9 instead of 6"),
        ((5, 6, 7), "ab", "the tokens are right and the text is not: 'ab'"),
    ],
)
def test_an_answer_is_right_only_if_it_is_what_was_generated_offline(token_ids, text, found):
    wrong = soak.difference(_expected(), token_ids, text)
    assert (wrong is None) if found is None else wrong.endswith(found)


@pytest.mark.parametrize(
    ("token_ids", "is_right"), [((5, 9, 8), True), ((8, 6, 7), False), ((5, 9), False)]
)
def test_after_a_near_tie_any_tokens_are_right_and_before_it_only_the_same(token_ids, is_right):
    expected = _expected(margins=(1.0, 1e-5, 1.0))
    assert (soak.difference(expected, token_ids, "x") is None) == is_right


def test_growth_is_the_slope_of_all_samples():
    samples = [(second, 100.0 + second / 6) for second in range(0, 120, 10)]
    assert soak.slope_per_minute(samples) == pytest.approx(10.0)
    assert soak.slope_per_minute(samples[:2]) == 0.0


def test_pages_that_are_still_held_are_a_complaint():
    found = soak.Soak(pages_before=0, pages_after=2, mismatches=["x"])
    assert found.complaints == ["x", "2 pages are held at the end, 0 were at first"]
