"""Token sequences of words that must not be said."""

from collections.abc import Iterable

from nanoflow_jax.tokenizer import tokenizer


def token_sequences(
    words: Iterable[str], tokens: tokenizer.Tokenizer
) -> tuple[tuple[int, ...], ...]:
    """The ways in which a model usually writes words: at the beginning, and after a space.

    As in vLLM, a word that is put together of other tokens, or lies across their borders, is not
    among them.

    Args:
        words: None of them only white space.
        tokens: Of the model.
    """
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        for text in (word.lstrip(), f" {word.lstrip()}"):
            found[tuple(tokens.encode(text, add_special_tokens=False))] = None
    return tuple(sequence for sequence in found if sequence)
