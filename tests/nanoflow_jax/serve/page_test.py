"""The page's playground in a real browser, against the server of `page_server`."""

import json
import pathlib
import re
import subprocess

import browser
import page_server
import pytest


def test_a_chat_streams_keeps_its_turns_and_shows_what_it_cost(page: browser.Page) -> None:
    page.open()
    page.until(lambda: page.text("#model-name") == page_server.MODEL)
    page.find("#system").send_keys("Be brief.")
    page.find("#text").send_keys("hello", browser.SHIFT_ENTER, "you", browser.ENTER)
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


def test_model_output_stays_text(page: browser.Page) -> None:
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


def test_stop_leaves_the_server_and_keeps_what_came(page: browser.Page) -> None:
    page.open()
    page.find("#text").send_keys("slow", browser.ENTER)
    page.until(lambda: page.all(".written") and len(page.text(".written")) > 20)
    page.find("#stop").click()
    assert page.state.gone.wait(60)
    page.until(lambda: "stopped by you" in page.text(".figures-line"))
    assert page.text(".written").startswith("word word word word")
    assert page.shown("#send") and not page.shown("#problem")
    page.say("hello")
    roles = [message["role"] for message in page.state.bodies[1]["messages"]]
    assert roles == ["user", "assistant", "user"]


def test_escape_stops_too_and_enter_sends_only_one_message_at_a_time(page: browser.Page) -> None:
    page.open()
    page.find("#text").send_keys("slow", browser.ENTER)
    page.until(lambda: page.all(".written") and len(page.text(".written")) > 20)
    page.find("#text").send_keys("next", browser.ENTER)
    assert len(page.state.bodies) == 1
    page.find("#text").send_keys(browser.ESCAPE)
    page.until(lambda: "stopped by you" in page.text(".figures-line"))
    assert page.find("#text").get_attribute("value") == "next"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("refuse", f"400: {page_server.REFUSAL}"),
        ("proxy", "502: Bad Gateway"),
    ],
)
def test_a_refused_message_is_explained_and_given_back(
    page: browser.Page, text: str, problem: str
) -> None:
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
def test_an_answer_that_breaks_off_keeps_its_beginning(
    page: browser.Page, text: str, problem: str
) -> None:
    page.open()
    page.say(text)
    assert page.text(".written") == "Hello"
    assert page.text("#problem-text") == problem
    assert "broken off" in page.text(".figures-line")


def test_a_model_without_a_template_is_offered_completion_mode(page: browser.Page) -> None:
    page.state.has_template = False
    page.open()
    page.say("hello")
    assert page.text("#problem-text") == f"400: {page_server.NO_TEMPLATE}"
    page.find("#problem-switch").click()
    assert page.find("#text").get_attribute("value") == "hello"
    page.say("hello")
    assert page.state.bodies[-1]["prompt"] == "hello"
    assert page.text(".given") == "hello" and page.text(".written") == "Hello there."


def test_parameters_and_choices_reach_the_server(page: browser.Page) -> None:
    page.open()
    page.until(lambda: page.text("#model-name"))
    page.choose("completion")
    given = {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "max_tokens": 64, "seed": 7, "n": 2}
    for name, value in given.items():
        page.find(f"#{name}").clear()
        page.find(f"#{name}").send_keys(str(value))
    page.find("#stop-strings").send_keys("END", browser.ENTER, r"\n\n", browser.ENTER, r"\\n")
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


def test_a_wrong_parameter_is_not_sent(page: browser.Page) -> None:
    page.open()
    page.find("#temperature").send_keys("9")
    page.find("#text").send_keys("hello", browser.ENTER)
    page.find("#show-curl").click()
    assert page.state.bodies == [] and not page.shown("#curl")
    assert page.run("return document.activeElement.id") == "temperature"


def test_the_curl_command_sends_the_same_body_with_the_key_of_a_variable(
    page: browser.Page, tmp_path: pathlib.Path
) -> None:
    page.state.needs_key = True
    page.open()
    page.until(lambda: page.text("#model-name") and page.text("#state") == "ready")
    text = "it's $HOME `date` \"quoted\" \\ \\n ! 'twice' \u00e9 \U0001f642\n\tend\u2028'"
    page.run("document.querySelector('#text').value = arguments[0]", text)
    page.find("#show-curl").click()
    command = page.text("#curl-text")
    assert page.shown("#curl-note")
    page.find("#curl-close").click()
    page.find("#text").send_keys(browser.ENTER)
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


def test_events_are_found_wherever_the_bytes_are_cut(page: browser.Page) -> None:
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
