"""The page in a real browser, against the server of `page_server`."""

import json
import pathlib
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import page_server
import pytest

_CHROMIUM, _DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if not (_CHROMIUM and _DRIVER):
    pytest.skip("needs chromium and chromedriver on the path", allow_module_level=True)
webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")

_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync "
    "--disable-dev-shm-usage --force-prefers-reduced-motion --window-size=1280,900"
)
_ENTER = "\ue007"
_SHIFT_ENTER = "\ue008\ue007\ue008"


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = _CHROMIUM
    for flag in _FLAGS.split():
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('browser')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=_DRIVER)
    found = webdriver.Chrome(options=options, service=service)
    try:
        yield found
    finally:
        found.quit()


class Page:
    """What a person does with the page, and what a test looks at."""

    def __init__(self, driver: Any, address: str, state: page_server.FakeState) -> None:
        self.driver = driver
        self.address = address
        self.state = state

    def open(self, view: str = "") -> "Page":
        self.driver.get(f"{self.address}/{view}")
        self.until(lambda: self.text("#state") not in ("", "connecting"))
        return self

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def text(self, selector: str) -> str:
        return str(self.run("return document.querySelector(arguments[0]).textContent", selector))

    def shown(self, selector: str) -> bool:
        return bool(self.find(selector).is_displayed())

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def run_async(self, script: str, *arguments: Any) -> Any:
        """The result of an async function's body; modules are found under /page/."""
        return self.driver.execute_async_script(
            f"const done = arguments[arguments.length - 1]; (async (...given) => {{ {script} }})"
            "(...[...arguments].slice(0, -1)).then(done, (e) => done(`failed: ${e}`));",
            *arguments,
        )

    def until(self, holds: Callable[[], Any], timeout_s: float = 15) -> None:
        end = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < end, "what the test waits for did not come"
            time.sleep(0.02)

    def say(self, text: str) -> None:
        """Sends, and waits for the end of the answer."""
        self.find("#text").clear()
        self.find("#text").send_keys(text, _ENTER)
        self.until(lambda: self.find("#send").is_displayed())

    def choose(self, mode: str) -> None:
        self.run("document.querySelector(`input[value=${arguments[0]}]`).click()", mode)

    def emulate(self, *, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
        )
        self.driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia",
            {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
        )


@pytest.fixture
def page(driver: Any) -> Iterator[Page]:
    state = page_server.FakeState()
    with page_server.run_server(state) as address:
        found = Page(driver, address, state)
        found.emulate()
        yield found
        complaints = [
            entry
            for entry in driver.get_log("browser")
            if entry["level"] in ("SEVERE", "WARNING") and entry["source"] != "network"
        ]
        driver.get("about:blank")
    assert complaints == []


def test_a_chat_streams_keeps_its_turns_and_shows_what_it_cost(page: Page) -> None:
    page.open()
    page.until(lambda: page.text("#model-name") == page_server.MODEL)
    page.find("#system").send_keys("Be brief.")
    page.find("#text").send_keys("hello", _SHIFT_ENTER, "you", _ENTER)
    page.until(lambda: page.all(".figures-line") and "finish" in page.text(".figures-line"))
    assert page.text(".assistant .written") == "Hello there."
    assert page.find("#text").get_attribute("value") == ""
    assert re.fullmatch(
        r"2 tokens · (?:[\d.,]+ tokens/s · )?first token [\d.]+ m?s · "
        r"prompt 34 tokens \(12 cached\) · finish: stop",
        page.text(".figures-line"),
    )
    page.say("and the pages?")
    words = len(page_server.PROSE.split(" "))
    assert re.match(rf"{words} tokens · [\d.,]+ tokens/s · ", page.all(".figures-line")[1].text)
    assert page.state.bodies[1] == {
        "model": page_server.MODEL,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "hello\nyou"},
            {"role": "assistant", "content": "Hello there."},
            {"role": "user", "content": "and the pages?"},
        ],
        "max_tokens": 256,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    page.find("#clear").click()
    assert page.all(".message") == []


def test_model_output_stays_text(page: Page) -> None:
    page.open()
    title = page.driver.title
    page.say("hostile")
    assert page.text(".assistant .written") == page_server.HOSTILE
    assert page.all("#log script, #log img") == []
    assert page.driver.title == title
    # Trusted types: even a script that tried to could not turn text into elements.
    error = page.run("try { document.body.innerHTML = '<b>' } catch (e) { return e.name }")
    assert error == "TypeError"
    page.driver.get_log("browser")  # The browser reports that attempt.


