"""The page's view of the engine, and how the page looks, in a real browser."""

import time
from typing import Any

import browser
import page_server
import pytest


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


def test_the_engine_view_shows_rates_and_settings(page: browser.Page) -> None:
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


def test_a_timeline_appears_with_the_operations(page: browser.Page) -> None:
    page.state.engine.operations = page_server.OPERATIONS
    page.state.engine.late_compiles = 3
    page.open("#engine")
    page.until(lambda: page.shown("#operations-card"))
    assert len(page.all("#operations .operation")) == len(page_server.OPERATIONS)
    assert page.find("#operations svg").get_attribute("aria-label") == (
        "10 operations in 3 lanes over 1.6 ms"
    )
    assert "Late compiles" in page.text("#totals .bad")


def test_an_engine_that_starts_has_no_capacity_yet(page: browser.Page) -> None:
    page.state.stats = lambda asked: {
        **_counting(asked),
        "status": "starting",
        "settings": {},
        "pages_total": 0,
    }
    page.open("#engine")
    page.until(lambda: page.text("#state") == "starting")
    assert page.all(".limit") == []
    assert "NaN" not in page.find("#view-engine").get_attribute("innerHTML")


def test_an_engine_without_samples_shows_dashes(page: browser.Page) -> None:
    nothing = {"p50": None, "p90": None, "p99": None, "count": 0}
    latency = dict.fromkeys(("ttft_s", "tpot_s", "e2e_s"), nothing)
    page.state.stats = lambda asked: {**_counting(asked), "latency": latency}
    page.open("#engine")
    assert page.find("#latency tbody tr").text.split()[-4:] == [*["\u2013"] * 3, "0"]


def test_a_page_that_is_not_seen_does_not_ask(page: browser.Page) -> None:
    page.open("#engine")
    hide = (
        "Object.defineProperty(document, 'hidden', {get: () => arguments[0], configurable: true});"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )
    page.run(hide, True)

    def asks_no_more() -> bool:
        before = page.state.stats_asked
        time.sleep(2)  # Twice as long as between two questions.
        return page.state.stats_asked == before

    page.until(asks_no_more)
    asked = page.state.stats_asked
    page.run(hide, False)
    page.until(lambda: page.state.stats_asked > asked)


def test_a_server_that_goes_away_is_reported(page: browser.Page) -> None:
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


def test_rates_are_unknown_after_a_restart_and_after_a_sleep(page: browser.Page) -> None:
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


@pytest.mark.parametrize("view", ["#playground", "#engine"])
def test_a_phone_shows_everything_without_scrolling_sideways(page: browser.Page, view: str) -> None:
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


def test_every_control_has_a_name(page: browser.Page) -> None:
    page.open()
    page.say("hello")
    controls = [c for c in page.all("button, input, select, textarea, a") if c.is_displayed()]
    assert len(controls) > 15
    assert [c.get_attribute("id") for c in controls if not c.accessible_name] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_read(page: browser.Page, scheme: str) -> None:
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


def test_views_are_kept_in_the_address(page: browser.Page) -> None:
    page.open()
    page.find("#tab-engine").click()
    assert page.driver.current_url.endswith("#engine") and page.shown("#view-engine")
    assert page.find("#tab-engine").get_attribute("aria-current") == "page"
    page.driver.back()
    page.until(lambda: page.shown("#view-playground"))
    page.find("#text").send_keys("still here")
    assert page.driver.title == "Playground · nanoflow_jax"
