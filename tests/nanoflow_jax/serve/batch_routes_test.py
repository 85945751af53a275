"""/v1/files and /v1/batches over HTTP."""

import asyncio
import json
import pathlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import httpx
import pytest
import served_batches

from nanoflow_jax.serve import batches, files, multipart

_Scenario = Callable[[httpx.AsyncClient, batches.BatchStore], Coroutine[Any, Any, Any]]
_BATCH = {"endpoint": "/v1/completions", "completion_window": "24h"}


def _ask(
    folder: pathlib.Path,
    scenario: _Scenario,
    *,
    file_limits: files.Limits | None = None,
    runs: bool = False,
) -> Any:
    """Lets a client talk to the routes, with or without somebody who runs the batches."""

    async def talk(store: batches.BatchStore) -> Any:
        transport = httpx.ASGITransport(app=served_batches.make_app(store))
        async with (
            asyncio.timeout(60),
            httpx.AsyncClient(transport=transport, base_url="http://test") as client,
        ):
            if not runs:
                return await scenario(client, store)
            async with served_batches.running(store, served_batches.Adder()):
                return await scenario(client, store)

    with served_batches.open_store(folder, file_limits=file_limits) as store:
        return asyncio.run(talk(store))


async def _upload(
    client: httpx.AsyncClient, data: bytes = b"{}\n", name: str = "in.jsonl", **fields: str
) -> httpx.Response:
    fields = {"purpose": "batch", **fields}
    return await client.post("/v1/files", files={"file": (name, data)}, data=fields)


def _error(response: httpx.Response) -> tuple[int, str]:
    found = response.json()["error"]
    assert found.keys() == {"message", "type", "param", "code"}
    return response.status_code, found["message"]


def _jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_a_batch_from_upload_to_results(tmp_path: pathlib.Path) -> None:
    async def scenario(client: httpx.AsyncClient, store: batches.BatchStore) -> None:
        rows = [*served_batches.rows(3), {"prompt": [served_batches.REFUSED]}]
        uploaded = (await _upload(client, _jsonl(rows))).json()
        assert uploaded["object"] == "file"
        assert (uploaded["purpose"], uploaded["status"]) == ("batch", "processed")
        body = {**_BATCH, "input_file_id": uploaded["id"], "metadata": {"k": "v"}}
        response = await client.post("/v1/batches", json=body)
        assert response.status_code == 200
        made = response.json()
        assert made["object"] == "batch"
        assert made["metadata"] == {"k": "v"}
        assert made["output_file_id"] is None
        await served_batches.ended(store, made["id"])
        found = (await client.get(f"/v1/batches/{made['id']}")).json()
        assert found["status"] == "completed"
        assert found["request_counts"] == {"total": 4, "completed": 3, "failed": 1}
        assert found["created_at"] <= found["in_progress_at"] <= found["completed_at"]
        assert found["errors"] is None
        output = await client.get(f"/v1/files/{found['output_file_id']}/content")
        assert output.status_code == 200
        ids = sorted(json.loads(line)["custom_id"] for line in output.text.splitlines())
        assert ids == ["id-0", "id-1", "id-2"]
        errors = await client.get(f"/v1/files/{found['error_file_id']}/content")
        (row,) = (json.loads(line) for line in errors.text.splitlines())
        assert row["error"]["message"] == "999 is not a token id of this model"
        info = (await client.get(f"/v1/files/{found['output_file_id']}")).json()
        assert info["purpose"] == "batch_output"
        assert info["bytes"] == len(output.content)

    _ask(tmp_path, scenario, runs=True)


def test_a_batch_that_fails_says_why(tmp_path: pathlib.Path) -> None:
    async def scenario(client: httpx.AsyncClient, store: batches.BatchStore) -> None:
        file_id = (await _upload(client, b"\n")).json()["id"]
        made = (await client.post("/v1/batches", json={**_BATCH, "input_file_id": file_id})).json()
        await served_batches.ended(store, made["id"])
        found = (await client.get(f"/v1/batches/{made['id']}")).json()
        assert found["status"] == "failed"
        assert found["errors"] == {
            "object": "list",
            "data": [
                {
                    "code": "empty_file",
                    "message": "the input file has no rows",
                    "param": None,
                    "line": None,
                }
            ],
        }
        assert found["failed_at"] is not None

    _ask(tmp_path, scenario, runs=True)


