"""The page in a real browser, against a real server that needs a key."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import browser
import pytest
import served

_KEY = "secret-of-the-page"
_QUESTION = "What does textwrap.dedent do?"
# From inside, because a driver would be too late.
_STOP_AT_ONCE = """
new MutationObserver(() => {
  const text = document.querySelector('.running .written')?.textContent;
  if (text) document.querySelector('#stop').click();
}).observe(document.querySelector('#log'), {subtree: true, childList: true, characterData: true});
"""
_ROWS = """
return [...arguments[0].children].map(
  (row) => [...row.children].map((e) => e.textContent).join(' '));
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, driver: Any) -> Iterator[served.Served]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "keys").write_text(f"{_KEY}\n")
    with served.start(folder, *served.SMALL, f"--api_key_file={folder / 'keys'}") as made:
        yield made


@pytest.fixture
def live(driver: Any, server: served.Served) -> Iterator[browser.Page]:
    """The page, opened as by somebody who gives the key when the browser asks for it."""
    found = browser.Page(driver, server.url.replace("://", f"://me:{_KEY}@"))
    found.emulate()
    yield found.open()
    complaints = found.complaints()
    driver.get("about:blank")
    assert complaints == []


def test_without_the_key_the_page_is_refused_and_a_browser_asks_for_it(
    server: served.Served,
) -> None:
    with pytest.raises(urllib.error.HTTPError, match="401") as refused:
        urllib.request.urlopen(f"{server.url}/", timeout=60)
    with refused.value as answer:
        assert answer.headers["www-authenticate"].startswith("Basic ")
        assert "give the key as password, with any user name" in answer.read().decode()


def _ask(server: served.Served, path: str, body: Any = None) -> Any:
    request = urllib.request.Request(
        server.url + path,
        data=None if body is None else json.dumps(body).encode(),
        headers={"content-type": "application/json", "authorization": f"Bearer {_KEY}"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_a_chat_shows_the_answer_of_the_model(live: browser.Page, server: served.Served) -> None:
    live.until(lambda: live.text("#model-name") == "embedded" and live.text("#state") == "ready")
    for name, value in (("temperature", "0"), ("max_tokens", "40")):
        live.find(f"#{name}").clear()
        live.find(f"#{name}").send_keys(value)
    live.say(_QUESTION)
    messages = [{"role": "user", "content": _QUESTION}]
    body = {"messages": messages, "temperature": 0, "max_tokens": 40}
    (choice,) = _ask(server, "/v1/chat/completions", body)["choices"]
    assert live.text(".assistant .written") == choice["message"]["content"]
    assert "first token" in live.text(".figures-line")
    live.find("#show-curl").click()
    command = live.text("#curl-text")
    assert f"'{server.url}/v1/chat/completions'" in command
    assert "Authorization: Bearer $NANOFLOW_API_KEY" in command
    assert _KEY not in command


def test_what_the_server_refuses_is_shown_in_its_words(live: browser.Page) -> None:
    live.choose("completion")
    live.run("document.querySelector('#text').value = 'word '.repeat(400)")
    live.find("#text").send_keys(browser.ENTER)
    live.until(lambda: live.shown("#problem"))
    assert live.text("#problem-text").startswith("400: the prompt has ")


def test_a_stopped_completion_is_seen_in_the_view_of_the_engine(
    live: browser.Page, server: served.Served
) -> None:
    live.choose("completion")
    live.find("#n").send_keys("8")
    live.find("#max_tokens").clear()
    live.run(_STOP_AT_ONCE)
    live.find("#text").send_keys("def main():")

    def is_stopped_in_time() -> bool:
        """The small model may have come to its end before it is told to stop."""
        live.find("#text").send_keys(browser.ENTER)
        live.until(lambda: live.shown("#send"))
        live.until(lambda: _ask(server, "/page/stats")["running"] == 0)
        return bool(_ask(server, "/page/stats")["totals"]["requests"]["abort"])

    live.until(is_stopped_in_time, timeout_s=200)
    assert "stopped by you" in {line.text.split(" · ")[-1] for line in live.all(".figures-line")}
    live.find("#tab-engine").click()
    live.until(lambda: "Requests: aborted 1" in _rows(live, "#totals"))
    live.until(lambda: "Running 0" in _rows(live, "#figures"))
    assert "Pages used 0 %" in _rows(live, "#figures")
    assert {"Model embedded", "Device cpu", "Most requests at once 4"} <= _rows(live, "#settings")


def _rows(live: browser.Page, selector: str) -> set[str]:
    return set(live.run(_ROWS, live.find(selector)))
