import pytest

from nanoflow_jax import json_fields
from nanoflow_jax.json_fields import Fields


def test_fields_are_taken_one_by_one_and_integers_do_for_numbers():
    fields = Fields({"a": 1, "b": [1, 2.5], "c": "x"}, "it")
    assert fields.has("a")
    assert fields.take("a", float) == 1.0
    assert type(fields.take_list("b", float)[0]) is float
    assert fields.take("c", str) == "x"
    assert fields.take("d", int, default=3) == 3
    fields.finish()


@pytest.mark.parametrize(
    ("content", "act", "message"),
    [
        (3, lambda f: f, "it is 3; wanted an object"),
        ({}, lambda f: f.take("a", float), "it.a is missing; wanted a number"),
        ({"a": True}, lambda f: f.take("a", int), "it.a is True; wanted an integer"),
        ({"a": True}, lambda f: f.take("a", float), "it.a is True; wanted a number"),
        ({"a": "b"}, lambda f: f.take("a", list), "it.a is 'b'; wanted a list"),
        ({"a": [1, "b"]}, lambda f: f.take_list("a", int), r"it.a\[1\] is 'b'; wanted an integer"),
        ({"a": 1}, lambda f: f.finish(), "it has unknown fields 'a'; remove them"),
    ],
)
def test_what_is_not_as_wanted_is_said_with_its_place(content, act, message):
    with pytest.raises(ValueError, match=message):
        act(Fields(content, "it"))


def test_what_is_no_json_is_said():
    with pytest.raises(ValueError, match="not JSON: Expecting value: line 1 column 1"):
        json_fields.parse("no")
