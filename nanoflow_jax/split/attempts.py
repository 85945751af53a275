"""How often a gateway is asked again, and how long a client waits before it does."""

import asyncio
import random

from nanoflow_jax.split import errors, settings


class Attempts:
    """Counts what failed in a row.

    Attributes:
        num_failed: Since something last succeeded.
    """

    def __init__(self, knobs: settings.ClientSection) -> None:
        self._knobs = knobs
        self.num_failed = 0

    def succeeded(self) -> None:
        """What failed before counts no more."""
        self.num_failed = 0

    async def failed(self, error: errors.SplitError, *, note: str, at_least_s: float = 0.0) -> None:
        """Waits, longer each time, unless it was too often in a row.

        Args:
            error: What happened.
            note: How far it had come, for the message.
            at_least_s: How long to wait at least.

        Raises:
            SplitError: It was too often.
        """
        self.num_failed += 1
        if self.num_failed >= self._knobs.max_attempts:
            raise errors.SplitError(
                error.code,
                f"{error.detail} (attempt {self.num_failed} of {self._knobs.max_attempts}, {note})",
            ) from error
        # Clients of a server that was started anew do not all come at once.
        wait_s = self._knobs.backoff_s * 2 ** (self.num_failed - 1) * random.uniform(0.5, 1.0)
        await asyncio.sleep(max(at_least_s, wait_s))
