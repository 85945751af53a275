"""The same steps in several processes that share a model: process 0 decides, the others follow.

Process 0 has the engine: requests, scheduler, sampling parameters. Before it launches a program it
says which, and with what vectors; every other process has a runner of its own, with its share of
weights and caches, and launches the same. Nothing but what a program reads depends on the host, so
that the others need no requests, no clock and no decisions that might differ.
"""

import msgspec
import numpy as np

from nanoflow_jax import config as config_lib
from nanoflow_jax import console
from nanoflow_jax.engine import compiler, programs, runner
from nanoflow_jax.engine.sampling import SamplerVariant
from nanoflow_jax.parallel import peers
from nanoflow_jax.scheduler.buckets import Bucket


class Build(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The engine that process 0 builds.

    Attributes:
        config: Its knobs.
        fingerprint: Of the model, which may lie elsewhere on another machine.
    """

    config: config_lib.EngineConfig
    fingerprint: str


class Prompt(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """See `runner.PromptSlice`."""

    count: int
    vector: bytes


class Forward(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """See `runner.ForwardInputs`."""

    bucket: Bucket
    vector: bytes
    resets: tuple[bytes, ...]
    prompts: tuple[Prompt, ...]


class Sample(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """See `runner.SampleInputs`; no variant where no row samples."""

    variant: SamplerVariant | None = None
    vector: bytes = b""


_ENCODER = msgspec.msgpack.Encoder()
_BUILD = msgspec.msgpack.Decoder(Build)
_STEP = msgspec.msgpack.Decoder(Forward | Sample)


class LeadRunner:
    """The runner of process 0: what it launches, the runners of all others launch too."""

    def __init__(self, own: runner.Runner, group: peers.Group) -> None:
        self._own = own
        self._group = group

    @property
    def watch(self) -> compiler.CompileWatch:
        """Of this process."""
        return self._own.watch

    @property
    def compile_seconds(self) -> dict[str, float]:
        """Of this process."""
        return self._own.compile_seconds

    def forward(self, inputs: runner.ForwardInputs) -> runner.Forwarded:
        """See `Runner.forward`."""
        self._say(
            Forward(
                bucket=inputs.bucket,
                vector=inputs.vector.tobytes(),
                resets=tuple(vector.tobytes() for vector in inputs.resets),
                prompts=tuple(
                    Prompt(count=part.count, vector=part.vector.tobytes())
                    for part in inputs.prompt_slices
                ),
            )
        )
        return self._own.forward(inputs)

    def sample(
        self, forwarded: runner.Forwarded, inputs: runner.SampleInputs | None
    ) -> runner.Launched:
        """See `Runner.sample`."""
        said = Sample()
        if inputs is not None:
            said = Sample(variant=inputs.variant, vector=inputs.vector.tobytes())
        self._say(said)
        return self._own.sample(forwarded, inputs)

    def _say(self, message: Forward | Sample) -> None:
        self._group.say(_ENCODER.encode(message))

    def collect(self, launched: runner.Launched) -> runner.Collected:
        """See `Runner.collect`."""
        return self._own.collect(launched)

    def reset(self) -> None:
        """Refuses: the other devices may be in the middle of a step that will never end.

        Raises:
            RunError: Always.
        """
        raise console.RunError(
            "the device failed, and what several processes share cannot be made anew; start all of "
            "them again"
        )

    def close(self) -> None:
        """See `Runner.close`; the others close theirs at the farewell."""
        self._own.close()


def announce(group: peers.Group, config: config_lib.EngineConfig, fingerprint: str) -> None:
    """Tells the others what process 0 builds."""
    group.say(_ENCODER.encode(Build(config=config, fingerprint=fingerprint)))


def awaited(group: peers.Group) -> Build | None:
    """Waits for what process 0 builds; None if it needed no engine."""
    body = group.hear()
    return None if body is None else _BUILD.decode(body)


def follow(own: runner.StepRunner, group: peers.Group) -> None:
    """Launches what process 0 launches, until its farewell.

    Raises:
        JaxRuntimeError: A device of this process failed.
    """
    forwarded: runner.Forwarded | None = None
    in_flight: runner.Launched | None = None
    with own.watch.forbid():
        while (body := group.hear()) is not None:
            message = _STEP.decode(body)
            if isinstance(message, Forward):
                forwarded = own.forward(_forward_inputs(message))
                continue
            assert forwarded is not None
            launched = own.sample(forwarded, _sample_inputs(message))
            if in_flight is not None:
                own.collect(in_flight)  # nobody reads it, but a device that failed says so here
            in_flight = launched


def _forward_inputs(message: Forward) -> runner.ForwardInputs:
    return runner.ForwardInputs(
        bucket=message.bucket,
        vector=_vector(message.vector),
        resets=[_vector(data) for data in message.resets],
        prompt_slices=[
            runner.PromptSlice(request_id="", count=part.count, vector=_vector(part.vector))
            for part in message.prompts
        ],
    )


def _sample_inputs(message: Sample) -> runner.SampleInputs | None:
    if message.variant is None:
        return None
    return runner.SampleInputs(variant=message.variant, vector=_vector(message.vector))


def _vector(data: bytes) -> programs.Vector:
    return np.frombuffer(data, np.int32)
