"""A small engine of the golden Llama: its knobs, and what it should say."""

from typing import Any

from engine_runs import Output, ask, run
from golden import cases

from nanoflow_jax.engine import engine as engine_lib

CASE = cases.load("llama")
KNOBS = {
    "max_requests": 12,
    "dense_batch": 24,
    "buckets": "24:12:12",
    "cache_page_size": 5,
}


def run_one(engine: engine_lib.Engine, prompt: Any, **params: Any) -> Output:
    """What becomes of one request by itself."""
    return run(engine, [ask("one", prompt, **params)])[0]


def greedy(index: int, count: int) -> list[int]:
    """The first tokens that follow a prompt of the case."""
    tokens: list[int] = CASE.tokens[index][:count].tolist()
    return tokens
