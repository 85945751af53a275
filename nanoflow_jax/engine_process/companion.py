"""What may share the engine of a process with the requests of its front."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol

from nanoflow_jax import config as config_lib
from nanoflow_jax import llm

Post = Callable[[Callable[[], None]], None]


class Companion(Protocol):
    """Others that use the engine; its calls of the engine go through `Post`."""

    @property
    def address(self) -> str:
        """HOST:PORT where they come; empty if nowhere."""

    @property
    def num_sessions(self) -> int:
        """How many of them there are."""

    def drain(self) -> None:
        """Lets no more of them in."""


class Beside(Protocol):
    """Begins what shares an engine, and on the way out tells those who are left, and ends it."""

    def __call__(
        self, model: llm.LLM, config: config_lib.EngineConfig, post: Post
    ) -> contextlib.AbstractContextManager[Companion]:
        """See the class.

        Args:
            model: Whose engine it is.
            config: The engine's knobs.
            post: Has something done between two steps, from any thread. On the way out nothing
                is done any more.

        Raises:
            ValueError: It cannot begin, and would not the next time.
        """


class Nobody:
    """Nobody shares the engine."""

    address = ""
    num_sessions = 0

    def drain(self) -> None:
        """There is nobody to let in."""


@contextlib.contextmanager
def nobody(model: llm.LLM, config: config_lib.EngineConfig, post: Post) -> Iterator[Companion]:
    """The engine is the front's alone."""
    yield Nobody()
