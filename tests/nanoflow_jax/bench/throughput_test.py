import collections
import subprocess
import sys

from nanoflow_jax import request as request_lib
from nanoflow_jax.bench import throughput
from nanoflow_jax.engine import engine as engine_lib
from nanoflow_jax.workload.file import WorkRequest


class _OneTokenAStep:
    """An engine that gives every request one token in each step."""

    def __init__(self):
        self._left = collections.OrderedDict()
        self.counters = engine_lib.Counters()

    @property
    def has_work(self):
        return bool(self._left)

    def add(self, request):
        assert request.params.ignore_eos
        assert request.params.is_greedy
        self._left[request.request_id] = request.params.max_tokens

    def step(self):
        self.counters.steps += 1
        updates = [request_lib.RequestUpdate(request_id=r, token_ids=(1,)) for r in self._left]
        self._left = {r: n - 1 for r, n in self._left.items() if n > 1}
        return updates


def test_tokens_steps_and_times_of_a_run_are_counted():
    mix = [WorkRequest(prompt_ids=(1, 2, 3), output_len=n) for n in (1, 4)]

    result = throughput.run(_OneTokenAStep(), mix, name="x")

    assert (result.requests, result.input_tokens, result.output_tokens) == (2, 6, 5)
    assert result.steps == 4
    assert len(result.first_token_s) == 2
    assert len(result.per_token_s) == 1, "a request of one token has no time between tokens"
    assert result.total_per_s * result.seconds == 11
    assert "output 5 tokens, 4 steps" in throughput.report(result)


def test_the_hash_of_a_run_is_of_its_tokens_and_not_of_its_name():
    def hash_of(*lengths: int, name: str = "x") -> str | None:
        mix = [WorkRequest(prompt_ids=(1, 2), output_len=n) for n in lengths]
        return throughput.run(_OneTokenAStep(), mix, name=name).tokens_sha256

    assert hash_of(2, 3) == hash_of(2, 3, name="y")
    assert len({hash_of(2, 3), hash_of(3, 2), hash_of(2, 2), hash_of(5)}) == 4


def _bench(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "nanoflow_jax.bench", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_wrong_command_line_ends_with_a_message_and_no_traceback(tmp_path):
    for arguments, message in (
        (["speed"], "name one benchmark"),
        (["throughput", f"--workload={tmp_path}/no.json"], "cannot be read"),
    ):
        done = _bench(*arguments)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