def test_stop_leaves_the_server_and_keeps_what_came(page: Page) -> None:
    page.open()
    page.find("#text").send_keys("slow", _ENTER)
    page.until(lambda: page.all(".written") and len(page.text(".written")) > 20)
    page.find("#stop").click()
    assert page.state.gone.wait(5)
    page.until(lambda: "stopped by you" in page.text(".figures-line"))
    assert page.text(".written").startswith("word word word word")
    assert page.shown("#send") and not page.shown("#problem")
    page.say("hello")
    roles = [message["role"] for message in page.state.bodies[1]["messages"]]
    assert roles == ["user", "assistant", "user"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("refuse", f"400: {page_server.REFUSAL}"),
        ("proxy", "502: Bad Gateway"),
    ],
)
def test_a_refused_message_is_explained_and_given_back(page: Page, text: str, problem: str) -> None:
    page.open()
    page.say(text)
    assert page.text("#problem-text") == problem
    assert page.find("#text").get_attribute("value") == text
    assert page.all(".message") == []
    page.say("hello")
    assert not page.shown("#problem")
    assert len(page.state.bodies[1]["messages"]) == 1


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("break hello", "the engine stopped"),
        ("cut hello", "The connection ended before the answer did."),
    ],
)
def test_an_answer_that_breaks_off_keeps_its_beginning(page: Page, text: str, problem: str) -> None:
    page.open()
    page.say(text)
    assert page.text(".written") == "Hello"
    assert page.text("#problem-text") == problem
    assert "broken off" in page.text(".figures-line")


def test_a_model_without_a_template_is_offered_completion_mode(page: Page) -> None:
    page.state.has_template = False
    page.open()
    page.say("hello")
    assert page.text("#problem-text") == f"400: {page_server.NO_TEMPLATE}"
    page.find("#problem-switch").click()
    assert page.find("#text").get_attribute("value") == "hello"
    page.say("hello")
    assert page.state.bodies[-1]["prompt"] == "hello"
    assert page.text(".given") == "hello" and page.text(".written") == "Hello there."


def test_parameters_and_choices_reach_the_server(page: Page) -> None:
    page.open()
    page.until(lambda: page.text("#model-name"))
    page.choose("completion")
    given = {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "max_tokens": 64, "seed": 7, "n": 2}
    for name, value in given.items():
        page.find(f"#{name}").clear()
        page.find(f"#{name}").send_keys(str(value))
    page.find("#stop-strings").send_keys("END", _ENTER, r"\n\n", _ENTER, r"\\n")
    page.say("code")
    assert page.state.bodies == [
        {
            "model": page_server.MODEL,
            "prompt": "code",
            **given,
            "stop": ["END", "\n\n", r"\n"],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]
    assert [title.text for title in page.all("h4")] == ["Choice 1", "Choice 2"]
    assert len({entry.text for entry in page.all(".written")}) == 1
    page.find(".choice:last-child button:last-child").click()
    assert page.find("#text").get_attribute("value").startswith("code\n    if n < 2:")


def test_a_wrong_parameter_is_not_sent(page: Page) -> None:
    page.open()
    page.find("#temperature").send_keys("9")
    page.find("#text").send_keys("hello", _ENTER)
    page.find("#show-curl").click()
    assert page.state.bodies == [] and not page.shown("#curl")
    assert page.run("return document.activeElement.id") == "temperature"


def test_the_curl_command_sends_the_same_body_and_hides_the_key(
    page: Page, tmp_path: pathlib.Path
) -> None:
    page.state.key = "sk-secret"
    page.open()
    page.find("#key").send_keys("sk-secret", _ENTER)
    page.until(lambda: page.text("#model-name"))
    text = "it's $HOME `date` \"quoted\" \\ \\n ! 'twice' \u00e9 \U0001f642\n\tend\u2028'"
    page.run("document.querySelector('#text').value = arguments[0]", text)
    page.find("#show-curl").click()
    command = page.text("#curl-text")
    assert "sk-secret" not in command and page.shown("#curl-note")
    page.find("#curl-close").click()
    page.find("#text").send_keys(_ENTER)
    page.until(lambda: page.state.bodies)
    # A curl that shows what the shell gave it.
    (tmp_path / "curl").write_text('#!/bin/sh\nprintf "%s\\0" "$@"\n')
    (tmp_path / "curl").chmod(0o755)
    done = subprocess.run(
        ["sh", "-c", command],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "NANOFLOW_API_KEY": "sk-secret", "HOME": "/"},
        capture_output=True,
        check=True,
    )
    *flags, body = done.stdout.decode().split("\0")[:-1]
    assert flags == [
        "-N",
        f"{page.address}/v1/chat/completions",
        "-H",
        "Content-Type: application/json",
        "-H",
        "Authorization: Bearer sk-secret",
        "-d",
    ]
    assert json.loads(body) == page.state.bodies[0]
    assert page.state.bodies[0]["messages"][0]["content"] == text


