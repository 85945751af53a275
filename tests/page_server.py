"""A made-up server behind the real page: canned streams, errors, and an engine that moves.

What a message or prompt says decides what comes back; see `_ANSWERS` and `_complete`. By hand:
`python tests/page_server.py 8000`.
"""

import asyncio
import contextlib
import json
import math
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import fastapi
import uvicorn
from fastapi import responses

from nanoflow_jax.serve import page_routes

MODEL = "tiny-llama-3l"
HOSTILE = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">"
REFUSAL = "temperature=9 is outside [0, 2]"
NO_TEMPLATE = "the model has no chat template: it is not made for chat; use /v1/completions"

PROSE = (
    "A page table maps the tokens of a request to pages of a fixed size, as an operating system "
    "maps addresses to frames. The cache can then be filled in any order:\n\n"
    "1. A request takes a page when its last one is full.\n"
    "2. It gives all of them back when it ends.\n"
    "3. Nothing is moved, and at most one page a request is partly empty."
)
_ANSWERS = {
    "hello": "Hello there.",
    "hostile": HOSTILE,
    "pages": PROSE,
    "code": "\n    if n < 2:\n        return n\n    return fib(n - 1) + fib(n - 2)\n",
}
_LANES = (
    ("compute", 0, (("kqv", 310), ("kqv", 310), ("o", 120), ("up_gate", 540), ("down", 300))),
    ("memory", 310, (("decode_attention", 420), ("append", 30), ("decode_attention", 410))),
    ("network", 760, (("all_reduce", 160), ("all_reduce", 220))),
)
OPERATIONS = [
    {
        "name": name,
        "start_us": begin + sum(before for _, before in row[:i]),
        "duration_us": duration,
        "lane": lane,
    }
    for lane, begin, row in _LANES
    for i, (name, duration) in enumerate(row)
]


class MovingEngine:
    """Figures in the form of /page/stats, of an engine whose load goes up and down."""

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()
        self._exact = dict.fromkeys(("prompt", "out", "steps", "decode", "prefill", "done"), 0.0)
        self.operations: list[dict[str, Any]] = []
        self.late_compiles = 0

    def stats(self) -> dict[str, Any]:
        """The figures of now; totals have grown by what the load was since they were last read."""
        now = time.monotonic()
        passed, self._last = now - self._last, now
        age = now - self._start
        load = 0.5 + 0.32 * math.sin(age / 13) + 0.13 * math.sin(age / 2.3)
        burst = max(0.0, math.sin(age / 7)) ** 3
        running = round(58 * load) + 2
        steps = 34 * passed
        decode, prefill = running * steps, (40 + 380 * burst) * steps
        gains = (prefill, decode, steps, decode, prefill, decode / 180)
        for name, gain in zip(self._exact, gains, strict=True):
            self._exact[name] += gain
        total = {name: int(value) for name, value in self._exact.items()}
        return {
            "now_s": now,
            "uptime_s": age + 7934,
            "status": "ready",
            "model": MODEL,
            "settings": {
                "device": "cpu (2 cores)",
                "dtype": "float32",
                "num_pages": 2048,
                "page_size": 64,
                "max_requests": 64,
                "dense_batch": 512,
                "max_context_len": 4096,
            },
            "totals": {
                "prompt_tokens": total["prompt"],
                "generation_tokens": total["out"],
                "requests": {
                    "stop": total["done"],
                    "length": total["done"] // 3,
                    "abort": total["done"] // 40,
                    "error": 0,
                },
                "preemptions": 2,
                "late_compiles": self.late_compiles,
                "steps": total["steps"],
                "step_decode_tokens": total["decode"],
                "step_prefill_tokens": total["prefill"],
            },
            "running": running,
            "waiting": round(14 * burst * load),
            "pages_used": round(2048 * (0.18 + 0.55 * load)),
            "pages_total": 2048,
            "latency": {
                "ttft_s": {"p50": 0.082, "p90": 0.31, "p99": 0.94, "count": 1204},
                "tpot_s": {"p50": 0.029, "p90": 0.036, "p99": 0.061, "count": 1180},
                "e2e_s": {"p50": 4.9, "p90": 9.7, "p99": 15.2, "count": 1204},
            },
            "operations": self.operations,
            "cpu_s": {"engine": 0.94 * age, "front": 0.11 * age},
        }


