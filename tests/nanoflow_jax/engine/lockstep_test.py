import collections
import contextlib
import re

import batch_runs
import numpy as np
import pytest

from nanoflow_jax import config, console
from nanoflow_jax.engine import build, lockstep, model_source, runner
from nanoflow_jax.engine.sampling import SamplerVariant
from nanoflow_jax.scheduler.buckets import Bucket


class _Group:
    """What process 0 says, for another to hear."""

    def __init__(self):
        self.said = collections.deque()

    def say(self, body):
        self.said.append(body)

    def hear(self):
        return self.said.popleft() if self.said else None


class _Watch:
    def forbid(self):
        return contextlib.nullcontext()


class _Runner:
    """Takes note of what it is told."""

    watch = _Watch()

    def __init__(self):
        self.calls = []
        self.num_launched = 0

    def forward(self, inputs):
        self.calls.append(
            (
                inputs.bucket,
                inputs.vector.tolist(),
                [vector.tolist() for vector in inputs.resets],
                [(part.count, part.vector.tolist()) for part in inputs.prompt_slices],
            )
        )
        return len(self.calls)

    def sample(self, forwarded, inputs):
        told = None if inputs is None else (inputs.variant, inputs.vector.tolist())
        self.calls.append((forwarded, told))
        self.num_launched += 1
        return self.num_launched

    def collect(self, launched):
        self.calls.append(("collect", launched))


def _vector(*values):
    return np.array(values, np.int32)


def _forward(**more):
    return runner.ForwardInputs(
        **{
            "bucket": Bucket(tokens=8, decode_rows=2, prefill_rows=3),
            "vector": _vector(1, -2, 3),
            "resets": (),
            "prompt_slices": (),
            **more,
        }
    )


def test_others_launch_what_process_0_launches_and_look_at_steps_that_it_has_seen_end():
    group, first, second = _Group(), _Runner(), _Runner()
    lead = lockstep.LeadRunner(first, group)
    part = runner.PromptSlice(request_id="r", count=2, vector=_vector(5, 6))
    sampled = runner.SampleInputs(variant=SamplerVariant.FULL, vector=_vector(9))
    lead.sample(lead.forward(_forward(resets=[_vector(7), _vector(8, 8)])), sampled)
    lead.sample(lead.forward(_forward(prompt_slices=[part])), None)
    lead.sample(lead.forward(_forward()), sampled)
    assert len(first.calls) == 6
    lockstep.follow(second, group)
    launches = [call for call in second.calls if call[0] != "collect"]
    # A forward is known by its place among the calls, which collecting has moved here.
    assert [call[-1] for call in launches] == [call[-1] for call in first.calls]
    assert [call[:3] for call in launches[::2]] == [call[:3] for call in first.calls[::2]]
    assert [call for call in second.calls if call[0] == "collect"] == [
        ("collect", 1),
        ("collect", 2),
    ]


def test_a_failed_device_ends_all_processes():
    message = (
        "the device failed, and what several processes share cannot be made anew; start all of "
        "them again"
    )
    with pytest.raises(console.RunError, match=f"^{message}$"):
        lockstep.LeadRunner(_Runner(), _Group()).reset()


def _config(**knobs):
    several = {"num_processes": 2, "coordinator": "127.0.0.1:7000", "tensor_parallel": 2}
    return config.EngineConfig.from_knobs(
        model=str(batch_runs.FOLDER.parent / "llama"), compile_cache_dir="", **(several | knobs)
    )


def test_devices_that_a_process_lacks_are_refused():
    made = _config(tensor_parallel=4)
    message = (
        "--tensor_parallel=4 needs 2 devices of each of --num_processes=2, and process 1 has 0"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build.build_engine(made, model_source.open_model(made.model), group=_Group())


def test_several_processes_are_refused_where_they_were_not_joined():
    made = _config()
    message = "--num_processes=2: of the programs only python -m nanoflow_jax.generate runs in"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        build.build_engine(made, model_source.open_model(made.model))


def test_another_model_than_that_of_process_0_is_refused():
    group, made = _Group(), _config()
    lockstep.announce(group, made, "another")
    message = f"--model={made.model.model} is not the model of process 0, or other files of it"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        build.follow(made, group)


def test_a_process_whose_lead_needs_no_engine_has_nothing_to_do():
    build.follow(_config(), _Group())
