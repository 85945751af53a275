"""A gateway that gives weights away, a proxy, and fetches through it, for tests."""

import contextlib
import io
import pathlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
import shaping_proxy
import split_model
import split_runs

from checkpoints import content
from checkpoints.folder import ModelFolder
from nanoflow_jax import config as config_lib
from nanoflow_jax.engine import model_source
from nanoflow_jax.models import huggingface
from nanoflow_jax.split import gateway, identity, messages, settings, transport
from nanoflow_jax.split.weights import fetch, giver

LAYERS = ((0, 1), (3, 4))
# What chunks and frames of these sizes have beside bytes of weights is less.
CHUNK_BYTES = 1024


def identity_of(
    path: pathlib.Path, layers: Sequence[tuple[int, int]] | None = None
) -> messages.Identity:
    """Of a folder; the hashes are kept in the user's cache."""
    section = config_lib.ModelSection(model=str(path))
    source = model_source.open_model(section)
    return identity.of(section, source, np.dtype(np.float32), layers=layers)


def giver_of(path: pathlib.Path, shared: Sequence[str] = ("all",), **limits: Any) -> giver.Giver:
    """Gives away what is in a folder, in small chunks."""
    folder = ModelFolder.open(path)
    return giver.Giver(
        folder,
        huggingface.read_config(folder.config),
        identity_of(path),
        shared,
        limits=settings.GatewaySection(**({"max_payload_bytes": CHUNK_BYTES} | limits)),
    )


@contextlib.asynccontextmanager
async def sharing(
    path: pathlib.Path, shared: Sequence[str] = ("all",), **limits: Any
) -> AsyncIterator[gateway.Gateway]:
    """A gateway that gives away what is in a folder, to who shows `split_runs.TOKEN`."""
    weights = giver_of(path, shared, **limits)
    async with split_runs.serving(split_model.ToyEngine(), weights=weights, **limits) as served:
        yield served


@contextlib.asynccontextmanager
async def ends(
    path: pathlib.Path, shared: Sequence[str] = ("all",), **limits: Any
) -> AsyncIterator[tuple[gateway.Gateway, shaping_proxy.ShapingProxy]]:
    """Such a gateway behind a proxy."""
    async with (
        sharing(path, shared, **limits) as served,
        shaping_proxy.ShapingProxy(served.port) as proxy,
    ):
        yield served, proxy


async def fetch_into(
    output: pathlib.Path,
    port: int,
    *,
    layers: Sequence[tuple[int, int]] = LAYERS,
    token: str = split_runs.TOKEN,
    **knobs: Any,
) -> str:
    """Fetches; returns what was shown meanwhile."""
    said = io.StringIO()
    await fetch.fetch(
        transport.Endpoint(host="127.0.0.1", port=port, token=token),
        layers,
        output,
        knobs=settings.ClientSection(**({"backoff_s": 0.01} | knobs)),
        tell=lambda text: said.write(f"{text}\n") and None,
        stream=said,
    )
    return said.getvalue()


def partial_bytes(output: pathlib.Path) -> int:
    """Bytes of parts that are not whole yet."""
    return sum(path.stat().st_size for path in output.glob(".*.safetensors.partial"))


async def until_partial(output: pathlib.Path, at_least: int = 4 * CHUNK_BYTES) -> None:
    """Waits until a part is under way."""
    await split_runs.until(lambda: output.is_dir() and partial_bytes(output) >= at_least)


def check_whole(output: pathlib.Path, path: pathlib.Path) -> None:
    """The fetched folder is what the layers of the other are, and no file is left over."""
    assert identity_of(output, LAYERS).parts == identity_of(path, LAYERS).parts
    assert identity_of(output, LAYERS).tokenizer_sha256 == identity_of(path).tokenizer_sha256
    assert not list(output.glob(".*"))
    names = {found.name for found in output.glob("*.safetensors")}
    assert names == {f"{content.file_sha256(output / name)}.safetensors" for name in names}
