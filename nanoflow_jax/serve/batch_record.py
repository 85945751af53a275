"""The record of a batch: plain data, and its form on disk."""

import dataclasses
import enum
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

from nanoflow_jax.openai.requests import Endpoint

_ID = re.compile(r"batch_[0-9a-f]{24}")


class Status(enum.StrEnum):
    """OpenAI's words for how far a batch is."""

    VALIDATING = "validating"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"

    @property
    def is_ended(self) -> bool:
        """Whether nothing more happens to the batch."""
        return self in (Status.COMPLETED, Status.FAILED, Status.CANCELLED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """Why a batch failed.

    Attributes:
        code: A word that programs can act on.
        message: For people.
        line: Of the input, from 1, if one is at fault.
    """

    code: str
    message: str
    line: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """A batch.

    Attributes:
        id: Drawn by the store.
        endpoint: Where its rows go.
        input_file_id: The rows.
        metadata: The client's own.
        status: How far it is.
        ending: The status to come when the result files are there.
        times: By status, seconds since 1970, when it was reached.
        total: Rows, as far as known.
        completed: Rows answered.
        failed: Rows that became errors.
        output_file_id: Answers; decided before the file is made.
        error_file_id: Errors; likewise.
        problems: Why it failed.
    """

    id: str
    endpoint: Endpoint
    input_file_id: str
    metadata: Mapping[str, str]
    status: Status
    ending: Status | None = None
    times: Mapping[str, int]
    total: int = 0
    completed: int = 0
    failed: int = 0
    output_file_id: str | None = None
    error_file_id: str | None = None
    problems: tuple[Problem, ...] = ()

    @property
    def created_at(self) -> int:
        """When it was made, seconds since 1970."""
        return self.times[Status.VALIDATING]

    def encode(self) -> bytes:
        """The record as `read` takes it."""
        return json.dumps(dataclasses.asdict(self)).encode()

    @property
    def seed(self) -> int:
        """For rows that have none: the same after a restart."""
        return int.from_bytes(hashlib.sha256(self.id.encode()).digest()[:7], "little")


def read(path: Path) -> Batch:
    """Reads a record.

    Raises:
        ValueError: It is damaged; the message names the file.
    """
    try:
        value = json.loads(path.read_bytes())
        batch = Batch(
            **{
                **value,
                "endpoint": Endpoint(value["endpoint"]),
                "status": Status(value["status"]),
                "ending": None if value["ending"] is None else Status(value["ending"]),
                "problems": tuple(Problem(**problem) for problem in value["problems"]),
            }
        )
        if _ID.fullmatch(batch.id) is None or path.name != f"{batch.id}.json":
            raise ValueError(f"it speaks of {batch.id!r:.80}")
        return batch
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); move it out of --data_dir and start again"
        ) from error
