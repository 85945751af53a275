import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from golden import cases

from nanoflow_jax.tokenizer.chat_template import ChatTemplate
from nanoflow_jax.tokenizer.tokenizer import Tokenizer

_HELLO = [{"role": "user", "content": "Hello"}]
_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
_CHATML = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
_PARTS = """{% for message in messages %}{% if message.content is string %}{{ message.content }}
{%- else %}{% for part in message.content %}[{{ part.text }}]{% endfor %}{% endif %}{% endfor %}"""


def _render(source: str, messages: Any = _HELLO, **options: Any) -> str:
    limits = options.pop("limits", None)
    clock = options.pop("clock", datetime.datetime.now)
    template = ChatTemplate({"default": source}, special_tokens=_TOKENS, limits=limits, clock=clock)
    try:
        return template.render(messages, **options)
    finally:
        template.close()


@pytest.mark.parametrize("case", cases.CASES)
def test_conversations_render_and_encode_as_in_transformers(case):
    golden = cases.load(case)
    assert golden.chat
    tokenizer = Tokenizer.load(golden.path)
    now = [datetime.datetime(2026, 1, 1)]
    template = ChatTemplate.load(golden.path, clock=lambda: now[0])
    for row in golden.chat:
        if "now" in row:
            now[0] = datetime.datetime.fromisoformat(row["now"])
        options = {
            "tools": row.get("tools"),
            "add_generation_prompt": row["add_generation_prompt"],
            "kwargs": row.get("kwargs", {}),
        }
        if "error" in row:
            with pytest.raises(ValueError, match="the chat template refuses") as caught:
                template.render(row["messages"], **options)
            assert row["error"] in str(caught.value)
            continue
        text = template.render(row["messages"], **options)
        assert text == row["rendered"]
        assert tokenizer.encode(text, add_special_tokens=False) == row["token_ids"]
        # The BOS that a template writes is not doubled by a caller who encodes it as a prompt.
        if row["token_ids"][0] == tokenizer.bos_id:
            assert tokenizer.encode(text) == row["token_ids"]


def test_a_conversation_worked_by_hand():
    messages = [{"role": "system", "content": "Be brief. "}, *_HELLO]
    assert _render(_CHATML, messages) == (
        "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert _render(_CHATML, add_generation_prompt=False) == (
        "<s><|im_start|>user\nHello<|im_end|>\n"
    )


# Each answer is what transformers 5.23 renders.
@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ d | tojson }}", '{"b": 1, "a": "é<\\"\'&"}'),
        ("{{ d | tojson(indent=2) }}", '{\n  "b": 1,\n  "a": "é<\\"\'&"\n}'),
        ("{{ l | tojson(separators=(',', ':')) }}", "[1,2,3]"),
        ("{{ d | tojson(ensure_ascii=true, sort_keys=true) }}", '{"a": "\\u00e9<\\"\'&", "b": 1}'),
        (
            "{{ none }} {{ true }} {{ l }} {{ {'k': [none, 1.5]} }}",
            "None True [1, 2, 3] {'k': [None, 1.5]}",
        ),
        ("{{ 'a' ~ none ~ true ~ 1.0 }}", "aNoneTrue1.0"),
        (
            "{{ s.strip() }}|{{ s.lstrip() }}|{{ s.rstrip() }}|{{ s.split() }}",
            "a b|a b | a b|['a', 'b']",
        ),
        ("{{ s.startswith(' ') }}{{ s.endswith('x') }}{{ s.upper() }}", "TrueFalse A B "),
        ("{{ s.replace('a', 'c') }}{{ s.title() }}{{ s.split(' ', 1)[1] }}", " c b  A B a b "),
        ("{{ d.get('z', 4) }}{{ d.get('z') }}{{ d.keys() | list }}", "4None['b', 'a']"),
        ("{% for k, v in d.items() %}{{ k }}={{ v }};{% endfor %}", "b=1;a=é<\"'&;"),
        ("{{ l[::-1] }}{{ l[1:] }}{{ l[-1] }}{{ s[1:3] }}", "[3, 2, 1][2, 3]3a "),
        ("{{ nope }}|{{ d.nope }}|{{ nope is defined }}|{{ nope == none }}", "||False|False"),
        ("{{ nope | length }}{{ l | length }}{{ s | count }}", "035"),
        (
            "{{ s is sequence }}{{ l is sequence }}{{ d is mapping }}{{ s is iterable }}",
            "TrueTrueTrueTrue",
        ),
        (
            "{% set ns = namespace(x=0) %}"
            "{% for i in l %}{% set ns.x = ns.x + i %}{% endfor %}{{ ns.x }}",
            "6",
        ),
        (
            "{% for i in l %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}"
            "{% if i == 3 %}{% break %}{% endif %}{% endfor %}",
            "13",
        ),
        (
            "{% macro f(a, b='q') %}[{{ a }}{{ b }}]{% endmacro %}{{ f(1) }}{{ f(1, b=2) }}",
            "[1q][12]",
        ),
        ("a\n  {% if true %}\n    b\n  {% endif %}\nc\n\n", "a\n    b\nc\n"),
        ("x {%- generation -%}  a {%- endgeneration -%} y", "xay"),
        ("{% generation %}\n{% set q = 1 %}{{ q }}\n{% endgeneration %}\n|{{ q }}", "1\n|"),
        ("{{ '<b>&' }}{{ '<b>&' | safe }}", "<b>&<b>&"),
        ("{{ tools is none }}{{ documents is none }}", "TrueTrue"),
        ("{{ l | map('string') | join('-') }}", "1-2-3"),
    ],
)
def test_templates_mean_what_they_mean_in_transformers(source, expected):
    variables = {"d": {"b": 1, "a": "é<\"'&"}, "l": [1, 2, 3], "s": " a b "}
    assert _render(source, kwargs=variables) == expected


