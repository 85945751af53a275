"""Conversations whose final message the model is to go on with."""

import json
from typing import Any

import pytest
from golden import cases

from nanoflow_jax.tokenizer.chat_template import ChatTemplate
from nanoflow_jax.tokenizer.tokenizer import Tokenizer

_KEEPS = "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}"
_STRIPS = "{% for m in messages %}[{{ m.role }}:{{ m.content | trim }}]{% endfor %}"
_PARTS = """{% for m in messages %}{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endfor %}"""
_ASK = {"role": "user", "content": "hi"}


def _render(source: str, messages: list[Any], **options: Any) -> str:
    template = ChatTemplate({"default": source}, special_tokens={})
    try:
        return template.render(messages, **{"continue_final_message": True, **options})
    finally:
        template.close()


@pytest.mark.parametrize(
    ("source", "content", "wanted"),
    [
        (_KEEPS, "Sure, ", "[user:hi][assistant:Sure, "),
        (_STRIPS, "Sure, ", "[user:hi][assistant:Sure,"),
        (_STRIPS, "  Sure", "[user:hi][assistant:Sure"),
        (_KEEPS, "", "[user:hi][assistant:"),
        (_KEEPS, [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], None),
    ],
)
def test_the_text_ends_where_the_final_message_does(source: str, content: Any, wanted: Any) -> None:
    wanted = wanted or "[user:hi][assistant:a\nb"
    assert _render(source, [_ASK, {"role": "assistant", "content": content}]) == wanted


def test_the_last_of_several_parts_is_continued() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b "}]
    assert _render(_PARTS, [{"role": "assistant", "content": parts}]) == "<a><b "


def test_messages_are_not_changed() -> None:
    messages = [_ASK, {"role": "assistant", "content": "Sure"}]
    before = json.dumps(messages)
    _render(_KEEPS, messages)
    assert json.dumps(messages) == before


def test_no_answer_is_begun_where_one_is_continued() -> None:
    source = _KEEPS + "{% if add_generation_prompt %}[assistant:{% endif %}"
    assert _render(source, [_ASK]) == "[user:hi"
    assert _render(source, [_ASK], continue_final_message=False) == "[user:hi][assistant:"
    with pytest.raises(ValueError, match="set one of them to false"):
        _render(source, [_ASK], add_generation_prompt=True)


@pytest.mark.parametrize(
    ("source", "content", "message"),
    [
        (_KEEPS, None, "continue_final_message: the final message has no text to continue"),
        ("{{ messages[0].content }}", "x", "does not write the final message as it is"),
        (_KEEPS.replace("content", "content | upper"), "x", "does not write the final message"),
    ],
)
def test_a_final_message_that_cannot_be_continued_is_refused(
    source: str, content: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _render(source, [_ASK, {"role": "assistant", "content": content}])


_CONVERSATIONS = [
    [_ASK, {"role": "assistant", "content": "Sure, here it is:"}],
    [_ASK, {"role": "assistant", "content": "Sure, "}],
    [_ASK, {"role": "assistant", "content": "  {"}],
    [_ASK, {"role": "assistant", "content": "no"}, {"role": "user", "content": "why is"}],
]


@pytest.mark.parity
@pytest.mark.parametrize("messages", _CONVERSATIONS)
@pytest.mark.parametrize("case", cases.CASES)
def test_final_messages_are_continued_as_in_transformers(case: str, messages: list[Any]) -> None:
    transformers = pytest.importorskip("transformers")
    folder = cases.load(case).path
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    wanted = theirs.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    template = ChatTemplate.load(folder)
    try:
        found = template.render(messages, continue_final_message=True)
    finally:
        template.close()
    assert found == wanted
    ids = theirs(wanted, add_special_tokens=False)["input_ids"]
    assert Tokenizer.load(folder).encode(found, add_special_tokens=False) == ids
