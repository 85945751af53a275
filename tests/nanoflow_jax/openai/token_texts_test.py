"""Texts of single tokens against what decoding a whole text gives."""

import pathlib

import pytest
from golden import cases

from nanoflow_jax.openai import token_texts
from nanoflow_jax.tokenizer import tokenizer

_FOLDER = pathlib.Path(cases.__file__).parent


@pytest.mark.parametrize("case", ["llama", "llama3", "qwen3"])
def test_bytes_of_tokens_put_together_are_the_text(case: str) -> None:
    golden = cases.load(case)
    words = tokenizer.Tokenizer.load(golden.path)
    texts = token_texts.TokenTexts(words)
    for row in golden.texts:
        pieces = [texts.data(token) for token in row["token_ids"]]
        joined = b"".join(piece for piece in pieces if piece is not None).decode()
        # The decoder takes off the space that the tokenizer put before the text.
        assert joined.replace(" ", "") == row["decoded_with_special"].replace(" ", "")


def test_a_token_inside_a_text_keeps_its_space() -> None:
    words = tokenizer.Tokenizer.load(_FOLDER / "llama")
    texts = token_texts.TokenTexts(words)
    ids = words.encode("Hello there", add_special_tokens=False)
    assert "".join(texts.text(token) for token in ids) == " Hello there"


@pytest.mark.parametrize("case", ["llama", "qwen3"])
def test_part_of_a_character_is_shown_as_bytes(case: str) -> None:
    words = tokenizer.Tokenizer.load(_FOLDER / case)
    texts = token_texts.TokenTexts(words)
    found = [texts.text(token) for token in words.encode("☕", add_special_tokens=False)]
    assert "bytes:\\xe2" in "".join(found)


def test_special_tokens_have_their_spelling() -> None:
    words = tokenizer.Tokenizer.load(_FOLDER / "qwen3")
    texts = token_texts.TokenTexts(words)
    assert {texts.text(token) for token in words.special_ids} >= {"<|im_start|>", "<|im_end|>"}


def test_what_has_no_text_is_shown_as_its_id() -> None:
    words = tokenizer.Tokenizer.load(_FOLDER / "qwen3")
    assert token_texts.TokenTexts(None).text(7) == "token_id:7"
    assert token_texts.TokenTexts(None).data(7) is None
    texts = token_texts.TokenTexts(words)
    assert texts.text(100_000) == "token_id:100000"
    assert texts.text(40, as_id=True) == "token_id:40"
