"""Compiles the grammars of requests beside the loop, which goes on with others meanwhile."""

import dataclasses
import queue
import threading
from collections.abc import Callable

from nanoflow_jax.engine_process import messages
from nanoflow_jax.grammar import grammars as grammars_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """A request whose grammar is compiled, or was refused.

    Attributes:
        submit: The request.
        error: Why its grammar cannot be used.
    """

    submit: messages.Submit
    error: str | None = None


class Preparer:
    """One thread that compiles grammars in the order of their requests.

    A request is held until its grammar is there. Invariant: `_held` has those of which nothing
    was said yet; the loop alone changes it.
    """

    def __init__(
        self, grammars: grammars_lib.Grammars | None, done: Callable[[Prepared], None]
    ) -> None:
        """Prepares; the thread starts with the first request that needs it.

        Args:
            grammars: Of the engine; None if it takes none, which it says itself.
            done: Called from the thread.
        """
        self._grammars = grammars
        self._done = done
        self._held: set[str] = set()
        self._queue: queue.SimpleQueue[messages.Submit] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def try_hold(self, submit: messages.Submit) -> bool:
        """Whether a request was taken, of which `done` will be told."""
        grammar = submit.params.grammar
        if grammar is None or self._grammars is None or self._grammars.has(grammar):
            return False
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="grammars", daemon=True)
            self._thread.start()
        self._held.add(submit.request_id)
        self._queue.put(submit)
        return True

    def release(self, request_id: str) -> bool:
        """Lets go of a request; whether it was held."""
        if request_id not in self._held:
            return False
        self._held.remove(request_id)
        return True

    def _run(self) -> None:
        assert self._grammars is not None
        while True:
            submit = self._queue.get()
            grammar = submit.params.grammar
            if submit.request_id not in self._held or grammar is None:
                continue  # its client left
            error = None
            try:
                self._grammars.prepare(grammar)
            except Exception as caught:  # whatever it is, the request must not wait for ever
                error = str(caught) or repr(caught)
            self._done(Prepared(submit=submit, error=error))
