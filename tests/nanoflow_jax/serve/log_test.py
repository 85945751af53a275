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
