"""Lines of both forms, and the words for those that cannot be served."""

import json
from typing import Any

import pytest

from nanoflow_jax.batch import rows
from nanoflow_jax.openai.requests import Endpoint

_DEFAULTS = rows.Defaults(sampling={"max_tokens": 3}, seed=5)


def _read(row: Any, number: int = 7, **options: Any) -> rows.Row | rows.BadRow:
    data = row if isinstance(row, bytes) else json.dumps(row).encode()
    return rows.read(number, data, _DEFAULTS, **options)


def _batch(**changes: Any) -> dict[str, Any]:
    row = {
        "custom_id": "a",
        "method": "POST",
        "url": "/v1/completions",
        "body": {"prompt": "x", "seed": 1},
        **changes,
    }
    return {name: value for name, value in row.items() if value is not ...}


def _good(row: Any, **options: Any) -> rows.Row:
    found = _read(row, **options)
    assert isinstance(found, rows.Row)
    return found


def test_a_row_of_openais_format_is_understood() -> None:
    found = _good(_batch())
    assert (found.number, found.custom_id, found.seeds) == (7, "a", (1,))
    assert found.request.prompts == ("x",)
    assert found.request.params.max_tokens == 3
    body = {"messages": [{"role": "user", "content": "x"}]}
    chat = _good(_batch(url="/v1/chat/completions", body=body))
    assert chat.request.endpoint is Endpoint.CHAT


def test_a_short_row_is_a_body() -> None:
    found = _good({"prompt": [1, 2], "temperature": 0})
    assert found.custom_id == "row-7"
    assert found.request.prompts == ((1, 2),)
    assert found.request.params.temperature == 0
    assert _good({"prompt": "x", "custom_id": "mine"}).custom_id == "mine"
    chat = _good({"messages": [{"role": "user", "content": "x"}]})
    assert chat.request.endpoint is Endpoint.CHAT


def test_a_row_without_a_seed_gets_one_from_job_and_number() -> None:
    seeds = {
        (job, number): rows.read(
            number, b'{"prompt": "x"}', rows.Defaults(sampling={}, seed=job)
        ).seeds
        for job in (0, 1)
        for number in (0, 1, 10)
    }
    assert len(set(seeds.values())) == 6
    assert seeds[0, 1] == (rows.row_seed(0, 1, 0),)
    assert _good({"prompt": "x", "seed": 0}).seeds == (0,)


def test_prompts_of_one_row_get_seeds_of_their_own_unless_it_names_one() -> None:
    drawn = _good({"prompt": ["x", "x"]}).seeds
    assert len(set(drawn)) == 2
    assert _good({"prompt": ["x", "x"], "seed": 9}).seeds == (9, 9)


@pytest.mark.parametrize(
    ("row", "message", "custom_id"),
    [
        (b"not json", "line 8 is not JSON", "row-7"),
        (b"[]", "line 8 is not a JSON object", "row-7"),
        (_batch(custom_id=...), "custom_id is missing from the row", "row-7"),
        (_batch(custom_id=5), "custom_id=5 is not text", "row-7"),
        (_batch(custom_id=""), "custom_id='' is not text", ""),
        (_batch(method=...), "method is missing from the row", "a"),
        (_batch(method="GET"), "method='GET' is not 'POST'", "a"),
        (_batch(url=...), "url is missing from the row", "a"),
        (
            _batch(url="/v1/embeddings"),
            "url='/v1/embeddings' is not one of /v1/completions, /v1/chat/completions",
            "a",
        ),
        (_batch(url=["x"]), "url=['x'] is not one of", "a"),
        (_batch(body=...), "body is missing from the row", "a"),
        (_batch(body="x"), "body='x' is not an object", "a"),
        (_batch(extra=1), "'extra' is no field of a batch row", "a"),
        (_batch(body={"prompt": "x", "n": 0}), "n=0 is not an integer from 1 to 128", "a"),
        (_batch(body={"prompt": "x", "stream": True}), "a batch job writes whole answers", "a"),
        ({}, "a row has either a prompt, or messages", "row-7"),
        ({"prompt": "x", "messages": []}, "a row has either a prompt, or messages", "row-7"),
        ({"prompt": "x", "colour": 1}, "'colour' is no field of /v1/completions", "row-7"),
    ],
)
def test_a_bad_row_says_what_is_wrong_and_keeps_its_id(
    row: Any, message: str, custom_id: str
) -> None:
    found = _read(row)
    assert isinstance(found, rows.BadRow)
    assert message in str(found.error)
    assert found.custom_id == custom_id


def test_the_second_use_of_a_custom_id_is_a_bad_row() -> None:
    found = _read(_batch(), repeats=2)
    assert isinstance(found, rows.BadRow)
    assert str(found.error) == ("custom_id 'a' was used before, in line 3; give each row its own")
    assert found.error.code == "duplicate_custom_id"


@pytest.mark.parametrize(
    ("row", "code", "status", "message"),
    [
        ({"prompt": "x", "model": "mine"}, None, None, None),
        ({"prompt": "x"}, None, None, None),
        (
            {"messages": [{"role": "user", "content": "x"}]},
            "invalid_url",
            400,
            "the row is for /v1/chat/completions and the batch for /v1/completions",
        ),
        (
            {"prompt": "x", "model": "theirs"},
            "model_not_found",
            404,
            "the model 'theirs' is not served here; use one of alias, mine",
        ),
    ],
)
def test_a_job_may_accept_one_endpoint_and_some_models(
    row: dict[str, Any], code: str | None, status: int | None, message: str | None
) -> None:
    accepts = rows.Accepts(endpoint=Endpoint.COMPLETIONS, models=frozenset({"mine", "alias"}))
    found = _read(row, accepts=accepts)
    if message is None:
        assert isinstance(found, rows.Row)
        return
    assert isinstance(found, rows.BadRow)
    assert (found.error.code, found.error.status_code) == (code, status)
    assert message in str(found.error)
