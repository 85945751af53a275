import asyncio
import gc
import logging
import sys

from nanoflow_jax.serve import log

_SECRET = "what a client sent"


def _fail():
    try:
        raise KeyError(_SECRET)
    except KeyError as error:
        raise ValueError(_SECRET) from error


def test_an_exception_is_logged_with_its_places_and_without_its_messages():
    try:
        _fail()
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "", 1, "it failed", (), sys.exc_info())
    text = log.Formatter().format(record)
    assert text.index("KeyError") < text.index("ValueError")
    assert "log_test.py" in text and "in _fail" in text
    assert _SECRET not in text


def test_asyncio_says_that_a_task_failed_and_not_with_what(caplog):
    async def lose_a_task():
        task = asyncio.create_task(asyncio.to_thread(_fail))
        await asyncio.wait({task})

    asyncio.run(lose_a_task())
    gc.collect()
    text = "\n".join(map(log.Formatter().format, caplog.records))
    assert "Task exception was never retrieved" in text
    assert "ValueError" in text
    assert _SECRET not in text