def test_a_file_comes_back_as_it_was_sent(tmp_path: pathlib.Path) -> None:
    # Longer than every buffer on the way, and with what separates parts in it.
    data = b'{"x": "--boundary\r\n"}\r\n' * 200_000

    async def scenario(client: httpx.AsyncClient, store: batches.BatchStore) -> None:
        uploaded = (await _upload(client, data, name="../a b.jsonl")).json()
        assert uploaded["bytes"] == len(data)
        assert uploaded["filename"] == "../a b.jsonl"
        found = await client.get(f"/v1/files/{uploaded['id']}/content")
        assert found.content == data
        assert found.headers["content-length"] == str(len(data))
        assert uploaded["id"] in found.headers["content-disposition"]

    _ask(tmp_path, scenario)


def test_a_form_in_pieces_of_any_size_is_read(tmp_path: pathlib.Path) -> None:
    body = (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n'
        b"Content-Type: text/plain\r\n\r\none\r\ntwo\r\n"
        b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b--\r\n'
    )

    async def scenario(client: httpx.AsyncClient, store: batches.BatchStore) -> None:
        for size in (1, 2, 7, 1000):

            async def pieces(size: int = size) -> AsyncIterator[bytes]:
                for start in range(0, len(body), size):
                    yield body[start : start + size]

            headers = {"content-type": "multipart/form-data; boundary=b"}
            response = await client.post("/v1/files", content=pieces(), headers=headers)
            assert response.status_code == 200, response.text
            content = await client.get(f"/v1/files/{response.json()['id']}/content")
            assert content.content == b"one\r\ntwo"

    _ask(tmp_path, scenario)


def _form(*parts: tuple[str, str], end: str = "--b--\r\n") -> bytes:
    return (
        "".join(
            f"--b\r\nContent-Disposition: form-data; {head}\r\n\r\n{value}\r\n"
            for head, value in parts
        ).encode()
        + end.encode()
    )


_FILE = ('name="file"; filename="a"', "x")
_PURPOSE = ('name="purpose"', "batch")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (_form(_PURPOSE), "file is missing from the form"),
        (_form(_FILE), "purpose is missing from the form; it is 'batch' here"),
        (_form(_FILE, ('name="purpose"', "assistants")), "purpose='assistants' is not 'batch'"),
        (_form(_FILE, _PURPOSE, ('name="x"', "1")), "'x' is no field of an upload"),
        (_form(_FILE, _FILE, _PURPOSE), "the form is malformed: it has 'file' twice"),
        (_form(_FILE, _PURPOSE, _PURPOSE), "it has 'purpose' twice"),
        (_form(('name="file"', "y" * 5000), _PURPOSE), "a file needs the name 'file' and a filena"),
        (_form(('name="file"; filename="a"', ""), _PURPOSE), "the file is empty"),
        (_form(*[(f'name="x{i}"', "1") for i in range(20)]), "it has more than 16 fields"),
        (_form(_FILE, _PURPOSE, end=""), "it ends in the middle"),
        (b"", "it ends in the middle"),
        (b"garbage", "the form is malformed"),
        (b"--b\r\nContent-Disposition: " + b"x" * 10_000, "the form is malformed"),
    ],
)
def test_a_malformed_form_is_refused_and_leaves_nothing(
    tmp_path: pathlib.Path, body: bytes, message: str
) -> None:
    async def scenario(client: httpx.AsyncClient, store: batches.BatchStore) -> None:
        headers = {"content-type": "multipart/form-data; boundary=b"}
        response = await client.post("/v1/files", content=body, headers=headers)
        status, said = _error(response)
        assert (status, message in said) == (400, True), said
        assert store.files.all() == []

    _ask(tmp_path, scenario)
    assert list((tmp_path / "files").iterdir()) == []


@pytest.mark.parametrize(
    "kind", ["", "application/json", "multipart/form-data", "multipart/form-data; boundary="]
)
def test_an_upload_that_is_no_form_is_refused(tmp_path: pathlib.Path, kind: str) -> None:
    async def scenario(client: httpx.AsyncClient, store: batches.BatchStore) -> None:
        headers = {"content-type": kind}
        response = await client.post("/v1/files", content=b"{}", headers=headers)
        assert _error(response) == (
            400,
            "a file is uploaded as multipart/form-data with the fields purpose and file",
        )

    _ask(tmp_path, scenario)


def test_c13_an_upload_above_the_size_is_refused_while_it_comes_in(tmp_path: pathlib.Path) -> None:
    sent = 0
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        yield head
        while True:
            sent += 1 << 16
            yield b"x" * (1 << 16)

    async def scenario(client: httpx.AsyncClient, store: batches.BatchStore) -> None:
        big = b"x" * 2_000_000
        for response in (
            await _upload(client, big),
            await client.post(
                "/v1/files",
                content=endless(),
                headers={"content-type": "multipart/form-data; boundary=b"},
            ),
        ):
            status, message = _error(response)
            assert status == 413
            assert message == "the file has more than 1000 bytes; split it into several"

    _ask(tmp_path, scenario, file_limits=files.Limits(max_file_bytes=1000))
    assert sent < 4 << 20
    assert list((tmp_path / "files").iterdir()) == []


@pytest.mark.parametrize("pause_s", [30.0, 0.01])
def test_c13_an_upload_that_stops_or_trickles_is_given_up(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, pause_s: float
) -> None:
    monkeypatch.setattr(multipart, "_IDLE_S", 0.2)

    async def slow() -> AsyncIterator[bytes]:
        while True:
            yield b"\r\n"
            await asyncio.sleep(pause_s)

    async def scenario(client: httpx.AsyncClient, store: batches.BatchStore) -> None:
        headers = {"content-type": "multipart/form-data; boundary=b"}
        response = await client.post("/v1/files", content=slow(), headers=headers)
        message = "the upload is too slow: 0.2 s behind 1024 bytes/s"
        assert _error(response) == (408, message)

    _ask(tmp_path, scenario)
    assert list((tmp_path / "files").iterdir()) == []


def test_f4_a_full_disk_is_said_and_nothing_half_visible_stays(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    async def scenario(client: httpx.AsyncClient, store: batches.BatchStore) -> None:
        with monkeypatch.context() as patched:
            patched.setattr("os.fsync", refuse)
            status, message = _error(await _upload(client))
        assert status == 507
        assert message.startswith("the server's disk is full; nothing was stored")
        assert (await client.get("/v1/files")).json()["data"] == []
        assert (await _upload(client)).status_code == 200

    _ask(tmp_path, scenario)


@pytest.mark.parametrize(
    "name", ["..%2F..%2Fetc%2Fpasswd", "%2Fetc%2Fpasswd", "file-1", "..%5C..%5C", "%00", "x" * 3000]
)
def test_c11_ids_never_lead_out_of_the_store(tmp_path: pathlib.Path, name: str) -> None:
    """C11: what a client sends is looked up and never joined to a path."""

    async def scenario(client: httpx.AsyncClient, store: batches.BatchStore) -> None:
        for method, path in (
            ("GET", f"/v1/files/{name}"),
            ("GET", f"/v1/files/{name}/content"),
            ("DELETE", f"/v1/files/{name}"),
            ("GET", f"/v1/batches/{name}"),
            ("POST", f"/v1/batches/{name}/cancel"),
        ):
            response = await client.request(method, path)
            assert response.status_code in (404, 405), path
            assert "root:" not in response.text
        body = {**_BATCH, "input_file_id": "../../../etc/passwd"}
        status, message = _error(await client.post("/v1/batches", json=body))
        assert (status, message) == (404, "there is no file '../../../etc/passwd'")

    _ask(tmp_path, scenario)


def test_a_file_is_deleted_unless_a_batch_needs_it(tmp_path: pathlib.Path) -> None:
    async def scenario(client: httpx.AsyncClient, store: batches.BatchStore) -> None:
        file_id = (await _upload(client)).json()["id"]
        made = (await client.post("/v1/batches", json={**_BATCH, "input_file_id": file_id})).json()
        status, message = _error(await client.delete(f"/v1/files/{file_id}"))
        assert (status, "a batch still reads" in message) == (409, True)
        cancelled = (await client.post(f"/v1/batches/{made['id']}/cancel")).json()
        assert cancelled["status"] == "cancelling"
        async with served_batches.running(store, served_batches.Adder()):
            await served_batches.ended(store, made["id"])
        assert _error(await client.post(f"/v1/batches/{made['id']}/cancel"))[0] == 409
        response = await client.delete(f"/v1/files/{file_id}")
        assert response.json() == {"id": file_id, "object": "file", "deleted": True}
        assert _error(await client.get(f"/v1/files/{file_id}/content"))[0] == 404

    _ask(tmp_path, scenario)


def test_lists_are_given_in_pages(tmp_path: pathlib.Path) -> None:
    async def scenario(client: httpx.AsyncClient, store: batches.BatchStore) -> None:
        ids = [(await _upload(client)).json()["id"] for _ in range(5)]
        for file_id in ids:
            response = await client.post("/v1/batches", json={**_BATCH, "input_file_id": file_id})
            assert response.status_code == 200
        for kind in ("files", "batches"):
            whole = (await client.get(f"/v1/{kind}")).json()
            known = [item["id"] for item in whole["data"]]
            assert len(known) == 5
            assert (whole["first_id"], whole["last_id"]) == (known[0], known[-1])
            assert whole["has_more"] is False
            found: list[str] = []
            after: dict[str, str] = {}
            while True:
                page = (await client.get(f"/v1/{kind}", params={"limit": "2", **after})).json()
                found += [item["id"] for item in page["data"]]
                if not page["has_more"]:
                    break
                after = {"after": page["last_id"]}
            assert found == known
            for query in ("limit=0", "limit=x", "after=none", "limit=100000"):
                assert _error(await client.get(f"/v1/{kind}?{query}"))[0] == 400
        backwards = (await client.get("/v1/files?order=asc")).json()["data"]
        assert [item["id"] for item in backwards] == list(
            reversed([item["id"] for item in (await client.get("/v1/files")).json()["data"]])
        )
        assert (await client.get("/v1/files?purpose=batch_output")).json()["data"] == []

    _ask(tmp_path, scenario)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_file_id": None}, "input_file_id=None is not the id of a file"),
        ({"endpoint": "/v1/embeddings"}, "endpoint='/v1/embeddings' is not one of /v1/comp"),
        ({"endpoint": ["/v1/completions"]}, "is not one of /v1/completions"),
        ({"completion_window": "1h"}, "completion_window='1h' is not '24h'"),
        ({"output_expires_after": {}}, "'output_expires_after' is no field of a batch"),
        ({"x\ud800": 1}, r"'x\ud800' is no field of a batch"),
        ({"input_file_id": "\ud800"}, r"there is no file '\ud800'"),
        ({"metadata": []}, "metadata is not an object of at most 16 keys"),
        ({"metadata": {"k": 1}}, "metadata is not an object"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata is not an object"),
        ({"metadata": {"k" * 65: ""}}, "keys of up to 64 characters"),
        ({"metadata": {"k": "v" * 513}}, "with texts of up to 512"),
        ({"metadata": {"k": "\ud800"}}, "metadata has a lone surrogate"),
    ],
)
def test_a_wrong_field_of_a_batch_is_refused(
    tmp_path: pathlib.Path, change: dict[str, Any], message: str
) -> None:
    async def scenario(client: httpx.AsyncClient, store: batches.BatchStore) -> None:
        body = {**_BATCH, "input_file_id": (await _upload(client)).json()["id"], **change}
        status, said = _error(await client.post("/v1/batches", content=json.dumps(body)))
        assert (status in (400, 404), message in said) == (True, True), said
        assert store.all() == []

    _ask(tmp_path, scenario)


