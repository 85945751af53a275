"""Signals, kill -9 and a full disk: what was promised is kept, and each row is there once."""

import collections
import pathlib
import resource
import signal
from typing import Any

import batch_runs
import pytest
import served

# Far longer than it takes to send a signal.
_LONG = {"prompt": [5, 9], "max_tokens": 200, "ignore_eos": True, "temperature": 0, "n": 128}


def _rows(count: int, **body: Any) -> list[dict[str, Any]]:
    return [
        batch_runs.batch_row(str(i), prompt=[5, 9 + i % 99], max_tokens=40, ignore_eos=True, **body)
        for i in range(count)
    ]


def _check_each_once(rows: list[dict[str, Any]], count: int) -> None:
    counts = collections.Counter(row["custom_id"] for row in rows)
    assert counts == {str(i): 1 for i in range(count)}
    assert all(row["error"] is None for row in rows)


def _is_begun(batch: dict[str, Any]) -> bool:
    assert batch["status"] in ("validating", "in_progress"), batch
    return bool(batch["request_counts"]["completed"])


def _is_completed(batch: dict[str, Any]) -> bool:
    return bool(batch["status"] == "completed")


def test_f2_f3_a_batch_goes_on_over_a_signal_and_kill_9_with_each_row_once(tmp_path):
    count = 600
    with served.start(tmp_path, *served.TINY, "--drain_seconds=0") as server:
        name = server.begin_batch(_rows(count))
        first = server.wait_for_batch(name, _is_begun)
        with server.streaming("/v1/completions", _LONG) as answer:
            assert answer.readline().startswith(b"data: ")
            assert server.stop() == 0
            # A request for which the time to drain is too short ends with an error piece.
            assert served.read_events(answer)[-1]["error"]["code"] == "engine_stopped"
        # The rows in the engine are not among them: they go on later.
        assert "\ndraining: 128 choices have 0 s to finish" in server.log
        assert "Traceback" not in server.log
    with served.start(tmp_path, *served.TINY) as server:
        done = first["request_counts"]["completed"]
        second = server.wait_for_batch(
            name, lambda batch: batch["request_counts"]["completed"] > done
        )
        assert second["status"] == "in_progress"
        server.process.kill()
        server.process.wait()
    with served.start(tmp_path, *served.TINY) as server:
        batch = server.wait_for_batch(name, _is_completed)
        _check_each_once(server.rows_of(batch), count)
        assert "Traceback" not in server.log


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ends")
    flags = (*served.TINY, "--drain_seconds=600", "--noaccess_log")
    with served.start(folder, *flags) as made:
        yield made


def _limit_files(server: served.Served, room: int | None) -> None:
    """Has every write beyond the first bytes of a file fail, as on a full disk."""
    hard = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)[1]
    limits = (hard if room is None else room, hard)
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, limits)


def _files(server: served.Served) -> list[str]:
    folder: pathlib.Path = server.log_path.parent / "data" / "files"
    return sorted(path.name for path in folder.iterdir())


def test_f4_a_full_disk_refuses_uploads_and_holds_batches_until_there_is_room(server):
    count = 250
    name = server.begin_batch(_rows(count, echo=True, return_token_ids=True, logprobs=5))
    server.wait_for_batch(name, _is_begun)
    before = _files(server)
    _limit_files(server, 1 << 16)  # the rows take more
    status, found = server.upload((), body=b"x" * (1 << 17))
    assert (status, found["error"]["code"]) == (507, "disk_full")
    assert found["error"]["message"].startswith("the server's disk is full; nothing was stored")
    assert _files(server) == before
    while "its finished rows are kept" not in server.log:
        assert server.ask("/health") == (200, {"status": "ready"})
        assert server.ask("/v1/completions", {**_LONG, "n": 1, "max_tokens": 2})[0] == 200
    batch = server.ask(f"/v1/batches/{name}")[1]
    assert batch["status"] == "in_progress"
    assert batch["request_counts"]["completed"] < count
    _limit_files(server, None)
    batch = server.wait_for_batch(name, _is_completed)
    _check_each_once(server.rows_of(batch), count)
    assert "Traceback" not in server.log


def test_f2_a_signal_lets_requests_finish_and_a_second_one_ends_them_at_once(server):
    """The last test of this server."""
    short = {**_LONG, "n": 1}
    with (
        server.streaming("/v1/completions", short) as finished,
        server.streaming("/v1/completions", _LONG) as cut,
    ):
        assert finished.readline().startswith(b"data: ")
        assert cut.readline().startswith(b"data: ")
        server.process.send_signal(signal.SIGTERM)
        events = served.read_events(finished)
        assert sum(len(event["choices"]) for event in events) > 0
        assert events[-1]["choices"][0]["finish_reason"] == "length"
        assert server.process.poll() is None
        assert server.ask("/health") == (503, {"status": "draining"})
        status, refused = server.ask("/v1/completions", short)
        assert (status, refused["error"]["code"]) == (503, "unavailable")
        server.process.send_signal(signal.SIGTERM)
        assert served.read_events(cut)[-1]["error"]["code"] == "engine_stopped"
    assert server.process.wait(timeout=60) == 0
    assert "a second signal stops at once" in server.log
    assert "stopping at once" in server.log
    assert "Traceback" not in server.log
