"""What the rest of the product asks of an engine, or of several that work as one."""

from collections.abc import Mapping
from typing import Protocol

from nanoflow_jax import request as request_lib
from nanoflow_jax.engine import engine
from nanoflow_jax.grammar import grammars as grammars_lib


class TokenEngine(Protocol):
    """Runs requests in steps; `engine.Engine` says what each member means."""

    @property
    def has_work(self) -> bool: ...

    @property
    def limits(self) -> engine.Limits: ...

    @property
    def grammars(self) -> grammars_lib.Grammars | None: ...

    @property
    def counters(self) -> engine.Counters: ...

    @property
    def num_running(self) -> int: ...

    @property
    def num_waiting(self) -> int: ...

    @property
    def num_preemptions(self) -> int: ...

    @property
    def num_pages_used(self) -> int: ...

    @property
    def num_late_compiles(self) -> int: ...

    @property
    def compile_seconds(self) -> Mapping[str, float]: ...

    def add(self, request: request_lib.Request) -> None: ...

    def abort(self, request_id: str, *, output_len: int | None = None) -> None: ...

    def step(self) -> list[request_lib.RequestUpdate]: ...

    def check(self) -> None: ...

    def close(self) -> None: ...
