"""Renders chat templates in a process of its own, which may die without harm to the engine.

A template comes with a model and is not to be trusted. Fuel ends its loops, but what one
instruction does is counted roughly at best, and by minijinja before 3.1 not at all: doubling a
string forty times, or sorting a long list, can cost a few drops and all the memory or hours. So
the process that renders has a memory limit, its parent has a clock, and this file is started as a
plain script that imports the template engine and nothing else of ours.

One JSON object per line comes in, one goes out. The first line out says that the worker is ready.
"""

import datetime
import functools
import json
import re
import resource
import signal
import sys
from collections.abc import Mapping
from typing import Any, BinaryIO

import minijinja

_NAME = "chat template"
_GENERATION = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")


def main(read: BinaryIO, write: BinaryIO, *, alarm_s: int) -> None:
    """Answer requests until the input ends.

    Args:
        read: Requests.
        write: Answers.
        alarm_s: The system ends this process when one rendering takes longer; the parent's own
            clock is shorter, but the parent may be gone.
    """
    _send(write, {"ready": True})
    for line in read:
        request = json.loads(line)
        signal.alarm(alarm_s)
        try:
            answer: dict[str, Any] = {"text": render(**request["job"], fuel=request["fuel"])}
        except minijinja.TemplateError as error:
            kind = "fuel" if error.kind == "OutOfFuel" else "template"
            answer = {"error": kind, "message": error.message}
        except MemoryError:
            answer = {"error": "memory"}
        except (ValueError, TypeError, ArithmeticError) as error:
            kind = error.kind if isinstance(error, _StopError) else "template"
            answer = {"error": kind, "message": str(error)}
        signal.alarm(0)
        _send(write, answer)


def render(
    source: str, *, variables: Mapping[str, Any], now: str, fuel: int, max_output_chars: int
) -> str:
    """Render one template as transformers would.

    Args:
        source: The template.
        variables: What the template sees, plain JSON values.
        now: Local time in ISO format, for strftime_now.
        fuel: Instructions the template may run.
        max_output_chars: Longest text it may produce.

    Raises:
        minijinja.TemplateError: The template is wrong, or the fuel ran out.
        ValueError: The template called raise_exception, or the text is too long.
    """
    environment = _environment(source)
    environment.fuel = fuel
    strftime_now = datetime.datetime.fromisoformat(now).strftime
    text = environment.render_template(_NAME, strftime_now=strftime_now, **variables)
    if len(text) > max_output_chars:
        raise _StopError("output", f"{len(text)} characters")
    return text


@functools.lru_cache(maxsize=8)
def _environment(source: str) -> minijinja.Environment:
    environment = minijinja.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.auto_escape_callback = lambda name: False
    environment.remove_global("debug")
    environment.add_filter("tojson", _tojson)
    environment.add_filter("length", _length)
    environment.add_filter("count", _length)
    environment.add_test("sequence", _is_sequence)
    environment.add_global("raise_exception", _raise_exception)
    # {% generation %} marks the assistant's tokens for training: a scope of its own, no more.
    source = _GENERATION.sub(lambda m: f"{m[1]}{m[2] or ''}with{m[3]}", source)
    environment.add_template(_NAME, source)
    return environment


class _StopError(ValueError):
    """Ends a rendering for a reason that has a name."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def _raise_exception(message: object) -> None:
    raise _StopError("raised", str(message))


def _length(value: Any) -> int:
    # Jinja counts what is not there as 0; minijinja fails. It comes to us as None.
    return 0 if value is None else len(value)


def _is_sequence(value: Any) -> bool:
    # For Jinja text and objects are sequences too.
    return isinstance(value, list | tuple | str | Mapping)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # transformers' filter, not Jinja's: no HTML escapes, spaces after the separators.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _send(write: BinaryIO, answer: Mapping[str, Any]) -> None:
    write.write(json.dumps(answer).encode() + b"\n")
    write.flush()


if __name__ == "__main__":
    _limit = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (_limit, _limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main(sys.stdin.buffer, sys.stdout.buffer, alarm_s=int(sys.argv[2]))
