"""One engine answers requests over HTTP and split sessions, and neither harms the other."""

import asyncio
import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import batch_runs
import msgspec
import piece_runs
import process_runs
import pytest
import served
import split_model
import split_runs

from nanoflow_jax import config
from nanoflow_jax.engine import model_source
from nanoflow_jax.serve import keys
from nanoflow_jax.split import (
    client,
    codecs,
    cut,
    driver,
    engine_process,
    errors,
    gateway,
    identity,
    settings,
    transport,
)
from nanoflow_jax.split import engine as split_engine

_KNOBS = {"max_requests": 4, "dense_batch": 24, "buckets": "24:4:4", "cache_page_size": 8}
_MODEL = served.TINY_CASE.path
_NUM_LAYERS = 2
_CUT = cut.Cut(start=1, stop=_NUM_LAYERS, num_layers=_NUM_LAYERS)
_WANTED = [[int(token) for token in row] for row in served.TINY_CASE.tokens]
_LEN = len(_WANTED[0])
_PARAMS = piece_runs.greedy(max_tokens=_LEN)
_AFTER = 5
_WAITS = ("--split_lease_s=0.2", "--drain_seconds=2")


class _Kept:
    """A server that is started when it is wanted, and again after a test that ended it."""

    def __init__(self, factory: pytest.TempPathFactory, stack: contextlib.ExitStack) -> None:
        self._factory = factory
        self._stack = stack
        self._server: served.Served | None = None

    def get(self) -> served.Served:
        if self._server is None or self._server.process.poll() is not None:
            folder = self._factory.mktemp("server")
            # A port of its own choice would be another one after a restart.
            port = process_runs.free_address().rsplit(":", 1)[1]
            program = ("nanoflow_jax.split", "serve", "--http_port=0", f"--port={port}", "--grid=1")
            started = served.start(folder, *served.TINY, *_WAITS, program=program)
            self._server = self._stack.enter_context(started)
        return self._server


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Kept]:
    with contextlib.ExitStack() as stack:
        yield _Kept(tmp_path_factory, stack)


@pytest.fixture
def server(kept: _Kept) -> served.Served:
    return kept.get()


@pytest.fixture(scope="module")
def own_layers() -> Iterator[split_engine.SplitEngine]:
    """The client's engine, of the first layer."""
    engine = piece_runs.build_split(_MODEL, layers=((0, 1),), **_KNOBS)
    yield engine
    engine.close()


def _identity(engine: split_engine.SplitEngine) -> Any:
    section = config.EngineConfig.from_knobs(model=str(_MODEL)).model
    return identity.of(section, model_source.open_model(section), engine.held.dtype)


def _split_port(server: served.Served) -> int:
    return int(server.ask("/health")[1]["split"]["address"].rsplit(":", 1)[1])


def _generate(
    port: int,
    engine: split_engine.SplitEngine,
    *,
    prompts: Sequence[int] = (0,),
    on_token: Callable[[int], None] = lambda count: None,
) -> list[driver.Generation]:
    """Continues prompts of the case side by side over a layer of this process and the server's.

    Args:
        port: Of the gateway.
        engine: This end's.
        prompts: Which.
        on_token: Told how many tokens the first prompt has, each time.
    """
    count = 0

    def tell(token_ids: Sequence[int]) -> None:
        nonlocal count
        count += len(token_ids)
        on_token(count)

    async def all_of_them() -> list[driver.Generation]:
        made = client.SplitClient(
            transport.Endpoint(host="127.0.0.1", port=port),
            _identity(engine),
            engine=engine,
            held_layers=((0, 1),),
            codecs=(codecs.Codec.F32,),
            knobs=settings.ClientSection(max_attempts=12),
        )
        async with made, asyncio.timeout(process_runs.LIMIT_S):
            return await asyncio.gather(
                *(
                    made.generate(
                        served.TINY_CASE.prompts[i],
                        _PARAMS,
                        _CUT,
                        on_tokens=tell if i == prompts[0] else lambda token_ids: None,
                    )
                    for i in prompts
                )
            )

    return asyncio.run(all_of_them())


