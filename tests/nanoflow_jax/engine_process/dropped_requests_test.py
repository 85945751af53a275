"""The loop of the engine's process, with a script in the place of the front."""

from collections.abc import Iterator, Sequence

import batch_runs
import pytest

from nanoflow_jax import llm
from nanoflow_jax import request as request_lib
from nanoflow_jax.engine_process import messages, worker


@pytest.fixture(scope="module")
def model():
    with llm.LLM(str(batch_runs.FOLDER), **batch_runs.KNOBS) as made:
        yield made


class _Front:
    """Says what a script says, one item before each step; hangs up at its end."""

    def __init__(self, script: Iterator[Sequence[messages.ToEngine]]) -> None:
        self.is_closed = False
        self.told: list[messages.FromEngine] = []
        self._script = script

    def take(self, *, wait: bool) -> list[messages.ToEngine]:
        found = next(self._script, None)
        self.is_closed = found is None
        return list(found or ())

    def put(self, message: object) -> None:
        raise AssertionError("no request of this test has a grammar")

    def send(self, message: messages.FromEngine) -> None:
        self.told.append(message)


def _submit(name: str, *, n: int = 1) -> messages.Submit:
    params = request_lib.SamplingParams(max_tokens=24, ignore_eos=True, seed=0, n=n)
    return messages.Submit(
        request_id=name, prompt_ids=(5, 6, 7), params=params, priority=0, stream=True, sent_s=0.0
    )


def test_f1_pages_of_a_request_that_is_dropped_are_free_after_one_step(model):
    engine, seen = model.engine, []

    def script():
        yield [_submit("stays"), _submit("leaves", n=2)]
        for _ in range(10):
            yield []
        seen.append((engine.num_running, engine.num_pages_used))
        yield [messages.Abort(request_id="leaves")]
        seen.append((engine.num_running, engine.num_pages_used))
        yield [messages.Abort(request_id="stays")]
        seen.append((engine.num_running, engine.num_pages_used))
        assert not engine.has_work

    front = _Front(script())
    worker.Worker(model, front).run([])
    # 3 + 10 tokens or a few more, in pages of 8.
    assert seen == [(3, 6), (1, 2), (0, 0)]
    load = front.told[-1].load
    assert (load.running, load.waiting, load.pages_used) == (0, 0, 0)
    ended = [c.request_id for told in front.told for c in told.completions]
    assert ended == []
