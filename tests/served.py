"""Starts the server as its users do, for tests that speak HTTP to it."""

import contextlib
import dataclasses
import http.client
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from golden import cases

_ROOT = pathlib.Path(__file__).parents[1]
_START_S = 240.0
_STOP_S = 60.0
_ANSWER_S = 120.0
_JSON = {"content-type": "application/json"}
# A model of a few kB with seven programs; its known answers are those of its golden case.
TINY_CASE = cases.load("llama")
TINY = (
    f"--model={TINY_CASE.path}",
    "--max_requests=4",
    "--dense_batch=24",
    "--buckets=24:4:4",
    "--cache_page_size=8",
)
# Small programs: a server starts in seconds once the test cache holds them.
SMALL = ("--max_requests=4", "--dense_batch=64", "--max_context_len=256")


@dataclasses.dataclass(eq=False, kw_only=True)
class Served:
    """A running server.

    Attributes:
        process: The front; the engine is its child.
        log_path: What it printed.
    """

    process: subprocess.Popen[bytes]
    log_path: pathlib.Path

    @property
    def log(self) -> str:
        """What it has printed so far."""
        return self.log_path.read_text(encoding="utf-8")

    @property
    def url(self) -> str:
        """Its root, once it is bound and ready."""
        found = re.findall(r"^ready: .* at (http://\S+)$", self.log, flags=re.MULTILINE)
        assert found, self.log
        return str(found[0])

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.url.rsplit(":", 1)[1])

    def wait_ready(self) -> None:
        """Waits until it serves."""
        self.wait_said("\nready: ")

    def wait_said(self, text: str) -> None:
        """Waits until it has printed something while it starts."""
        deadline = time.monotonic() + _START_S
        while text not in self.log:
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.05)

    def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Status and JSON of an answer; a POST if there is a body."""
        data = None if body is None else json.dumps(body).encode()
        return self._answer(path, data, {**_JSON, **headers})

    def _answer(self, path: str, data: bytes | None, headers: dict[str, str]) -> tuple[int, Any]:
        request = urllib.request.Request(self.url + path, data=data, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=_ANSWER_S) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    @contextlib.contextmanager
    def streaming(
        self, path: str, body: dict[str, Any], **headers: str
    ) -> Iterator[http.client.HTTPResponse]:
        """An answer in pieces, none of which has been read; leaving hangs up."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_ANSWER_S)
        with contextlib.closing(connection):
            sent = json.dumps({**body, "stream": True})
            connection.request("POST", path, sent, {**_JSON, **headers})
            with connection.getresponse() as answer:
                yield answer

    def events(self, path: str, body: dict[str, Any], **headers: str) -> list[Any]:
        """All pieces of a streamed answer, which must end as it should."""
        with self.streaming(path, body, **headers) as answer:
            assert answer.status == 200, answer.read()
            return read_events(answer)

    def upload(self, rows: Iterable[Any], *, body: bytes | None = None) -> tuple[int, Any]:
        """Sends a file of rows, or of bytes; status and JSON of the answer."""
        data = b"".join(json.dumps(row).encode() + b"\n" for row in rows) if body is None else body
        form = (
            b'--part\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
            b'--part\r\ncontent-disposition: form-data; name="file"; filename="in.jsonl"\r\n\r\n'
            + data
            + b"\r\n--part--\r\n"
        )
        return self._answer(
            "/v1/files", form, {"content-type": "multipart/form-data; boundary=part"}
        )

    def begin_batch(self, rows: Iterable[Any]) -> str:
        """Uploads rows for completions and begins their batch; its id."""
        status, file = self.upload(rows)
        assert status == 200, file
        wanted = {"endpoint": "/v1/completions", "completion_window": "24h"}
        status, batch = self.ask("/v1/batches", {"input_file_id": file["id"], **wanted})
        assert status == 200, batch
        return str(batch["id"])

    def wait_for_batch(
        self, name: str, is_there: Callable[[dict[str, Any]], bool]
    ) -> dict[str, Any]:
        """Waits until a batch is as wanted."""
        return _wait(lambda: dict(self.ask(f"/v1/batches/{name}")[1]), is_there)

    def rows_of(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """The rows of the result files of a batch that ended."""
        assert batch["status"] in ("completed", "cancelled"), batch
        rows = []
        for file_id in filter(None, (batch["output_file_id"], batch["error_file_id"])):
            with urllib.request.urlopen(f"{self.url}/v1/files/{file_id}/content") as answer:
                rows += [json.loads(line) for line in answer.read().splitlines()]
        return rows

    def stats(self) -> dict[str, Any]:
        """The state of the engine, as the page shows it."""
        status, found = self.ask("/page/stats")
        assert status == 200, found
        return dict(found)

    def wait_for(self, is_there: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Waits until `stats` are as wanted."""
        return _wait(self.stats, is_there)

    def wait_idle(self) -> None:
        """Waits until the engine holds nothing."""
        self.wait_for(lambda s: s["pages_used"] == s["running"] == s["waiting"] == 0)

    def engine_pid(self) -> int:
        """The engine's process."""
        front = self.process.pid
        children = pathlib.Path(f"/proc/{front}/task/{front}/children").read_text()
        (found,) = (
            int(pid)
            for pid in children.split()
            if b"engine_process\0" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
        )
        return found

    def stop(self) -> int:
        """Ends it as a supervisor does; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=_STOP_S)


def _wait(
    look: Callable[[], dict[str, Any]], is_there: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    deadline = time.monotonic() + _ANSWER_S
    while not is_there(found := look()):
        assert time.monotonic() < deadline, found
        time.sleep(0.02)
    return found


def read_events(answer: http.client.HTTPResponse) -> list[Any]:
    """What is left of a streamed answer."""
    lines = answer.read().decode().lstrip("\n").split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""], lines[-3:]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


SERVE = ("nanoflow_jax.serve", "--port=0")


def launch(
    folder: pathlib.Path, *flags: str, program: Sequence[str] = SERVE, **environment: str
) -> Served:
    """Starts a server and returns at once.

    Args:
        folder: Of the test: takes the log, and uploaded files unless a flag says otherwise.
        flags: Of the program.
        program: A module, and what comes before the flags: the port is a free one.
        environment: Further variables.
    """
    log_path = folder / "server.log"
    cache = os.environ.get("NANOFLOW_TEST_CACHE", "/tmp/nanoflow-test-cache")
    command = [sys.executable, "-m", *program, f"--data_dir={folder}/data"]
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [*command, f"--compile_cache_dir={cache}", *flags],
            stdout=log,
            stderr=log,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(_ROOT), **environment},
        )
    return Served(process=process, log_path=log_path)


@contextlib.contextmanager
def start(
    folder: pathlib.Path, *flags: str, program: Sequence[str] = SERVE, **environment: str
) -> Iterator[Served]:
    """A server that is ready, and is ended afterwards; see `launch`."""
    served = launch(folder, *flags, program=program, **environment)
    try:
        served.wait_ready()
        yield served
    finally:
        if served.process.poll() is None:
            served.process.terminate()
            try:
                served.process.wait(timeout=_STOP_S)
            except subprocess.TimeoutExpired:
                served.process.kill()
                served.process.wait()
