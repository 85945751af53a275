"""The routes /v1/files and /v1/batches."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Annotated, Any, BinaryIO, Literal, TypeVar

import fastapi
from fastapi import responses
from starlette import requests as http
from starlette.types import Receive, Scope, Send

from nanoflow_jax.openai.errors import ApiError
from nanoflow_jax.openai.requests import Endpoint
from nanoflow_jax.serve import batch_schemas as schemas
from nanoflow_jax.serve import batches, files, multipart
from nanoflow_jax.serve.batch_record import Batch
from nanoflow_jax.serve.body import read_bytes
from nanoflow_jax.serve.schema_parts import errors

_CHUNK_BYTES = 1 << 18
_MAX_BODY_BYTES = 1 << 18
_READ_S = 20.0
_BATCH_FIELDS = ("input_file_id", "endpoint", "completion_window", "metadata")

_Item = TypeVar("_Item", files.FileInfo, Batch)
_UPLOAD_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "additionalProperties": False,
                    "properties": {
                        "file": {"type": "string", "format": "binary", "minLength": 1},
                        "purpose": {"type": "string", "enum": ["batch"]},
                    },
                }
            }
        },
    }
}
_BATCH_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["input_file_id", "endpoint", "completion_window"],
                    "additionalProperties": False,
                    "properties": {
                        "input_file_id": {"type": "string"},
                        "endpoint": {"type": "string", "enum": list(Endpoint)},
                        "completion_window": {"type": "string", "enum": [batches.WINDOW]},
                        "metadata": {
                            "type": ["object", "null"],
                            "maxProperties": batches.MAX_METADATA,
                            "propertyNames": {"maxLength": batches.MAX_KEY_LEN},
                            "additionalProperties": {
                                "type": "string",
                                "maxLength": batches.MAX_VALUE_LEN,
                            },
                        },
                    },
                }
            }
        },
    }
}


def make_router(store: batches.BatchStore) -> fastapi.APIRouter:
    """The routes over a store of batches and its files.

    They raise `ApiError`, and FastAPI's `RequestValidationError` for query parameters: the app
    makes OpenAI's error bodies of both, the latter with status 400. They take no key: that is the
    app's, too.
    """
    router = fastapi.APIRouter()
    _add_file_routes(router, store.files)
    _add_batch_routes(router, store)
    return router


def _add_file_routes(router: fastapi.APIRouter, store: files.FileStore) -> None:
    @router.post(
        "/v1/files",
        operation_id="create_file",
        openapi_extra=_UPLOAD_FORM,
        responses=errors(408, 413, 429, 503, 507),
    )
    async def create_file(request: fastapi.Request) -> schemas.FileObject:
        """Uploads the rows of a batch."""
        length = request.headers.get("content-length", "")
        most = store.limits.max_file_bytes
        if length.isdecimal() and int(length[:19]) > most + multipart.OVERHEAD_BYTES:
            raise files.too_large(most)
        content_type = request.headers.get("content-type", "")
        try:
            with store.upload() as upload:
                info = await multipart.receive(request.stream(), content_type, upload)
        except http.ClientDisconnect as error:
            raise ApiError("the client left in the middle of the upload") from error
        return schemas.FileObject.of(info)

    @router.get("/v1/files", operation_id="list_files", responses=errors())
    async def list_files(
        purpose: Annotated[str | None, fastapi.Query(max_length=64)] = None,
        limit: Annotated[int, fastapi.Query(ge=1, le=10_000)] = 10_000,
        after: Annotated[str | None, fastapi.Query(max_length=64)] = None,
        order: Literal["asc", "desc"] = "desc",
    ) -> schemas.FileList:
        """Lists files, the newest first."""
        known = await asyncio.to_thread(store.all)
        wanted = [info for info in known if purpose in (None, info.purpose)]
        if order == "asc":
            wanted.reverse()
        page, has_more = _page(wanted, limit=limit, after=after)
        return schemas.FileList(
            data=[schemas.FileObject.of(info) for info in page],
            first_id=page[0].id if page else None,
            last_id=page[-1].id if page else None,
            has_more=has_more,
        )

    @router.get("/v1/files/{file_id}", operation_id="retrieve_file", responses=errors(404))
    async def retrieve_file(file_id: str) -> schemas.FileObject:
        """Says what is known of a file."""
        return schemas.FileObject.of(await asyncio.to_thread(store.get, file_id))

    @router.delete(
        "/v1/files/{file_id}", operation_id="delete_file", responses=errors(404, 409, 503)
    )
    async def delete_file(file_id: str) -> schemas.FileDeleted:
        """Deletes a file that no batch needs."""
        await asyncio.to_thread(store.delete, file_id)
        return schemas.FileDeleted(id=file_id)

    @router.get(
        "/v1/files/{file_id}/content",
        operation_id="download_file",
        response_class=responses.StreamingResponse,
        responses={
            200: {"content": {"application/jsonl": {"schema": {"type": "string"}}}},
            **errors(404, 503),
        },
    )
    async def download_file(file_id: str) -> responses.Response:
        """Gives the bytes of a file."""
        return _FileResponse(*await asyncio.to_thread(store.open, file_id))


def _add_batch_routes(router: fastapi.APIRouter, store: batches.BatchStore) -> None:
    @router.post(
        "/v1/batches",
        operation_id="create_batch",
        openapi_extra=_BATCH_BODY,
        responses=errors(404, 408, 413, 429, 503, 507),
    )
    async def create_batch(request: fastapi.Request) -> schemas.BatchObject:
        """Makes a batch of the rows of a file."""
        body = _parse_batch(
            await read_bytes(request, most_bytes=_MAX_BODY_BYTES, timeout_s=_READ_S)
        )
        made = await asyncio.to_thread(
            store.create, body["endpoint"], body["input_file_id"], body["metadata"]
        )
        return schemas.BatchObject.of(made)

    @router.get("/v1/batches", operation_id="list_batches", responses=errors())
    async def list_batches(
        limit: Annotated[int, fastapi.Query(ge=1, le=100)] = 20,
        after: Annotated[str | None, fastapi.Query(max_length=64)] = None,
    ) -> schemas.BatchList:
        """Lists batches, the newest first."""
        known = await asyncio.to_thread(store.all)
        page, has_more = _page(known, limit=limit, after=after)
        return schemas.BatchList(
            data=[schemas.BatchObject.of(batch) for batch in page],
            first_id=page[0].id if page else None,
            last_id=page[-1].id if page else None,
            has_more=has_more,
        )

    @router.get("/v1/batches/{batch_id}", operation_id="retrieve_batch", responses=errors(404))
    async def retrieve_batch(batch_id: str) -> schemas.BatchObject:
        """Says how far a batch is."""
        return schemas.BatchObject.of(await asyncio.to_thread(store.get, batch_id))

    @router.post(
        "/v1/batches/{batch_id}/cancel",
        operation_id="cancel_batch",
        responses=errors(404, 409, 503, 507),
    )
    async def cancel_batch(batch_id: str) -> schemas.BatchObject:
        """Ends a batch early; its finished rows are kept."""
        return schemas.BatchObject.of(await asyncio.to_thread(store.cancel, batch_id))


class _FileResponse(responses.StreamingResponse):
    """The bytes of an open file, which it closes."""

    def __init__(self, info: files.FileInfo, file: BinaryIO) -> None:
        super().__init__(
            _read(file),
            media_type="application/jsonl",
            headers={
                "content-length": str(info.bytes),
                # The client's own name is not repeated in a header; the id is ours.
                "content-disposition": f'attachment; filename="{info.id}.jsonl"',
                "x-content-type-options": "nosniff",
            },
        )
        self._open_file = file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._open_file.close()


async def _read(file: BinaryIO) -> AsyncIterator[bytes]:
    while chunk := await asyncio.to_thread(file.read, _CHUNK_BYTES):
        yield chunk


def _page(found: Sequence[_Item], *, limit: int, after: str | None) -> tuple[Sequence[_Item], bool]:
    """What comes after an item, and whether there is more."""
    start = 0
    if after is not None:
        places = [i for i, item in enumerate(found) if item.id == after]
        if not places:
            raise ApiError(f"after={after!r:.80} is not in the list", param="after")
        start = places[0] + 1
    return found[start : start + limit], len(found) > start + limit


def _parse_batch(data: bytes) -> dict[str, Any]:
    """The fields of a new batch, all of them there and checked."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is not JSON: {error!s:.200}", code="invalid_json") from error
    if not isinstance(body, dict):
        raise ApiError("the body is not a JSON object", code="invalid_json")
    for name in body:
        if name not in _BATCH_FIELDS:
            raise ApiError(
                f"{name!r:.80} is no field of a batch, which has {', '.join(_BATCH_FIELDS)}",
                # A lone surrogate could not be sent back.
                param=name[:80].encode(errors="replace").decode(),
                code="unknown_parameter",
            )
    file_id, endpoint = body.get("input_file_id"), body.get("endpoint")
    if not isinstance(file_id, str):
        raise ApiError(
            f"input_file_id={file_id!r:.80} is not the id of a file", param="input_file_id"
        )
    if endpoint not in list(Endpoint):
        raise ApiError(
            f"endpoint={endpoint!r:.80} is not one of {', '.join(Endpoint)}", param="endpoint"
        )
    if body.get("completion_window") != batches.WINDOW:
        raise ApiError(
            f"completion_window={body.get('completion_window')!r:.80} is not {batches.WINDOW!r}",
            param="completion_window",
        )
    metadata = body.get("metadata")
    return {
        "input_file_id": file_id,
        "endpoint": Endpoint(endpoint),
        "metadata": _metadata({} if metadata is None else metadata),
    }


def _metadata(found: Any) -> Mapping[str, str]:
    most = (
        f"an object of at most {batches.MAX_METADATA} keys of up to {batches.MAX_KEY_LEN} "
        f"characters, with texts of up to {batches.MAX_VALUE_LEN}"
    )
    is_ok = (
        isinstance(found, dict)
        and len(found) <= batches.MAX_METADATA
        and all(len(key) <= batches.MAX_KEY_LEN for key in found)
        and all(isinstance(v, str) and len(v) <= batches.MAX_VALUE_LEN for v in found.values())
    )
    if not is_ok:
        raise ApiError(f"metadata is not {most}", param="metadata")
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ApiError("metadata has a lone surrogate", param="metadata") from error
    return found
