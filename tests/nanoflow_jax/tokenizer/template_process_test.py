"""Limits of a rendering, and the life of the process that renders."""

import dataclasses
import os
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from nanoflow_jax.tokenizer.chat_template import ChatTemplate
from nanoflow_jax.tokenizer.template_process import RenderLimits

_HELLO = [{"role": "user", "content": "Hello"}]
_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
)
_SMALL = RenderLimits(max_output_chars=100_000, memory_bytes=1 << 28, seconds=1.0)
_NO_FUEL_LIMIT = dataclasses.replace(_SMALL, fuel=2**62)
_DOUBLED = (
    "{% set ns = namespace(s='0123456789') %}{% for i in range(60) %}"
    "{% set ns.s = ns.s ~ ns.s %}{% endfor %}"
)
_WIDE = "{{ '%99999999999s' | format('a') }}"
_SORTED = (
    "{% set x = range(99999) | list %}{% for i in range(10000) %}{% set y = x | sort %}{% endfor %}"
)


def _render(messages):
    template = ChatTemplate({"default": _CHATML}, special_tokens={})
    try:
        return template.render(messages)
    finally:
        template.close()


def _check_ends_soon(source, message, limits):
    template = ChatTemplate(
        {"default": _CHATML, "tool_use": source}, special_tokens={}, limits=limits
    )
    expected = template.render(_HELLO)
    begin = time.monotonic()
    with pytest.raises(ValueError, match=message):
        template.render(_HELLO, tools=[])
    assert time.monotonic() - begin < 30
    assert template.render(_HELLO) == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            r"runs for more than 102\d{4} instructions: shorten the conversation",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion limit"),
        ("{{ 'x' * 100001 }}", "produces 100001 characters, more than 100000"),
    ],
)
def test_c4_a_bomb_ends_soon_and_the_next_rendering_works(source, message):
    _check_ends_soon(source, message, _SMALL)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (_DOUBLED, "needs more than 268435456 bytes of memory, or crashes|runs for more than 1 s"),
        (_WIDE, "needs more than 268435456 bytes"),
        (_SORTED, "runs for more than 1 s"),
    ],
)
def test_what_fuel_does_not_count_ends_at_the_limits_of_the_process(source, message):
    _check_ends_soon(source, message, _NO_FUEL_LIMIT)


@pytest.mark.parametrize("source", [_DOUBLED, _WIDE, _SORTED])
def test_a_bomb_of_few_instructions_ends_whatever_minijinja_counts(source):
    _check_ends_soon(source, "instructions|bytes of memory, or crashes|more than 1 s", _SMALL)


def test_a_long_honest_conversation_stays_inside_the_limits():
    messages = [{"role": "user", "content": "word " * 200}] * 2000
    assert len(_render(messages)) > 2_000_000


def test_one_long_honest_message_stays_inside_the_limits():
    assert len(_render([{"role": "user", "content": "word " * 2_000_000}])) > 10_000_000


def test_a_worker_that_was_killed_is_replaced():
    template = ChatTemplate({"default": _CHATML}, special_tokens={})
    expected = template.render(_HELLO)
    worker = template._process._worker
    assert worker is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    assert template.render(_HELLO) == expected


def test_threads_take_turns():
    template = ChatTemplate({"default": "{{ messages[0].content }}"}, special_tokens={})
    texts = [str(i) * 1000 for i in range(200)]
    with ThreadPoolExecutor(4) as pool:
        rendered = pool.map(lambda t: template.render([{"role": "user", "content": t}]), texts)
        assert list(rendered) == texts


def test_the_worker_ends_with_its_template():
    template = ChatTemplate({"default": _CHATML}, special_tokens={})
    template.render(_HELLO)
    assert template._process._worker is not None
    process = template._process._worker._process
    del template
    assert process.poll() is not None


def test_a_worker_that_cannot_start_is_reported(monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(ValueError, match=r"does not start \(exit code 1\); see what .* prints"):
        _render(_HELLO)
