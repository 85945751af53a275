"""Plans come back from JSON as they were; what is not one is refused with what to change."""

import json

import pytest
import random_plans
from hypothesis import given

from nanoflow_jax.nanobatch import builders, plan_file
from nanoflow_jax.nanobatch.operations import LayerShape

HALVES = builders.halves(LayerShape(), num_tokens=256)


def _content():
    return json.loads(plan_file.to_json([HALVES]))


def _refused(content, match):
    with pytest.raises(ValueError, match=match):
        plan_file.from_json(json.dumps(content))


@given(random_plans.plans())
def test_plans_come_back_as_they_were(plan):
    assert plan_file.from_json(plan_file.to_json([plan])) == (plan,)


def test_plans_of_several_sizes_share_a_file(tmp_path):
    plans = (HALVES, builders.one(LayerShape(), num_tokens=128))
    path = tmp_path / "plans.json"
    path.write_text(plan_file.to_json(plans))
    assert plan_file.read(path) == plans


def test_a_nano_operation_is_one_line():
    lines = plan_file.to_json([HALVES]).splitlines()
    wanted = (
        '{"operation": "o", "tokens": [128, 256], "lane": "compute", "num_ctas": 100}',
        '{"operation": "norm", "tokens": [0, 128], "shift": 1}',
    )
    for line in wanted:
        assert line in [found.strip().removesuffix(",") for found in lines]


def test_errors_name_the_file(tmp_path):
    path = tmp_path / "plans.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"plans\.json: not JSON: Expecting property name"):
        plan_file.read(path)


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_what_is_nested_too_deeply_is_refused(opening):
    with pytest.raises(ValueError, match="nested too deeply"):
        plan_file.from_json(opening * 100_000)


def test_another_schema_is_refused():
    content = _content() | {"schema": 2}
    _refused(content, "schema 2 is not 1, the one that this version reads; write the plans again")


def test_no_plan_at_all_is_refused():
    _refused(_content() | {"plans": []}, "plans is empty; give at least one")


def test_two_plans_of_one_size_are_refused():
    content = _content()
    content["plans"] *= 2
    _refused(content, "two plans are for 256 tokens; keep one")


def test_what_is_no_object_is_refused():
    _refused([], r"the file is \[\]; wanted an object")
    _refused(_content() | {"plans": [3]}, r"plans\[0\] is 3; wanted an object")


@pytest.mark.parametrize("name", list(json.loads(plan_file.to_json([HALVES]))["plans"][0]))
def test_a_missing_field_is_named(name):
    content = _content()
    del content["plans"][0][name]
    _refused(content, rf"plans\[0\].{name} is missing; wanted")


def test_unknown_fields_are_named():
    content = _content()
    content["plans"][0]["order"][2]["streams"] = 2
    _refused(content, r"plans\[0\].order\[2\] has unknown fields 'streams'; remove them")
    _refused(_content() | {"version": 1}, "the file has unknown fields 'version'; remove them")
    content = _content()
    content["plans"][0]["comment"] = ""
    _refused(content, r"plans\[0\] has unknown fields 'comment'; remove them")


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("num_tokens", "256", "'256'; wanted an integer"),
        ("num_tokens", True, "True; wanted an integer"),
        ("granule", 1.5, "1.5; wanted an integer"),
        ("name", 3, "3; wanted a string"),
        ("is_sparse", 0, "0; wanted true or false"),
        ("order", {}, "{}; wanted a list"),
    ],
)
def test_a_field_of_another_type_is_refused(field, value, wanted):
    content = _content()
    content["plans"][0][field] = value
    _refused(content, rf"plans\[0\].{field} is {wanted}")


def test_an_entry_of_another_type_is_refused():
    content = _content()
    content["plans"][0]["decode_weights"][1] = None
    _refused(content, r"plans\[0\].decode_weights\[1\] is None; wanted an integer")


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("tokens", [0], r"tokens is \[0\]; wanted \[start, stop\]"),
        ("lane", "gpu", "lane is 'gpu'; wanted one of compute, memory, network"),
        ("num_ctas", None, "num_ctas is None; wanted an integer"),
        ("after", "o.0", "after is 'o.0'; wanted a list"),
    ],
)
def test_a_nano_operation_of_another_form_is_refused(field, value, wanted):
    content = _content()
    content["plans"][0]["order"][0][field] = value
    _refused(content, rf"plans\[0\].order\[0\].{wanted}")


def test_a_plan_says_whether_it_changes_bits_and_nothing_else():
    assert _content()["plans"][0]["changes_bits"] is True
    content = _content()
    content["plans"][0]["changes_bits"] = False
    _refused(
        content,
        r"plans\[0\].changes_bits is False, but what the plan cuts says True; write that",
    )


def test_a_plan_that_is_not_legal_is_refused():
    content = _content()
    del content["plans"][0]["order"][1]
    _refused(content, r"plan 'halves': o: nothing covers tokens \[128, 256\); add a range")
