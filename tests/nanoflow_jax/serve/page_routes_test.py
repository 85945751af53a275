import http.client
import importlib.resources
import re
from collections.abc import Iterator
from urllib import parse

import page_server
import pytest

from nanoflow_jax.serve import page_routes

_FOLDER = importlib.resources.files("nanoflow_jax.serve").joinpath("page")
_FILES = sorted(file.name for file in _FOLDER.iterdir())
_PATHS = sorted(page_routes.PAGE_PATHS)
_TYPES = {
    "/": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with page_server.run_server(page_server.FakeState()) as found:
        yield parse.urlsplit(found).netloc


def _ask(
    address: str, path: str, method: str = "GET", **headers: str
) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection(address, timeout=10)
    try:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return response, response.read()
    finally:
        connection.close()


def test_every_file_of_the_page_has_a_route() -> None:
    served = {path.removeprefix("/page/") for path in _PATHS if path != "/"} | {"index.html"}
    assert served == set(_FILES)


@pytest.mark.parametrize("path", _PATHS)
def test_a_file_is_sent_with_its_type_and_guards(address: str, path: str) -> None:
    response, data = _ask(address, path)
    assert response.status == 200
    name = path.removeprefix("/page/") if path != "/" else "index.html"
    assert data == _FOLDER.joinpath(name).read_bytes()
    assert response.headers["content-type"] == _TYPES[path[path.rfind(".") :]]
    for header, value in page_routes.PAGE_HEADERS.items():
        assert response.headers[header] == value
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["x-frame-options"] == "DENY"
    assert response.headers["referrer-policy"] == "no-referrer"


def test_a_file_that_did_not_change_is_not_sent_again(address: str) -> None:
    first, _ = _ask(address, "/page/page.js")
    tag = first.headers["etag"]
    for header in (tag, f"W/{tag}", f'"other", {tag}'):
        again, data = _ask(address, "/page/page.js", **{"If-None-Match": header})
        assert (again.status, data) == (304, b"")
        assert again.headers["etag"] == tag
    changed, data = _ask(address, "/page/page.js", **{"If-None-Match": '"other"'})
    assert changed.status == 200 and data


def test_head_has_the_headers_alone(address: str) -> None:
    response, data = _ask(address, "/", method="HEAD")
    assert response.status == 200 and data == b""
    assert response.headers["content-length"] == str(
        len(_FOLDER.joinpath("index.html").read_bytes())
    )


def test_nothing_beside_the_files_is_served(address: str) -> None:
    for path in ("/page/../page_routes.py", "/page/%2e%2e/page_routes.py", "/page/", "/page/x.js"):
        response, _ = _ask(address, path, Authorization="Bearer secret")
        assert response.status == 404, path


def test_the_page_is_not_in_the_schema() -> None:
    schema = page_server.make_app(page_server.FakeState()).openapi()
    assert not set(schema["paths"]) & page_routes.PAGE_PATHS


def test_the_policy_allows_nothing_inline_and_nothing_from_elsewhere() -> None:
    rules = dict(
        part.split(" ", 1)
        for part in page_routes.PAGE_HEADERS["Content-Security-Policy"].split("; ")
    )
    assert rules["default-src"] == "'self'"
    assert rules["frame-ancestors"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["require-trusted-types-for"] == "'script'"
    assert not re.search(r"unsafe|https?:|data:|\*", " ".join(rules.values()))


@pytest.mark.parametrize("name", _FILES)
def test_no_file_speaks_to_another_host_or_parses_text_as_html(name: str) -> None:
    text = _FOLDER.joinpath(name).read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|//[a-z0-9-]+\.[a-z]{2,}|@import|\b(?<![\w])url\((?!#)", text)
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function"
        r"|DOMParser|setHTML|srcdoc|localStorage|document\.cookie",
        text,
    )


def test_the_html_has_no_inline_script_style_or_handler() -> None:
    text = _FOLDER.joinpath("index.html").read_text("utf-8")
    assert re.findall(r"<script[^>]*>(.*?)</script>", text, re.DOTALL) == [""]
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", text)
