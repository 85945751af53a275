"""Follows one text through its grammar, token by token."""

import llguidance
import numpy as np
from jaxtyping import Int32

from nanoflow_jax import request


class Matcher:
    """Where in its grammar the text of one choice is.

    Invariant: an error stays; from then on no token is allowed.
    """

    def __init__(self, compiled: llguidance.LLMatcher, known: Int32[np.ndarray, "W"]) -> None:
        """Begins a text.

        Args:
            compiled: At its beginning; nobody else may use it.
            known: Bitmask of the ids that are tokens.
        """
        self._state = compiled
        self._known = known

    def advance(self, token: int) -> None:
        """Takes the next token of the text; one that the grammar forbids is an error."""
        self._state.consume_token(token)

    def fill_mask(self, out: Int32[np.ndarray, "W"]) -> None:
        """Writes which tokens may come next.

        An end-of-text token may where the grammar may end. Costs up to 20 ms of one core where
        the grammar is at its limits, usually a tenth of a millisecond.

        Args:
            out: One bit a token, contiguous; overwritten.
        """
        assert out.flags.c_contiguous and out.shape == self._known.shape, "a mask of another size"
        self._state.unsafe_compute_mask_ptr(out.ctypes.data, out.nbytes)
        if self._state.is_error():
            out[:] = 0
        else:
            out &= self._known

    @property
    def is_finished(self) -> bool:
        """Whether the text is complete and nothing but its end may follow."""
        return self._state.is_stopped() and not self._state.is_error()

    @property
    def error(self) -> str | None:
        """Why the text cannot go on, if so."""
        if not self._state.is_error():
            return None
        return (
            f"{request.GRAMMAR_TOO_HARD} ({self._state.stop_reason()}): it is too ambiguous or its "
            "patterns are too large at this place; simplify it"
        )
