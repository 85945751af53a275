"""A process that answers lines: that it answers, dies and is late."""

import gc
import os
import pathlib
import signal

import pytest

from nanoflow_jax.line_worker import LineWorker, WorkerDiedError, WorkerLateError

_SCRIPT = """
import json, sys, time
print(json.dumps({"ready": sys.argv[1:]}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if asked == "die":
        sys.exit(3)
    if asked == "sleep":
        time.sleep(1000)
    print(json.dumps({"said": asked}), flush=True)
"""


@pytest.fixture
def worker(tmp_path: pathlib.Path) -> LineWorker:
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    made = LineWorker(script, ["a", "b"])
    assert made.read(seconds=60) == {"ready": ["a", "b"]}
    return made


def test_lines_are_answered_in_turn_however_long(worker):
    for text in ("x", "\u2615\u2028", "y" * 3_000_000):
        line = f'"{text}"\n'.encode()
        assert worker.ask(line, seconds=60) == {"said": text}
    assert worker.is_alive()
    assert worker.command.endswith("script.py a b")


def test_a_worker_that_ends_is_said_to_have_died(worker):
    with pytest.raises(WorkerDiedError):
        worker.ask(b'"die"\n', seconds=60)
    assert worker.wait() == 3
    assert not worker.is_alive()
    with pytest.raises(WorkerDiedError):
        worker.ask(b'"x"\n' * 100_000, seconds=60)


def test_a_worker_that_does_not_answer_is_late(worker):
    with pytest.raises(WorkerLateError):
        worker.ask(b'"sleep"\n', seconds=0.1)
    worker.close()
    assert worker.wait() == -signal.SIGKILL


def test_the_process_ends_with_its_object(worker):
    made = LineWorker(pathlib.Path(worker.command.split()[2]), [])
    pid = made.pid
    del made
    gc.collect()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