def test_the_clock_is_read_at_each_rendering():
    clock = iter([datetime.datetime(2024, 7, 26), datetime.datetime(2024, 7, 27)])
    template = ChatTemplate(
        {"default": "{{ strftime_now('%d %b %Y') }}"}, special_tokens={}, clock=lambda: next(clock)
    )
    assert template.render(_HELLO) == "26 Jul 2024"
    assert template.render(_HELLO) == "27 Jul 2024"


def test_a_refusal_carries_the_words_of_the_template():
    with pytest.raises(ValueError, match="template refuses these messages: Only user, not user!"):
        _render("{{ raise_exception('Only user, not ' ~ messages[0].role ~ '!') }}")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% if %}", "fails on these messages: syntax error"),
        ("{{ nope.x }}", "fails on these messages: undefined value.*correct chat_template.jinja"),
        ("{{ 'a'.nope() }}", "has no method named nope"),
        ("{% include 'x' %}", "fails on these messages"),
        ("{{ 1 / 0 }}", "fails on these messages"),
        ("{{ d | tojson(indent=[]) }}", "fails on these messages"),
    ],
)
def test_a_wrong_template_is_named_as_the_cause(source, message):
    with pytest.raises(ValueError, match=message):
        _render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages[0].items.__self__.__class__ }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ strftime_now.__self__.__class__ }}",
        "{{ messages | attr('__class__') | attr('__mro__') | first | upper }}x{{ debug() }}",
    ],
)
def test_c3_a_template_cannot_reach_python(source):
    with pytest.raises(ValueError, match="fails on these messages"):
        _render(source)


def test_a_template_cannot_change_the_callers_messages():
    messages = [{"role": "user", "content": "Hello"}]
    _render("{{ messages.append(1) }}{{ messages[0].clear() }}", messages)
    assert messages == [{"role": "user", "content": "Hello"}]


def test_parts_go_to_a_template_that_reads_them_and_are_joined_for_others():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}, "three"]
    messages = [{"role": "user", "content": parts}]
    assert _render(_PARTS, messages) == "[one][two][three]"
    for source in (
        "{{ messages[0].content }}",
        "{{ messages[0]['content'] | trim }}",
        "{{ messages[0].content | string }}",
        "{{ '' + messages[0].content }}",
        "{{ messages[0].content.strip() }}",
    ):
        assert _render(source, messages) == "one\ntwo\nthree"


def test_one_text_part_is_the_same_as_text():
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    assert _render(_CHATML, messages) == _render(_CHATML)


def test_keys_with_null_are_as_if_not_there():
    messages = [{"role": "assistant", "content": None, "tool_calls": None}]
    assert _render("{{ messages[0].keys() | list }}", messages) == "['role']"


def test_reasoning_is_found_under_all_its_names():
    for name in ("reasoning_content", "reasoning", "thinking"):
        messages = [{"role": "assistant", "content": "a", name: "because"}]
        source = "{{ messages[0].reasoning_content }} {{ messages[0].thinking }}"
        assert _render(source, messages) == "because because"


