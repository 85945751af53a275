"""What a request is refused with, in OpenAI's form."""

from typing import Any


class ApiError(ValueError):
    """A request that cannot be served.

    Attributes:
        status_code: As over HTTP: 400 for the caller's fault, 500 for ours.
        param: The field at fault, if it is one.
        code: A word that programs can act on.
    """

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str = "invalid_request",
        status_code: int = 400,
    ) -> None:
        super().__init__(message)
        self.status_code = status_code
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """The body of OpenAI's answer to such a request."""
        kind = "invalid_request_error" if self.status_code < 500 else "server_error"
        return {
            "error": {
                "message": str(self),
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }
