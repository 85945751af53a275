"""What goes wrong between the ends of a split session."""

from nanoflow_jax.split import messages


class SplitError(Exception):
    """A session, or the attempt to open one, failed.

    Attributes:
        code: Why, for programs.
        detail: Why, in words.
        retryable: Whether the same session may go on after a new connection.
    """

    def __init__(self, code: messages.Code, detail: str, *, retryable: bool = False) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail
        self.retryable = retryable


class RefusedError(SplitError):
    """The other end did not open the session.

    Attributes:
        retry_after_s: When another try may help; None if none would.
    """

    def __init__(
        self, code: messages.Code, detail: str, *, retry_after_s: float | None = None
    ) -> None:
        super().__init__(code, detail, retryable=retry_after_s is not None)
        self.retry_after_s = retry_after_s

    def reject(self) -> messages.Reject:
        """As it is told to the other end."""
        return messages.Reject(
            code=self.code, reason=self.detail[:4096], retry_after_s=self.retry_after_s
        )
