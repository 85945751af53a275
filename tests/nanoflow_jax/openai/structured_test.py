"""What bodies ask the form of an answer to be."""

import json
from typing import Any

import pytest

from nanoflow_jax.openai import errors, structured
from nanoflow_jax.request import Grammar, GrammarKind

_SCHEMA = {"type": "object", "properties": {"a": {}}}
_AS_JSON = Grammar(kind=GrammarKind.JSON_SCHEMA, text=json.dumps(_SCHEMA))
_OBJECT = Grammar(kind=GrammarKind.JSON_SCHEMA, text='{"type": "object"}')
_REGEX = Grammar(kind=GrammarKind.REGEX, text="a+")
_LARK = Grammar(kind=GrammarKind.LARK, text='start: "a"')
_CHOICE = Grammar(kind=GrammarKind.LARK, text=r'start: "a\"b" | "\n"')


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, _OBJECT),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": _SCHEMA, "strict": True},
                }
            },
            _AS_JSON,
        ),
        ({"structured_outputs": {"json": _SCHEMA}}, _AS_JSON),
        ({"structured_outputs": {"json": json.dumps(_SCHEMA), "regex": None}}, _AS_JSON),
        ({"structured_outputs": {"json_object": True}}, _OBJECT),
        ({"structured_outputs": {"regex": "a+"}}, _REGEX),
        ({"structured_outputs": {"choice": ['a"b', "\n"]}}, _CHOICE),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, _LARK),
        ({"guided_json": _SCHEMA}, _AS_JSON),
        ({"guided_regex": "a+"}, _REGEX),
        ({"guided_choice": ['a"b', "\n"]}, _CHOICE),
        ({"guided_grammar": 'start: "a"'}, _LARK),
    ],
)
def test_every_form_becomes_one_grammar(body: dict[str, Any], wanted: Grammar | None) -> None:
    assert structured.take(body.get) == wanted


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"response_format": "json"}, "is not an object whose type is text"),
        ({"response_format": {"type": "json_schema"}}, "is not an object with a schema"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": {}, "strict": 1.5},
                }
            },
            "strict=1.5 is not true or false",
        ),
        ({"structured_outputs": []}, "is not an object with one of json"),
        ({"structured_outputs": {}}, "has nothing; give one of json"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "has json and regex; give one"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structural_tag is not supported"),
        ({"structured_outputs": {"json_object": 3}}, "json_object=3 is not true or false"),
        ({"guided_json": 5}, "guided_json=5 is not a JSON schema or its text"),
        ({"guided_json": {"a": float("nan")}}, "guided_json is not plain JSON"),
        ({"guided_regex": 5}, "guided_regex=5 is not text"),
        ({"guided_choice": []}, "is not a list of 1 to 1000 texts"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_regex and guided_choice each ask"),
    ],
)
def test_a_wrong_form_is_refused(body: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.ApiError, match=message):
        structured.take(body.get)