def test_metadata_up_to_its_limits_is_kept(tmp_path: pathlib.Path) -> None:
    metadata = {f"{i:064}": "v" * 512 for i in range(16)}

    async def scenario(client: httpx.AsyncClient, store: batches.BatchStore) -> None:
        body = {**_BATCH, "input_file_id": (await _upload(client)).json()["id"]}
        made = (await client.post("/v1/batches", json={**body, "metadata": metadata})).json()
        assert made["metadata"] == metadata
        bare = (await client.post("/v1/batches", json={**body, "metadata": None})).json()
        assert bare["metadata"] is None

    _ask(tmp_path, scenario)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "the body is not JSON"),
        (b"[]", 400, "the body is not a JSON object"),
        (b"[" * 100_000, 400, "the body is not JSON"),
        (b"\xff", 400, "the body is not JSON"),
        (b" " * 300_000, 413, "the body has more than 262144 bytes"),
    ],
)
def test_a_body_that_is_no_batch_is_refused(
    tmp_path: pathlib.Path, body: bytes, status: int, message: str
) -> None:
    async def scenario(client: httpx.AsyncClient, store: batches.BatchStore) -> None:
        found = _error(await client.post("/v1/batches", content=body))
        assert (found[0], message in found[1]) == (status, True), found

    _ask(tmp_path, scenario)


def test_the_description_of_the_routes_has_every_field_and_error(tmp_path: pathlib.Path) -> None:
    with served_batches.open_store(tmp_path) as store:
        found = served_batches.make_app(store).openapi()
    upload = found["paths"]["/v1/files"]["post"]
    assert list(upload["requestBody"]["content"]) == ["multipart/form-data"]
    assert {"200", "400", "413", "429", "507"} <= upload["responses"].keys()
    batch = found["paths"]["/v1/batches"]["post"]
    schema = batch["requestBody"]["content"]["application/json"]["schema"]
    assert schema["required"] == ["input_file_id", "endpoint", "completion_window"]
    assert {"BatchObject", "FileObject"} <= found["components"]["schemas"].keys()
    download = found["paths"]["/v1/files/{file_id}/content"]["get"]
    assert list(download["responses"]["200"]["content"]) == ["application/jsonl"]
