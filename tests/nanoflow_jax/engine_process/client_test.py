"""What the front makes of words of the engine that nobody waits for any more."""

import asyncio

import pytest

from nanoflow_jax import config
from nanoflow_jax.engine_process import client, messages


class _Writer:
    """The way to an engine that answers nothing."""

    def write(self, data: bytes) -> None:
        """Takes a message."""


def test_a_recording_that_ends_after_its_wait_was_dropped_is_let_go() -> None:
    made = client.EngineClient(config.EngineConfig(), say=lambda text: None)
    made._writer = _Writer()  # type: ignore[assignment]
    made.state = client.State.READY

    async def scenario() -> None:
        waiting = asyncio.create_task(made.stop_trace())
        await asyncio.sleep(0)
        made.drop_all("the server is stopping")
        with pytest.raises(ValueError, match="the server is stopping"):
            await waiting
        made._take(messages.Traced())

    asyncio.run(scenario())
