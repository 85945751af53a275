"""The tokenizer is reproducible, loses no byte, and agrees with the chat template."""

import minijinja
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from nanoflow_jax.train_embedded import chat_rows, tokenizer_training

_TEXT = [f"def f_{i}(left):\n    return left * {i}\n" for i in range(200)]


@pytest.fixture(scope="module")
def tokenizer() -> tokenizers.Tokenizer:
    return tokenizer_training.train_tokenizer(_TEXT, vocab_size=300)


def _render(conversation: chat_rows.Conversation, **variables: object) -> str:
    def fail(message: str) -> str:
        raise ValueError(message)

    env = minijinja.Environment()
    env.add_function("raise_exception", fail)
    messages = [turn._asdict() for turn in conversation]
    bos = tokenizer_training.BOS
    return env.render_str(
        tokenizer_training.CHAT_TEMPLATE, messages=messages, bos_token=bos, **variables
    )


def test_the_same_text_gives_the_same_tokenizer(tokenizer: tokenizers.Tokenizer) -> None:
    again = tokenizer_training.train_tokenizer(_TEXT, vocab_size=300)
    assert again.to_str() == tokenizer.to_str()
    assert again.get_vocab_size() == 300


@given(text=st.text())
def test_any_text_comes_back(tokenizer: tokenizers.Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_special_tokens_are_one_token_each_and_text_begins_with_bos(
    tokenizer: tokenizers.Tokenizer,
) -> None:
    special = "".join(tokenizer_training.SPECIAL_TOKENS)
    assert tokenizer.encode(special, add_special_tokens=False).ids == list(range(6))
    assert tokenizer.encode("x").ids[0] == tokenizer.token_to_id(tokenizer_training.BOS)


def test_indentation_belongs_to_its_line_break(tokenizer: tokenizers.Tokenizer) -> None:
    whole = tokenizer.encode("def f():\n    return", add_special_tokens=False).ids
    prompt = tokenizer.encode("def f():\n    ", add_special_tokens=False).ids
    assert whole[: len(prompt)] == prompt


def test_documents_lie_between_bos_and_eos(tokenizer: tokenizers.Tokenizer) -> None:
    (ids,) = tokenizer_training.encode_documents(tokenizer, ["pass"])
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|bos|>pass<|eos|>"


@given(contents=st.lists(st.text(max_size=20), min_size=3, max_size=3))
def test_training_rows_are_what_the_template_renders(
    tokenizer: tokenizers.Tokenizer, contents: list[str]
) -> None:
    roles = ("system", "user", "assistant")
    talk = tuple(chat_rows.Turn(r, c) for r, c in zip(roles, contents, strict=True))
    (ids,) = tokenizer_training.encode_conversations(tokenizer, [talk])
    assert ids == tokenizer.encode(_render(talk), add_special_tokens=False).ids


def test_a_generation_prompt_opens_the_assistants_turn() -> None:
    talk = (chat_rows.Turn("user", "Hi"),)
    rendered = _render(talk, add_generation_prompt=True)
    assert rendered == "<|bos|><|user|>Hi<|end|><|assistant|>"


def test_an_unknown_role_is_refused_by_the_template() -> None:
    with pytest.raises(ValueError, match="roles are system, user and assistant"):
        _render((chat_rows.Turn("tool", "Hi"),))


def test_too_little_text_for_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="--corpus_vocab_size=4096, but the text only gives"):
        tokenizer_training.train_tokenizer(_TEXT, vocab_size=4096)
