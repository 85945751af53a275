import hypothesis
import hypothesis.strategies as st
import pytest

from nanoflow_jax.cost.steady_state import Mix


def test_batches_of_the_papers_requests():
    half = Mix(prompt_len=512, output_len=512)
    assert half.decode_rows(2048) == 1024
    assert (half.decode_context, half.prefix) == (768.0, 256.0)
    assert half.chunks(1024) == 3
    long = Mix(prompt_len=1024, output_len=512)
    assert long.decode_rows(2048) == 683
    assert (long.decode_context, long.prefix) == (1280.0, 512.0)
    assert str(long) == "1024/512"


def test_prompts_alone_make_no_decode_rows():
    mix = Mix(prompt_len=512, output_len=0)
    assert mix.decode_rows(2048) == 0
    assert mix.chunks(2048) == 5
    assert mix.chunks(0) == 0


@hypothesis.given(st.integers(1, 40), st.integers(0, 40), st.integers(1, 60))
def test_rows_and_tokens_of_prompts_come_in_the_proportion_of_a_request(prompt, output, tokens):
    mix = Mix(prompt_len=prompt, output_len=output)
    rows = mix.decode_rows(tokens)
    assert abs(rows * (prompt + output) - tokens * output) <= (prompt + output) / 2
    # Chunks of whole prompts, cut anywhere.
    assert mix.chunks(tokens) >= max(
        len({(start + i) // prompt for i in range(tokens)}) for start in range(prompt)
    )


@pytest.mark.parametrize(("prompt", "output"), [(0, 5), (1, -1)])
def test_requests_of_nothing_are_refused(prompt, output):
    with pytest.raises(ValueError, match=f"requests of {prompt} tokens and {output} more are none"):
        Mix(prompt_len=prompt, output_len=output)