def test_tools_choose_the_template_made_for_them():
    template = ChatTemplate(
        {"default": "plain", "tool_use": "{{ tools | length }} tools"}, special_tokens={}
    )
    assert template.render(_HELLO) == "plain"
    assert template.render(_HELLO, tools=[{}, {}]) == "2 tools"
    assert ChatTemplate({"default": "plain"}, special_tokens={}).render(_HELLO, tools=[]) == "plain"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("Hello", r"messages must be a list of objects with a role, not 'Hello' \(str\)"),
        ({"role": "user"}, "messages must be a list"),
        (None, "messages must be a list of objects with a role, not nothing"),
        ([], "messages is empty"),
        (["Hello"], r"messages\[0\] must be an object with a role, not 'Hello'"),
        ([*_HELLO, {"content": "x"}], r"messages\[1\] needs a role that is text.*not nothing"),
        ([{"role": 3, "content": "x"}], r"messages\[0\] needs a role that is text.*not 3 \(int\)"),
        ([{"role": "user", "content": 3}], "must be text or a list of text parts, not 3"),
        ([{"role": "user", "content": {"type": "text"}}], "must be text or a list of text parts"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "a part of type 'image_url'; only 'text' parts are supported",
        ),
        ([{"role": "user", "content": [{}]}], "a part of type None"),
        ([{"role": "user", "content": [{"type": "text"}]}], "needs a text, not nothing"),
        ([{"role": "user", "content": [3]}], r"a part of messages\[0\] must be .*not 3"),
        ([{"role": "user", "content": "x", "extra": {1, 2}}], "must be plain JSON values: .*set"),
        ([{"role": "user", "content": "\ud800"}], "must be plain JSON values: .*surrogates"),
    ],
)
def test_malformed_messages_are_refused(messages, message):
    with pytest.raises(ValueError, match=message):
        _render(_CHATML, messages)


def test_messages_without_end_are_refused():
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError, match="must be plain JSON values"):
        _render(_CHATML, [{"role": "user", "content": "x", "extra": deep}])


@pytest.mark.parametrize("tools", ["x", {}, [1]])
def test_malformed_tools_are_refused(tools):
    with pytest.raises(ValueError, match="tools must be a list of JSON objects, not"):
        _render(_CHATML, tools=tools)


def test_kwargs_reach_the_template_if_it_reads_them_and_they_are_not_its_own():
    source = "{{ think }}{{ bos_token }}{{ strftime_now('%%') }}"
    given = {"think": 1, "bos_token": "B", "strftime_now": "no", "never read": "x"}
    assert _render(source, kwargs=given) == "1<s>%"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"tools": [], "messages": []}, r"kwargs \['messages', 'tools'\] are not for the template"),
        ({"chat_template": "x"}, r"template kwargs \['chat_template'\] are not for the template"),
        ({f"k{i}": i for i in range(33)}, "33 template kwargs are more than 32"),
    ],
)
def test_c4_template_kwargs_that_are_no_variables_or_too_many_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        _render(_CHATML, kwargs=kwargs)


def _folder(path: Path, **written: Any) -> ChatTemplate:
    for name, value in written.items():
        stem, _, ending = name.rpartition("_")
        text = value if isinstance(value, str) else json.dumps(value)
        (path / f"{stem}.{ending}").write_text(text)
    return ChatTemplate.load(path)


def test_the_template_file_comes_before_the_config(tmp_path):
    config = {"chat_template": "config", "bos_token": {"content": "<s>"}}
    assert _folder(tmp_path, tokenizer_config_json=config).render(_HELLO) == "config"
    template = _folder(tmp_path, chat_template_jinja="file {{ bos_token }}")
    assert template.render(_HELLO) == "file <s>"


def test_an_old_json_template_file_is_read(tmp_path):
    assert _folder(tmp_path, chat_template_json={"chat_template": "old"}).render(_HELLO) == "old"


def test_named_templates_come_from_a_list_or_from_files(tmp_path):
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    template = _folder(tmp_path, tokenizer_config_json={"chat_template": named})
    assert (template.render(_HELLO), template.render(_HELLO, tools=[])) == ("a", "b")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("d")
    template = _folder(tmp_path, chat_template_jinja="c")
    assert (template.render(_HELLO), template.render(_HELLO, tools=[])) == ("c", "d")


def test_a_folder_without_template_says_what_to_do(tmp_path):
    with pytest.raises(
        ValueError, match=r"has no chat template.*plain prompts, or save a template"
    ):
        ChatTemplate.load(tmp_path)


def test_templates_without_a_default_are_refused(tmp_path):
    named = [{"name": "rag", "template": "a"}]
    with pytest.raises(ValueError, match=r"templates \['rag'\] but none named 'default'"):
        _folder(tmp_path, tokenizer_config_json={"chat_template": named})


@pytest.mark.parametrize("found", [3, [1], [{"name": "a"}], {"default": 3}])
def test_a_garbage_template_entry_is_refused(tmp_path, found):
    with pytest.raises(ValueError, match="is neither text nor a list of names with templates"):
        _folder(tmp_path, tokenizer_config_json={"chat_template": found})
