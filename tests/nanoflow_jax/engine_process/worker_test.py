import socket
import subprocess
import sys

from nanoflow_jax import config, wire
from nanoflow_jax import request as request_lib
from nanoflow_jax.engine import engine as engine_lib
from nanoflow_jax.engine_process import messages, worker


class _FakeConnection:
    """A front that says nothing more, and leaves when it is waited for."""

    def __init__(self):
        self.is_closed = False
        self.sent = []

    def take(self, *, wait):
        self.is_closed = wait
        return []

    def put(self, message):
        raise AssertionError("no request of this test has a grammar")

    def send(self, message):
        self.sent.append(message)


class _FakeModel:
    """An engine and its generator in one: gives the results it was told to give, one a step."""

    def __init__(self, results):
        self._results = list(results)
        self.engine = self.generator = self
        self.grammars = None
        self.counters = engine_lib.Counters()
        self.num_running = self.num_waiting = self.num_pages_used = 0
        self.num_preemptions = self.num_late_compiles = 0

    @property
    def has_work(self):
        return bool(self._results)

    def submit(self, *args, **kwargs):
        pass

    def step(self):
        return self._results.pop(0)


def _result(*tokens, completions=(), **given):
    deltas = tuple(
        request_lib.Delta(request_id="a", index=0, text="", token_ids=(token,)) for token in tokens
    )
    return request_lib.StepResult(deltas=deltas, completions=completions, **given)


def _end(*choices, error=None):
    completion = request_lib.Completion(
        request_id="a", prompt_ids=(1,), choices=choices, error=error
    )
    return (completion,)


def _run(results, *, times):
    """What a worker says of a request sent at 10 s, with a clock that shows `times`."""
    connection = _FakeConnection()
    submit = messages.Submit(
        request_id="a",
        prompt_ids=(1,),
        params=request_lib.SamplingParams(seed=1),
        priority=0,
        stream=False,
        sent_s=10.0,
    )
    clock = iter(times)
    worker.Worker(_FakeModel(results), connection, clock=lambda: next(clock)).run([submit])
    return connection.sent


def test_the_times_of_a_request_count_from_its_sending():
    choice = request_lib.Choice(
        index=0, text="", token_ids=(5, 6), finish_reason=request_lib.FinishReason.LENGTH
    )
    sent = _run(
        [_result(), _result(5, started_s={"a": 11.0}), _result(6, completions=_end(choice))],
        times=(11.5, 13.0, 17.0),
    )
    assert [stepped.times for stepped in sent[:2]] == [(), ()]
    assert sent[2].times == (
        messages.Times(
            started_s=1.0, first_token_s=3.0, end_s=7.0, num_tokens=2, reasons=("length",)
        ),
    )


def test_a_request_that_failed_before_its_first_token_has_no_time_to_it():
    (sent,) = _run([_result(completions=_end(error="no token could be drawn"))], times=(12.0,))
    assert sent.times == (
        messages.Times(
            started_s=None, first_token_s=None, end_s=2.0, num_tokens=0, reasons=("error",)
        ),
    )


class _Sessions:
    """Sessions beside the front's requests."""

    address = "here:1"
    num_sessions = 3
    is_draining = False

    def drain(self):
        self.is_draining = True


def test_calls_of_other_threads_are_made_between_steps_until_the_front_says_leave():
    connection, beside, made = _FakeConnection(), _Sessions(), []
    inbox = [worker.Call(lambda: made.append(1)), worker.Call(lambda: made.append(2))]
    model = _FakeModel([])
    made_worker = worker.Worker(model, connection, beside=beside)
    made_worker.run([*inbox, messages.Drain()])
    assert made == [1, 2]
    assert beside.is_draining
    # Nothing was computed, and yet pages may have been freed.
    assert [stepped.load.sessions for stepped in connection.sent] == [3]
    connection.is_closed = False
    model._results = [_result(5)]
    made_worker.run([messages.Leave()])
    assert model.has_work


_STARTS_FOR_EVER = """
import socket, sys, threading
from nanoflow_jax.engine_process import worker
def start(*_):
    print("starting", flush=True)
    threading.Event().wait()
worker._start = start
worker.run(socket.socket(fileno=int(sys.argv[1])))
"""


def test_an_engine_that_still_starts_ends_with_its_front():
    ours, its = socket.socketpair()
    with ours, its:
        command = [sys.executable, "-c", _STARTS_FOR_EVER, str(its.fileno())]
        with subprocess.Popen(
            command, pass_fds=[its.fileno()], stdout=subprocess.PIPE, text=True
        ) as process:
            its.close()
            start = messages.Start(config=config.EngineConfig())
            ours.sendall(wire.Codec(messages.FromEngine).frame(start))
            assert process.stdout.readline() == "starting\n"
            ours.close()
            try:
                assert process.wait(timeout=120) == 1
            finally:
                process.kill()
