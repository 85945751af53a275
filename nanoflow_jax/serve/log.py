"""What the server writes to its log: never the text of a request, nor a key."""

import logging
import sys
import traceback
import types

ACCESS = logging.getLogger("nanoflow_jax.access")
_ExcInfo = (
    tuple[type[BaseException], BaseException, types.TracebackType | None] | tuple[None, None, None]
)


class Formatter(logging.Formatter):
    """Lines with their time; of an exception its kind and its place.

    Messages of exceptions are left out: they repeat what could not be used, often a request.
    """

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        """The text of a record."""
        record.exc_text = None  # another formatter may have left all of an exception there
        return super().format(record)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """The line of a record; of asyncio's the first, since what follows shows exceptions."""
        if record.name == "asyncio":
            record.message = record.message.partition("\n")[0]
        return super().formatMessage(record)

    def formatException(self, ei: _ExcInfo) -> str:  # noqa: N802 - logging's name
        """Where an exception came from, the first cause first."""
        parts: list[str] = []
        error = ei[1]
        while error is not None:
            where = "".join(traceback.format_tb(error.__traceback__))
            parts.insert(0, f"{where}{type(error).__qualname__} (its message is not shown)")
            error = error.__cause__ or error.__context__
        return "\n".join(parts)


def to_stderr(*, access: bool) -> None:
    """Sends the logs of this process to the standard error, those of libraries from warnings up.

    Args:
        access: Write a line for each request.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("nanoflow_jax").setLevel(logging.INFO)
    ACCESS.setLevel(logging.INFO if access else logging.WARNING)
