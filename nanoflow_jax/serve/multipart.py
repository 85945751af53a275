"""Reads an upload's form as it comes in: the file goes straight to its place on the disk.

Starlette's own parser would first write the whole file, of any size, to the system's folder for
temporary files.
"""

import asyncio
import time
from collections.abc import AsyncIterator

from python_multipart import exceptions
from python_multipart.multipart import MultipartParser, parse_options_header

from nanoflow_jax.openai.errors import ApiError
from nanoflow_jax.serve import files

_MAX_FIELDS = 16
_MAX_FIELD_BYTES = 4096
_BUFFER_BYTES = 1 << 20
_IDLE_S = 60.0
# Beyond that time an upload has to come at this speed: few may be on their way at once.
_LEAST_BYTES_PER_S = 1024
# Boundaries and headers of the parts.
OVERHEAD_BYTES = 1 << 18


class _Form:
    """The parts of a form: short fields are kept, the bytes of `file` are handed out."""

    def __init__(self, boundary: bytes) -> None:
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.ended = False
        self._file_data = bytearray()
        self._header_name = self._header_value = b""
        self._disposition = b""
        self._name = ""
        self._is_file = False
        self._value = bytearray()
        self._num_parts = 0
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin_part,
                "on_part_data": self._add,
                "on_part_end": self._end_part,
                "on_header_field": self._add_name,
                "on_header_value": self._add_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._end_headers,
                "on_end": self._end,
            },
        )

    @property
    def num_waiting(self) -> int:
        """Bytes of the file that were not taken."""
        return len(self._file_data)

    def feed(self, data: bytes) -> None:
        """Reads on; ApiError if it is no form, or one with too much in it."""
        try:
            self._parser.write(data)
        except exceptions.FormParserError as error:
            raise _malformed(str(error)) from error

    def take(self) -> bytes:
        """Bytes of the file that came in since the last call."""
        data = bytes(self._file_data)
        self._file_data.clear()
        return data

    def _begin_part(self) -> None:
        self._num_parts += 1
        if self._num_parts > _MAX_FIELDS:
            raise _malformed(f"it has more than {_MAX_FIELDS} fields")
        self._disposition = b""
        self._value.clear()

    def _add_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _add_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _end_header(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = self._header_value
        self._header_name = self._header_value = b""

    def _end_headers(self) -> None:
        options = parse_options_header(self._disposition)[1]
        self._name = options.get(b"name", b"").decode(errors="replace")
        self._is_file = self._name == "file" and b"filename" in options
        if self._name in self.fields or (self._is_file and self.filename is not None):
            raise _malformed(f"it has {self._name[:80]!r} twice")
        if self._is_file:
            self.filename = options[b"filename"].decode(errors="replace")

    def _add(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self._file_data += data[start:end]
            return
        self._value += data[start:end]
        if len(self._value) > _MAX_FIELD_BYTES:
            raise _malformed(
                f"the field {self._name[:80]!r} has more than {_MAX_FIELD_BYTES} bytes (a file "
                "needs the name 'file' and a filename)"
            )

    def _end_part(self) -> None:
        if not self._is_file:
            self.fields[self._name] = self._value.decode(errors="replace")

    def _end(self) -> None:
        self.ended = True


async def receive(
    stream: AsyncIterator[bytes], content_type: str, upload: files.Upload
) -> files.FileInfo:
    """Reads the form of `POST /v1/files` and stores its file.

    Args:
        stream: The body.
        content_type: The request's header.
        upload: Where the file goes.

    Raises:
        ApiError: The form is malformed, too big or not for a batch, the client is too slow, or
            the disk is full.
    """
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 0 < len(boundary) <= 256:
        raise ApiError(
            "a file is uploaded as multipart/form-data with the fields purpose and file",
            code="invalid_form",
        )
    form = _Form(boundary)
    num_bytes, limit = 0, upload.max_bytes + OVERHEAD_BYTES
    began = time.monotonic()
    chunks = aiter(stream)
    while (chunk := await _next(chunks, began + num_bytes / _LEAST_BYTES_PER_S)) is not None:
        num_bytes += len(chunk)
        if num_bytes > limit:
            raise files.too_large(upload.max_bytes)
        form.feed(chunk)
        if form.num_waiting >= _BUFFER_BYTES:
            await asyncio.to_thread(upload.write, form.take())
    if not form.ended:
        raise _malformed("it ends in the middle")
    await asyncio.to_thread(upload.write, form.take())
    _check_fields(form)
    assert form.filename is not None
    return await asyncio.to_thread(upload.commit, filename=form.filename)


async def _next(chunks: AsyncIterator[bytes], due: float) -> bytes | None:
    """The next bytes, unless they are later than `_IDLE_S` after they were due."""
    try:
        async with asyncio.timeout(min(due - time.monotonic(), 0.0) + _IDLE_S):
            return await anext(chunks, None)
    except TimeoutError as error:
        raise ApiError(
            f"the upload is too slow: {_IDLE_S:g} s behind {_LEAST_BYTES_PER_S} bytes/s",
            code="upload_timeout",
            status_code=408,
        ) from error


def _check_fields(form: _Form) -> None:
    if form.filename is None:
        raise ApiError("file is missing from the form", param="file", code="missing_file")
    purpose = form.fields.pop("purpose", None)
    if purpose != "batch":
        raise ApiError(
            "purpose is missing from the form; it is 'batch' here"
            if purpose is None
            else f"purpose={purpose!r:.80} is not 'batch', the only one here",
            param="purpose",
            code="invalid_purpose",
        )
    for name in form.fields:
        raise ApiError(
            f"{name!r:.80} is no field of an upload, which has purpose and file",
            param=name[:80],
            code="unknown_parameter",
        )


def _malformed(why: str) -> ApiError:
    return ApiError(f"the form is malformed: {why}", code="invalid_form")