class FakeState:
    """What a test sets beforehand and looks at afterwards."""

    def __init__(self) -> None:
        self.needs_key = False
        self.has_template = True
        self.engine = MovingEngine()
        # Instead of the engine's: figures by how often they were asked for.
        self.stats: Callable[[int], dict[str, Any]] | None = None
        self.stats_asked = 0
        self.bodies: list[dict[str, Any]] = []
        self.gone = threading.Event()  # A client left in mid-stream.


def make_app(state: FakeState) -> fastapi.FastAPI:
    """The real page routes with made-up ones behind them."""
    app = fastapi.FastAPI()
    app.include_router(page_routes.make_router())

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": MODEL, "object": "model"}]}

    @app.get("/page/stats")
    async def stats() -> dict[str, Any]:
        state.stats_asked += 1
        found = state.stats(state.stats_asked) if state.stats else state.engine.stats()
        return {**found, "needs_key": state.needs_key}

    @app.post("/v1/chat/completions")
    async def chat(request: fastapi.Request) -> fastapi.Response:
        body = await request.json()
        if not state.has_template:
            return _error(400, NO_TEMPLATE)
        return _complete(state, request, body, body["messages"][-1]["content"])

    @app.post("/v1/completions")
    async def complete(request: fastapi.Request) -> fastapi.Response:
        body = await request.json()
        return _complete(state, request, body, body["prompt"])

    return app


def _error(status: int, text: str) -> fastapi.Response:
    kind = "invalid_request_error"
    body = {"error": {"message": text, "type": kind, "param": None, "code": "invalid_request"}}
    return responses.JSONResponse(body, status_code=status)


def _complete(
    state: FakeState, request: fastapi.Request, body: dict[str, Any], text: str
) -> fastapi.Response:
    state.bodies.append(body)
    if "refuse" in text:
        return _error(400, REFUSAL)
    if "proxy" in text:
        return responses.HTMLResponse("<h1>Bad gateway</h1>", status_code=502)
    pieces = _stream(state, body, text)
    return responses.StreamingResponse(pieces, media_type="text/event-stream")


async def _stream(state: FakeState, body: dict[str, Any], text: str) -> AsyncIterator[str]:
    chat = "messages" in body
    slow = "slow" in text
    answer = "word " * 400 if slow else next((a for k, a in _ANSWERS.items() if k in text), "Yes.")
    words = answer.split(" ")
    choices = body.get("n") or 1

    def event(index: int, piece: str, reason: str | None = None) -> str:
        shown: dict[str, Any] = {"delta": {"content": piece}} if chat else {"text": piece}
        choice = {"index": index, **shown, "finish_reason": reason}
        return f"data: {json.dumps({'choices': [choice]})}\n\n"

    yield ": a comment, as proxies like them\n\n"
    try:
        for i, word in enumerate(words):
            if "cut" in text and i == 1:
                return
            if "break" in text and i == 1:
                error = {"error": {"message": "the engine stopped", "code": "engine_failed"}}
                yield f"data: {json.dumps(error)}\n\n"
                return
            await asyncio.sleep(0.03 if slow else 0.012)
            for index in range(choices):
                yield event(index, word if i == 0 else f" {word}")
    except (asyncio.CancelledError, GeneratorExit):
        state.gone.set()
        raise
    for index in range(choices):
        yield event(index, "", "stop")
    usage = {
        "prompt_tokens": 34,
        "completion_tokens": len(words) * choices,
        "total_tokens": 34 + len(words) * choices,
        "prompt_tokens_details": {"cached_tokens": 12},
    }
    yield f"data: {json.dumps({'choices': [], 'usage': usage})}\r\n\r\n"
    yield "data: [DONE]\n\n"


@contextlib.contextmanager
def run_server(state: FakeState) -> Iterator[str]:
    """Runs the fake on a free port of this machine and gives its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(make_app(state), ws="none", lifespan="off", log_level="warning")
    config.timeout_graceful_shutdown = 1
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        listener.close()


if __name__ == "__main__":
    shown = FakeState()
    shown.engine.operations = OPERATIONS
    uvicorn.run(make_app(shown), port=int(sys.argv[1]), ws="none")
