"""OpenAI's file and batch objects, as they are answered and documented."""

from typing import Literal

import pydantic

from nanoflow_jax.serve import batches, files
from nanoflow_jax.serve.batch_record import Batch, Status


class FileObject(pydantic.BaseModel):
    """A stored file."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    status_details: str | None = None

    @classmethod
    def of(cls, info: files.FileInfo) -> "FileObject":
        """A file as it is shown."""
        return cls(
            id=info.id,
            bytes=info.bytes,
            created_at=info.created_at,
            filename=info.filename,
            purpose=info.purpose,
        )


class FileList(pydantic.BaseModel):
    """Some of the files."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(pydantic.BaseModel):
    """A file that is gone."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class BatchProblem(pydantic.BaseModel):
    """Why a batch failed."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class BatchProblems(pydantic.BaseModel):
    """All reasons."""

    object: Literal["list"] = "list"
    data: list[BatchProblem]


class RequestCounts(pydantic.BaseModel):
    """Rows of a batch."""

    total: int
    completed: int
    failed: int


class BatchObject(pydantic.BaseModel):
    """A batch."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: BatchProblems | None
    input_file_id: str
    completion_window: str
    status: Status
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int | None = None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None = None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None

    @classmethod
    def of(cls, batch: Batch) -> "BatchObject":
        """A batch as it is shown; its result files once they are there."""
        problems = [
            BatchProblem(code=problem.code, message=problem.message, line=problem.line)
            for problem in batch.problems
        ]
        is_ended = batch.status.is_ended
        return cls(
            id=batch.id,
            endpoint=str(batch.endpoint),
            errors=BatchProblems(data=problems) if problems else None,
            input_file_id=batch.input_file_id,
            completion_window=batches.WINDOW,
            status=batch.status,
            output_file_id=batch.output_file_id if is_ended else None,
            error_file_id=batch.error_file_id if is_ended else None,
            created_at=batch.created_at,
            in_progress_at=batch.times.get(Status.IN_PROGRESS),
            finalizing_at=batch.times.get(Status.FINALIZING),
            completed_at=batch.times.get(Status.COMPLETED),
            failed_at=batch.times.get(Status.FAILED),
            cancelling_at=batch.times.get(Status.CANCELLING),
            cancelled_at=batch.times.get(Status.CANCELLED),
            request_counts=RequestCounts(
                total=batch.total, completed=batch.completed, failed=batch.failed
            ),
            metadata=dict(batch.metadata) or None,
        )


class BatchList(pydantic.BaseModel):
    """Some of the batches."""

    object: Literal["list"] = "list"
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool
