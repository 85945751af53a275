import pytest
import sample_tokenizers

from nanoflow_jax.tokenizer import bad_words


@pytest.mark.parametrize(
    ("kind", "word", "wanted"),
    [
        ("byte_level", "hello", [["hello"], ["\u0120hello"]]),
        ("byte_level", " hello", [["hello"], ["\u0120hello"]]),
        ("byte_level", "hello d", [["hello", "\u0120", "d"], ["\u0120hello", "\u0120", "d"]]),
        ("gemma", "hello", [["hello"], ["\u2581hello"]]),
        ("llama", "hello", [["\u2581hello"], ["\u2581", "\u2581hello"]]),
        ("words", "w3", [["w3"]]),
    ],
)
def test_a_word_is_written_at_the_beginning_and_after_a_space(kind, word, wanted):
    tokens = sample_tokenizers.sample(kind)
    found = bad_words.token_sequences([word], tokens)
    assert [[tokens.id_to_token(token) for token in sequence] for sequence in found] == wanted


def test_words_may_repeat():
    tokens = sample_tokenizers.sample("byte_level")
    once = bad_words.token_sequences(["he"], tokens)
    assert bad_words.token_sequences(["he", " he", "he"], tokens) == once
    assert bad_words.token_sequences([], tokens) == ()
