"""What travels off this machine is encrypted, and both ends can be made to show who they are."""

import contextlib
import pathlib
import subprocess
from collections.abc import AsyncIterator

import pytest
import split_model
import split_runs

from nanoflow_jax.split import client, errors, transport
from nanoflow_jax.split.messages import Code


def _openssl(folder: pathlib.Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """An authority, and certificates of it for both ends; another authority with one client."""
    made = tmp_path_factory.mktemp("tls")
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    for authority, names in (("ca", ("server", "client")), ("other", ("stranger",))):
        _openssl(
            made, "req", "-x509", *key, "-days", "2", "-subj", f"/CN={authority}",
            "-keyout", f"{authority}.key", "-out", f"{authority}.pem",
        )  # fmt: skip
        for name in names:
            _openssl(
                made, "req", "-x509", *key, "-days", "2", "-subj", f"/CN={name}",
                "-addext", "subjectAltName=IP:127.0.0.1", "-CA", f"{authority}.pem",
                "-CAkey", f"{authority}.key", "-keyout", f"{name}.key", "-out", f"{name}.pem",
            )  # fmt: skip
    return made


def _files(folder: pathlib.Path, name: str, authority: str) -> transport.TlsFiles:
    return transport.TlsFiles(
        certificate=str(folder / f"{name}.pem") if name else "",
        key=str(folder / f"{name}.key") if name else "",
        authority=str(folder / f"{authority}.pem") if authority else "",
    )


@contextlib.asynccontextmanager
async def _ends(
    server: transport.TlsFiles, mine: transport.TlsFiles | None
) -> AsyncIterator[client.SplitClient]:
    listening = transport.Endpoint(host="127.0.0.1", port=0, tls=server)
    async with split_runs.serving(split_model.ToyEngine(), endpoint=listening) as served:
        calling = transport.Endpoint(
            host="127.0.0.1", port=served.port, token=split_runs.TOKEN, tls=mine
        )
        async with split_runs.client_of(calling, max_attempts=1) as made:
            yield made


@pytest.mark.parametrize("mutual", [False, True])
def test_session_over_tls_gives_the_same_tokens(folder: pathlib.Path, mutual: bool) -> None:
    async def body() -> None:
        server = _files(folder, "server", "ca" if mutual else "")
        mine = _files(folder, "client" if mutual else "", "ca")
        async with _ends(server, mine) as made:
            result = await made.generate((1, 2), split_runs.PARAMS, split_model.MIDDLE)
            assert result.token_ids == split_model.generate((1, 2), split_runs.PARAMS)

    split_runs.run(body())


@pytest.mark.parametrize(
    ("name", "authority"),
    [("client", "other"), ("", "ca"), ("stranger", "ca")],
    ids=["another server", "no certificate", "a certificate of another authority"],
)
def test_end_that_the_other_does_not_know_gets_nowhere(
    folder: pathlib.Path, name: str, authority: str
) -> None:
    async def body() -> None:
        server = _files(folder, "server", "ca")
        async with _ends(server, _files(folder, name, authority)) as made:
            with pytest.raises(errors.SplitError) as error:
                await made.generate((1, 2), split_runs.PARAMS, split_model.MIDDLE)
            assert error.value.code is Code.LINK

    split_runs.run(body())


@pytest.mark.parametrize("host", ["0.0.0.0", "10.1.2.3", "example.org", "::"])
def test_plaintext_off_this_machine_must_be_asked_for(host: str) -> None:
    with pytest.raises(ValueError, match=f"{host} is not this machine: hidden states and tokens"):
        transport.Endpoint(host=host, port=1)
    assert transport.Endpoint(host=host, port=1, allow_plaintext=True).port == 1


@pytest.mark.parametrize(
    ("host", "address"),
    [("127.0.0.1", "127.0.0.1:1"), ("localhost", "localhost:1"), ("::1", "[::1]:1")],
)
def test_plaintext_on_this_machine_need_not_be_asked_for(host: str, address: str) -> None:
    assert transport.Endpoint(host=host, port=1).address == address


def test_token_is_not_in_what_is_printed() -> None:
    assert "secret" not in repr(transport.Endpoint(host="::1", port=1, token="secret"))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (transport.TlsFiles(certificate="a"), "a certificate needs its key"),
        (transport.TlsFiles(certificate="none", key="none"), "TLS: none cannot be read"),
        (transport.TlsFiles(), "a gateway needs a certificate and its key"),
    ],
)
def test_tls_files_that_will_not_do_are_named(files: transport.TlsFiles, message: str) -> None:
    async def body() -> None:
        endpoint = transport.Endpoint(host="127.0.0.1", port=0, tls=files)
        with pytest.raises(ValueError, match=message):
            async with split_runs.serving(split_model.ToyEngine(), endpoint=endpoint):
                pass

    split_runs.run(body())


def test_port_that_is_taken_is_named() -> None:
    async def body() -> None:
        async with split_runs.serving(split_model.ToyEngine()) as served:
            endpoint = transport.Endpoint(host="127.0.0.1", port=served.port)
            with pytest.raises(ValueError, match=f"127.0.0.1:{served.port} cannot be listened on"):
                async with split_runs.serving(split_model.ToyEngine(), endpoint=endpoint):
                    pass

    split_runs.run(body())