def _asked(index: int, **more: Any) -> dict[str, Any]:
    wanted = {"max_tokens": _LEN, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return {"prompt": served.TINY_CASE.prompts[index], **wanted, **more}


def _tokens(events: Sequence[Any]) -> list[int]:
    return [token for event in events for token in event["choices"][0]["token_ids"]]


@contextlib.contextmanager
def _stalled(port: int, engine: split_engine.SplitEngine) -> Iterator["subprocess.Popen[str]"]:
    """A client in a process of its own that waits in the middle of decode."""
    script = pathlib.Path(batch_runs.__file__).with_name("split_stub_client.py")
    told = msgspec.json.encode(_identity(engine)).decode()
    with subprocess.Popen(
        [sys.executable, str(script), str(port), told],
        env=batch_runs.environment(),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "in decode\n"
            yield process
        finally:
            process.kill()


def _wait_no_session(server: served.Served) -> None:
    process_runs.wait_until(
        lambda: server.ask("/health")[1]["split"]["sessions"] == 0, tell=lambda: server.log
    )
    server.wait_idle()


def test_requests_and_sessions_share_steps_and_get_the_tokens_of_one_process(server, own_layers):
    with server.streaming("/v1/completions", _asked(2)) as answer:
        assert answer.readline().startswith(b"data: ")
        both = _generate(_split_port(server), own_layers, prompts=(0, 1))
        rest = [json.loads(line[6:]) for line in answer if line.startswith(b"data: {")]
    assert [list(one.token_ids) for one in both] == _WANTED[:2]
    assert _tokens(rest) == _WANTED[2][-len(_tokens(rest)) :]
    status, answer = server.ask("/v1/completions", _asked(3, logprobs=2, echo=True))
    assert status == 200
    assert answer["choices"][0]["token_ids"] == _WANTED[3]
    _wait_no_session(server)
    with urllib.request.urlopen(f"{server.url}/metrics") as found:
        metrics = found.read().decode()
    assert "\nnanoflow_late_compiles_total 0.0\n" in metrics
    assert "\nnanoflow_split_sessions 0.0\n" in metrics


def test_a_session_of_a_killed_client_ends_and_a_stream_beside_it_goes_on(server, own_layers):
    with _stalled(_split_port(server), own_layers) as stub:
        assert server.ask("/health")[1]["split"]["sessions"] == 1
        assert server.stats()["pages_used"] > 0
        with server.streaming("/v1/completions", _asked(0)) as answer:
            first = answer.readline()
            os.kill(stub.pid, signal.SIGKILL)
            rest = [first, *answer]
    events = [json.loads(line[6:]) for line in rest if line.startswith(b"data: {")]
    assert _tokens(events) == _WANTED[0]
    _wait_no_session(server)


def test_a_client_that_hangs_up_over_http_leaves_sessions_as_they_are(server, own_layers):
    with contextlib.ExitStack() as held:
        answer = held.enter_context(
            server.streaming("/v1/completions", _asked(1, max_tokens=200, n=2))
        )
        answer.readline()
        found = _generate(
            _split_port(server),
            own_layers,
            on_token=lambda count: held.close() if count == _AFTER else None,
        )
    assert list(found[0].token_ids) == _WANTED[0]
    _wait_no_session(server)


def test_a_restarted_engine_takes_sessions_again_and_gives_the_same_tokens(server, own_layers):
    def kill_engine(count: int) -> None:
        if count == _AFTER:
            os.kill(server.engine_pid(), signal.SIGKILL)

    [found] = _generate(_split_port(server), own_layers, on_token=kill_engine)
    assert list(found.token_ids) == _WANTED[0]
    assert found.report.num_replays == 1
    assert server.ask("/v1/completions", _asked(1))[1]["choices"][0]["token_ids"] == _WANTED[1]
    _wait_no_session(server)


def test_a_signal_lets_sessions_finish_and_tells_those_that_do_not(server, own_layers):
    port = _split_port(server)
    assert f"\nready: split sessions at 127.0.0.1:{port}\n" in server.log

    def stop_server(count: int) -> None:
        if count == _AFTER:
            server.process.send_signal(signal.SIGTERM)

    with _stalled(port, own_layers) as stub:
        [found] = _generate(port, own_layers, on_token=stop_server)
        told, _ = stub.communicate(timeout=process_runs.LIMIT_S)
    assert list(found.token_ids) == _WANTED[0]
    assert "the server is stopping" in told
    assert server.process.wait(process_runs.LIMIT_S) == 0
    assert re.search(r"^draining: 2 split sessions have 2 s to finish", server.log, re.M)
    assert "Traceback" not in server.log


def test_a_gateway_that_drains_opens_no_session():
    async def body() -> None:
        async with split_runs.ends(knobs={"max_attempts": 1}) as ends:
            ends.gateway.drain()
            with pytest.raises(errors.SplitError, match="about to stop and opens no sessions"):
                await ends.client.generate(split_runs.PROMPT, split_runs.PARAMS, split_model.MIDDLE)

    split_runs.run(body())


def test_what_the_process_is_told_of_its_gateway_comes_out_as_it_went_in():
    tls = transport.TlsFiles(certificate="a.pem", key="b.pem", authority="c.pem")
    flags = engine_process.GatewayFlags(
        endpoint=transport.Endpoint(host="10.0.0.1", port=7, tls=tls),
        grid=(2, 4),
        limits=settings.GatewaySection(lease_s=1.5),
        api_key_file="keys",
    )
    assert msgspec.json.decode(flags.encoded(), type=engine_process.GatewayFlags) == flags


def test_a_gateway_that_cannot_begin_says_why_and_leaves_no_thread(tmp_path):
    tls = transport.TlsFiles(certificate=f"{tmp_path}/none.pem", key=f"{tmp_path}/none.pem")
    made = gateway.Gateway(
        split_model.ToyEngine(),
        split_model.IDENTITY,
        limits=settings.GatewaySection(),
        keys=keys.ApiKeys([]),
    )
    thread = engine_process.GatewayThread(
        made, transport.Endpoint(host="127.0.0.1", port=0, tls=tls), lambda act: None
    )
    with pytest.raises(ValueError, match=r"none\.pem"), thread.running():
        pass
    assert "gateway" not in {one.name for one in threading.enumerate()}