def test_a_server_with_a_key_asks_for_it_and_the_tab_alone_keeps_it(page: Page) -> None:
    page.state.key = "sk-secret"
    page.open()
    page.until(lambda: page.shown("#key-panel"))
    assert page.text("#state") == "key needed"
    asked = page.state.stats_asked
    page.find("#key").send_keys("not a key", _ENTER)
    assert (
        page.find("#key").get_property("validationMessage").startswith("An API key has no spaces")
    )
    page.find("#key").clear()
    page.find("#key").send_keys("sk-secret", _ENTER)
    page.until(lambda: page.text("#state") == "ready" and page.text("#model-name"))
    assert not page.shown("#key-panel") and page.state.stats_asked > asked
    page.say("hello")
    assert page.state.keys == ["Bearer sk-secret"]
    assert page.run("return [localStorage.length, document.cookie]") == [0, ""]
    assert page.run("return {...sessionStorage}") == {"nanoflow_api_key": "sk-secret"}
    assert "sk-secret" not in page.driver.current_url


def _counting(asked: int) -> dict[str, Any]:
    """Every poll a second later: 50 tokens out, 200 in, 10 steps."""
    stats = page_server.MovingEngine().stats()
    totals = {
        **stats["totals"],
        "prompt_tokens": 200 * asked,
        "generation_tokens": 50 * asked,
        "steps": 10 * asked,
        "step_decode_tokens": 50 * asked,
        "step_prefill_tokens": 200 * asked,
    }
    moments = {"now_s": float(asked), "uptime_s": 3600.0 + asked}
    return {**stats, **moments, "totals": totals, "running": 5, "waiting": 3, "pages_used": 512}


def test_the_engine_view_shows_rates_and_settings(page: Page) -> None:
    page.state.stats = _counting
    page.open("#engine")
    assert page.shown("#view-engine") and not page.shown("#view-playground")
    page.until(lambda: page.state.stats_asked >= 3)
    figures = page.find("#figures").text.split("\n")
    assert {"50", "200", "5", "3", "25 %", "1 h 00 min"} <= set(figures)
    assert page.find("#chart-tokens svg").get_attribute("aria-label") == (
        "in 200 tokens a second, out 50 tokens a second"
    )
    assert page.find("#chart-batch svg").get_attribute("aria-label") == (
        "decode 5 tokens a step, prefill 20 tokens a step"
    )
    assert "dense batch 512" in page.text("#chart-batch")
    assert len(page.all("#chart-tokens path.line")) == 2
    rows = [row.text.split() for row in page.all("#latency tbody tr")]
    assert rows[0] == "Time to first token 82 ms 310 ms 940 ms 1,204".split()
    assert "cpu (2 cores)" in page.text("#settings")
    assert not page.shown("#operations-card")


def test_a_timeline_appears_with_the_operations(page: Page) -> None:
    page.state.engine.operations = page_server.OPERATIONS
    page.state.engine.late_compiles = 3
    page.open("#engine")
    page.until(lambda: page.shown("#operations-card"))
    assert len(page.all("#operations .operation")) == len(page_server.OPERATIONS)
    assert page.find("#operations svg").get_attribute("aria-label") == (
        "10 operations in 3 lanes over 1.6 ms"
    )
    assert "Late compiles" in page.text("#totals .bad")


def test_an_engine_without_samples_shows_dashes(page: Page) -> None:
    nothing = {"p50": None, "p90": None, "p99": None, "count": 0}
    latency = dict.fromkeys(("ttft_s", "tpot_s", "e2e_s"), nothing)
    page.state.stats = lambda asked: {**_counting(asked), "latency": latency}
    page.open("#engine")
    assert page.find("#latency tbody tr").text.split()[-4:] == [*["\u2013"] * 3, "0"]


def test_a_page_that_is_not_seen_does_not_ask(page: Page) -> None:
    page.open("#engine")
    hide = (
        "Object.defineProperty(document, 'hidden', {get: () => arguments[0], configurable: true});"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )
    page.run(hide, True)
    time.sleep(0.3)  # An answer may be on its way.
    asked = page.state.stats_asked
    time.sleep(1.5)
    assert page.state.stats_asked == asked
    page.run(hide, False)
    page.until(lambda: page.state.stats_asked > asked, timeout_s=5)


