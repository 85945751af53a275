"""C8, C11: who may come in, and what a client's names may reach."""

import ast
import asyncio
import inspect
import logging

import fastapi
import httpx
import pytest
import whole_app

from nanoflow_jax.serve import keys, log

_KEY = "a-key-that-nobody-else-has"
_BASE = "http://127.0.0.1"


def _ask(app, requests):
    """Answers to (method, path, headers), in order."""

    async def run():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=_BASE) as client:
            return [
                await client.request(method, path, headers=headers)
                for method, path, headers in requests
            ]

    return asyncio.run(run())


def _bearer(text):
    return {"authorization": f"Bearer {text}"}


def _paths(app):
    names = {"{model:path}": "m", "{file_id}": "file-0", "{batch_id}": "batch-0"}
    for method, path in whole_app.routes(app):
        for name, value in names.items():
            path = path.replace(name, value)
        yield method, path


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        _bearer(""),
        _bearer("another"),
        _bearer(_KEY[:-1]),
        _bearer(f"{_KEY} {_KEY}"),
        {"authorization": f"Token {_KEY}"},
        {"authorization": "Basic !"},
        {"x-api-key": _KEY},
    ],
)
def test_c8_every_route_but_health_wants_the_key(tmp_path, headers):
    with whole_app.make(tmp_path, [_KEY]) as app:
        paths = [*_paths(app), ("GET", "/not-there"), ("GET", "/health/"), ("GET", "//health")]
        assert len(paths) > 40
        answers = _ask(app, [(method, path, headers) for method, path in paths])
    open_ones = [p for p, answer in zip(paths, answers, strict=True) if answer.status_code != 401]
    assert open_ones == [("GET", "/health")]


def test_c8_with_the_key_no_route_is_shut(tmp_path):
    with whole_app.make(tmp_path, [_KEY]) as app:
        paths = list(_paths(app))
        answers = _ask(app, [(method, path, _bearer(_KEY)) for method, path in paths])
    assert all(answer.status_code not in (401, 403, 500) for answer in answers)


def test_c8_an_empty_bearer_passes_where_there_are_no_keys(tmp_path):
    with whole_app.make(tmp_path) as app:
        asked = [("GET", "/v1/models", {"authorization": value}) for value in ("", "Bearer ")]
        assert [answer.status_code for answer in _ask(app, asked)] == [200, 200]


def test_c8_two_authorization_headers_are_refused(tmp_path):
    headers = [("authorization", f"Bearer {_KEY}"), ("authorization", "Bearer x")]
    with whole_app.make(tmp_path, [_KEY]) as app:
        (answer,) = _ask(app, [("GET", "/v1/models", headers)])
    assert answer.status_code == 400


def test_c8_keys_are_compared_as_digests_in_time_that_tells_nothing():
    made = keys.ApiKeys([_KEY])
    assert _KEY not in repr(vars(made))
    assert all(len(digest) == 32 for digest in made._digests)
    tree = ast.parse(inspect.getsource(keys))
    called = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert {"compare_digest", "sha256"} <= called


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "testserver", "", "127.0.0.1@evil"]
)
def test_c11_a_host_that_the_server_does_not_have_is_refused(tmp_path, host):
    with whole_app.make(tmp_path) as app:
        (answer,) = _ask(app, [("GET", "/v1/models", {"host": host})])
    assert answer.status_code == 403


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:1", "x", "http://[::1"]
)
def test_c11_pages_of_other_origins_may_neither_ask_nor_read(tmp_path, origin):
    preflight = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "content-type,authorization",
    }
    with whole_app.make(tmp_path) as app:
        answers = _ask(
            app,
            [
                ("OPTIONS", "/v1/completions", preflight),
                ("GET", "/v1/models", {"origin": origin}),
                ("POST", "/v1/completions", {"origin": origin, "content-type": "text/plain"}),
            ],
        )
    assert [answer.status_code for answer in answers] == [403, 403, 403]
    for answer in answers:
        assert not any(name.startswith("access-control") for name in answer.headers)


def test_c11_a_page_of_ours_may_ask_and_others_cannot_send_forms(tmp_path):
    with whole_app.make(tmp_path) as app:
        answers = _ask(
            app,
            [
                ("GET", "/v1/models", {"origin": _BASE}),
                ("POST", "/v1/completions", {"content-type": "text/plain"}),
            ],
        )
    assert answers[0].status_code == 200
    assert not any(name.startswith("access-control") for name in answers[0].headers)
    assert answers[1].status_code in (415, 503)


_ROUTER = fastapi.APIRouter()


@_ROUTER.get("/fails")
async def _fails():
    try:
        raise KeyError("the prompt of a client")
    except KeyError as error:
        raise RuntimeError("the prompt of a client again") from error


def test_no_log_repeats_what_a_client_sent_when_the_server_fails(tmp_path, caplog):
    with whole_app.make(tmp_path, [], _ROUTER) as app, caplog.at_level(logging.INFO):
        (answer,) = _ask(app, [("GET", "/fails?secret=1", {})])
    assert answer.status_code == 500
    assert "client" not in answer.text
    ours = [record for record in caplog.records if record.name.startswith("nanoflow_jax")]
    text = "\n".join(map(log.Formatter().format, ours))
    assert "GET /fails failed" in text
    assert "client" not in text
    assert "secret" not in text


def test_polling_of_the_page_is_left_out_of_the_access_log(tmp_path, caplog):
    with whole_app.make(tmp_path, [_KEY]) as app, caplog.at_level(logging.INFO, log.ACCESS.name):
        answers = _ask(
            app,
            [
                ("GET", "/page/stats", _bearer(_KEY)),
                ("GET", "/page/stats", {}),
                ("GET", "/v1/models", _bearer(_KEY)),
            ],
        )
    assert [answer.status_code for answer in answers] == [200, 401, 200]
    lines = [record.getMessage().split() for record in caplog.records]
    assert [line[1:4] for line in lines] == [
        ["GET", "/page/stats", "401"],
        ["GET", "/v1/models", "200"],
    ]
