import json
import pathlib
import signal
import subprocess
import sys

from nanoflow_jax.tokenizer import template_worker

_COMMAND = [sys.executable, "-P", str(pathlib.Path(template_worker.__file__)), str(1 << 30), "1"]


def _request(source: str) -> bytes:
    job = {
        "source": source,
        "variables": {"messages": []},
        "now": "2024-07-26T00:00:00",
        "max_output_chars": 100,
    }
    # So much fuel that only the clock ends anything.
    return json.dumps({"fuel": 2**62, "job": job}).encode() + b"\n"


def test_the_worker_answers_line_by_line_and_ends_with_its_input():
    lines = _request("{{ messages }}\u2028\n\n") + _request("{{ raise_exception('no') }}")
    done = subprocess.run(_COMMAND, input=lines, capture_output=True, check=True)
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        {"ready": True},
        {"text": "[]\u2028\n"},
        {"error": "raised", "message": "no"},
    ]


def test_a_worker_whose_parent_is_gone_does_not_work_for_ever():
    endless = (
        "{% set x = range(99999) | list %}{% for i in range(99999) %}"
        "{% set y = x | sort %}{% endfor %}"
    )
    done = subprocess.run(_COMMAND, input=_request(endless), capture_output=True, check=False)
    assert done.returncode == -signal.SIGALRM