def test_a_server_that_goes_away_is_reported(page: Page) -> None:
    page.open("#engine")
    page.driver.execute_cdp_cmd("Network.enable", {})
    offline = {"offline": True, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    page.until(lambda: page.shown("#engine-problem"))
    assert page.text("#engine-problem").endswith("The server cannot be reached.")
    page.until(lambda: page.text("#state") == "unreachable")
    online = {**offline, "offline": False}
    page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", online)
    page.until(lambda: page.text("#state") == "ready")
    assert not page.shown("#engine-problem")


def test_rates_are_unknown_after_a_restart_and_after_a_sleep(page: Page) -> None:
    page.open()
    moments = [(0, 0, 0), (1, 1, 40), (2, 2, 100), (3, 0.5, 10), (4, 1.5, 30), (40, 37.5, 900)]
    polls = []
    for now, uptime, tokens in moments:
        stats = _counting(1)
        totals = {**stats["totals"], "generation_tokens": tokens, "steps": 0}
        polls.append({**stats, "now_s": now, "uptime_s": uptime, "totals": totals})
    found = page.run_async(
        "const { History } = await import('/page/rates.js'); const history = new History();"
        "return given[0].map((stats) => history.add(stats, stats.now_s).out)",
        polls,
    )
    assert found == [None, 40, 60, None, 20, None]


def test_events_are_found_wherever_the_bytes_are_cut(page: Page) -> None:
    page.open()
    text = (
        "\ufeffdata: a\u00e9\U0001f642\r\n: note\r\n\r\n"
        "data:b\ndata: c\nid: 1\n\n\n\ndata: d\r\rdata: lost\n"
    )
    found = page.run_async(
        """
        const { eventData } = await import('/page/api.js');
        const bytes = new TextEncoder().encode(given[0]);
        const results = new Set();
        for (let cut = 0; cut <= bytes.length; cut++) {
          const pieces = [bytes.slice(0, cut), bytes.slice(cut)];
          const stream = new ReadableStream({
            pull(c) { pieces.length ? c.enqueue(pieces.shift()) : c.close(); },
          });
          const events = [];
          for await (const data of eventData(stream)) events.push(data);
          results.add(JSON.stringify(events));
        }
        return [...results];
        """,
        text,
    )
    assert [json.loads(events) for events in found] == [["a\u00e9\U0001f642", "b\nc", "d"]]


@pytest.mark.parametrize("view", ["#playground", "#engine"])
def test_a_phone_shows_everything_without_scrolling_sideways(page: Page, view: str) -> None:
    page.state.engine.operations = page_server.OPERATIONS
    page.emulate(width=360, height=740)
    page.open(view)
    if view == "#playground":
        assert page.find("#parameters").get_attribute("open") is None
        page.say("pages" + "x" * 300)
        page.run("scrollTo(0, 0)")
        page.find("summary").click()
    else:
        page.until(lambda: page.state.stats_asked >= 2)
    wide = page.run("return document.documentElement.scrollWidth")
    assert wide == 360
    for control in page.all("button, input:not([type=radio]), select, textarea"):
        if control.is_displayed():
            assert control.rect["height"] >= 38, control.get_attribute("id")


def test_every_control_has_a_name(page: Page) -> None:
    page.open()
    page.say("hello")
    page.find("#key-button").click()
    controls = [c for c in page.all("button, input, select, textarea, a") if c.is_displayed()]
    assert len(controls) > 15
    assert [c.get_attribute("id") for c in controls if not c.accessible_name] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_read(page: Page, scheme: str) -> None:
    page.emulate(scheme=scheme)
    page.open()

    def light(name: str) -> float:
        value = page.run(
            "return getComputedStyle(document.documentElement).getPropertyValue(arguments[0])", name
        )
        parts = [int(value[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: str, other: str) -> float:
        low, high = sorted((light(one), light(other)))
        return (high + 0.05) / (low + 0.05)

    # Source: WCAG 2.2, 1.4.3 (text) and 1.4.11 (edges of controls, lines of charts).
    for ground in ("--ground", "--card", "--tint"):
        for ink in ("--ink", "--soft"):
            assert contrast(ink, ground) >= 4.5, (ink, ground)
        assert contrast("--edge", ground) >= 3, ground
    for colour in ("--out", "--in", "--running", "--waiting"):
        assert contrast(colour, "--card") >= 4.5, colour
        assert contrast(colour, "--ground") >= 4.5, colour
    assert contrast("--on-accent", "--accent") >= 4.5
    assert contrast("--bad", "--bad-ground") >= 4.5


def test_views_are_kept_in_the_address(page: Page) -> None:
    page.open()
    page.find("#tab-engine").click()
    assert page.driver.current_url.endswith("#engine") and page.shown("#view-engine")
    assert page.find("#tab-engine").get_attribute("aria-current") == "page"
    page.driver.back()
    page.until(lambda: page.shown("#view-playground"))
    page.find("#text").send_keys("still here")
    assert page.driver.title == "Playground · nanoflow_jax"
