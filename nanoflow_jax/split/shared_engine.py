"""A split engine as its other users see it, whose whole requests share the steps of its pieces."""

from collections.abc import Callable, Mapping, Sequence

from nanoflow_jax import request as request_lib
from nanoflow_jax.engine import engine as engine_lib
from nanoflow_jax.grammar import grammars as grammars_lib
from nanoflow_jax.split import engine as split_engine
from nanoflow_jax.split import interface

Tell = Callable[[Sequence[interface.PieceOutput]], None]


class SharedEngine:
    """Whole requests in, their updates out; fulfils the engine room's `TokenEngine`.

    What a step gives of pieces goes to whoever listens. One thread makes all calls.
    """

    def __init__(self, pieces: split_engine.SplitEngine) -> None:
        """Nobody listens.

        Args:
            pieces: Runs both; its own `step` and `take_updates` are not to be called.
        """
        self.pieces = pieces
        self._tell: Tell = lambda outputs: None

    def listen(self, tell: Tell) -> None:
        """From now on `tell` is called with what steps give of pieces."""
        self._tell = tell

    @property
    def has_work(self) -> bool:
        """See `SplitEngine.has_work`."""
        return self.pieces.has_work

    @property
    def limits(self) -> engine_lib.Limits:
        """See `Engine.limits`."""
        return self.pieces.engine.limits

    @property
    def grammars(self) -> grammars_lib.Grammars | None:
        """See `Engine.grammars`."""
        return self.pieces.engine.grammars

    @property
    def counters(self) -> engine_lib.Counters:
        """Totals of pieces and whole requests."""
        return self.pieces.engine.counters

    @property
    def num_running(self) -> int:
        """Pieces and whole requests in the dense batch."""
        return self.pieces.engine.num_running

    @property
    def num_waiting(self) -> int:
        """Pieces and whole requests that wait for room."""
        return self.pieces.engine.num_waiting

    @property
    def num_preemptions(self) -> int:
        """See `Engine.num_preemptions`."""
        return self.pieces.engine.num_preemptions

    @property
    def num_pages_used(self) -> int:
        """Pages that pieces and whole requests hold."""
        return self.pieces.engine.num_pages_used

    @property
    def num_late_compiles(self) -> int:
        """See `Engine.num_late_compiles`."""
        return self.pieces.engine.num_late_compiles

    @property
    def compile_seconds(self) -> Mapping[str, float]:
        """See `Engine.compile_seconds`."""
        return self.pieces.engine.compile_seconds

    def add(self, request: request_lib.Request) -> None:
        """See `SplitEngine.add`."""
        self.pieces.add(request)

    def abort(self, request_id: str, *, output_len: int | None = None) -> None:
        """See `SplitEngine.abort`."""
        self.pieces.abort(request_id, output_len=output_len)

    def step(self) -> list[request_lib.RequestUpdate]:
        """One turn for pieces and whole requests; what it gave of the latter.

        Raises:
            JaxRuntimeError: The device fails whatever it is given.
        """
        outputs = self.pieces.step()
        if outputs:
            self._tell(outputs)
        return self.pieces.take_updates()

    def check(self) -> None:
        """Raises AssertionError if an invariant is broken."""
        self.pieces.check()

    def close(self) -> None:
        """See `Engine.close`."""
        self.pieces.close()
