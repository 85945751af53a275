"""Which way a model writes calls, seen in its template and its vocabulary."""

import pathlib

import pytest
from golden import cases

from nanoflow_jax.tokenizer import tokenizer, tool_formats
from nanoflow_jax.tokenizer.tool_formats import ToolFormat, ToolStyle

_GOLDEN = pathlib.Path(cases.__file__).parent


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("llama3", ToolFormat.LLAMA3),
        ("qwen2", ToolFormat.HERMES),
        ("qwen3", ToolFormat.HERMES),
        ("mistral", ToolFormat.MISTRAL),
        ("gemma2", None),
        ("llama2", None),
        ("zephyr", None),
    ],
)
def test_templates_tell_the_format(name: str, wanted: ToolFormat | None) -> None:
    template = (_GOLDEN / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
    assert tool_formats.detect(template) == wanted


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        ("[TOOL_CALLS]{{ call.name }}[ARGS]{{ call.arguments }}", ToolFormat.MISTRAL_ARGS),
        ("<|python_tag|>", ToolFormat.LLAMA3),
        ("<tool_call>\n<function={{ call.name }}>", None),
        ("<tool_call>{{ call.name }}\n<arg_key>", None),
        ("", None),
    ],
)
def test_newer_forms_are_told_apart(template: str, wanted: ToolFormat | None) -> None:
    assert tool_formats.detect(template) == wanted


def test_markers_that_are_tokens_are_known_by_id() -> None:
    words = tokenizer.Tokenizer.load(_GOLDEN / "mistral")
    style = ToolStyle.of_model({"default": "[TOOL_CALLS]"}, words)
    assert style.token_ids == {"[TOOL_CALLS]": words.token_to_id("[TOOL_CALLS]")}
    assert style.needs_special_tokens


def test_markers_that_are_no_special_tokens_stay_in_the_text_anyway() -> None:
    words = tokenizer.Tokenizer.load(_GOLDEN / "qwen3")
    style = ToolStyle.of_model({"default": "<tool_call>"}, words)
    assert set(style.token_ids) == {"<tool_call>", "</tool_call>"}
    assert not style.special
    assert not style.needs_special_tokens


@pytest.mark.parametrize(
    ("tool_format", "special", "wanted"),
    [
        (ToolFormat.HERMES, "</tool_call>", True),
        (ToolFormat.MISTRAL_ARGS, "[ARGS]", True),
        (ToolFormat.MISTRAL, "[ARGS]", False),
        (ToolFormat.LLAMA3, "<|python_tag|>", True),
        (ToolFormat.LLAMA3, "<tool_call>", False),
    ],
)
def test_only_markers_of_the_own_format_keep_special_tokens(
    tool_format: ToolFormat, special: str, wanted: bool
) -> None:
    style = ToolStyle(format=tool_format, special=frozenset({special}))
    assert style.needs_special_tokens == wanted


def test_the_template_for_tools_comes_before_the_default_one() -> None:
    style = ToolStyle.of_model({"default": "", "tool_use": "<tool_call>"}, None)
    assert (style.format, style.is_native) == (ToolFormat.HERMES, True)


def test_a_model_without_a_form_gets_hermes_which_is_not_native() -> None:
    style = ToolStyle.of_model({"default": "no calls here"}, None)
    assert (style.format, style.is_native) == (ToolFormat.HERMES, False)
    assert not ToolStyle.of_model({}, None).is_native


def test_the_user_wins_over_the_template() -> None:
    style = ToolStyle.of_model({"default": "<tool_call>"}, None, chosen=ToolFormat.LLAMA3)
    assert (style.format, style.is_native) == (ToolFormat.LLAMA3, True)
