"""A gateway, a proxy and a client in one event loop, for tests of split sessions."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import shaping_proxy
import split_model

from nanoflow_jax import request
from nanoflow_jax.serve import keys
from nanoflow_jax.split import client, gateway, messages, settings, transport
from nanoflow_jax.split.codecs import Codec
from nanoflow_jax.split.weights import giver

TOKEN = "a token"
PATIENCE_S = 60.0
PROMPT = tuple(range(1, 60))
PARAMS = request.SamplingParams(max_tokens=24, temperature=0.8, seed=5, ignore_eos=True)


def with_params(**changes: Any) -> request.SamplingParams:
    """`PARAMS` with changes."""
    return dataclasses.replace(PARAMS, **changes)


def run(body: Coroutine[Any, Any, None]) -> None:
    """Runs a test's body; nothing may hang."""

    async def limited() -> None:
        async with asyncio.timeout(2 * PATIENCE_S):
            await body

    asyncio.run(limited())


async def until(condition: Callable[[], object]) -> None:
    """Waits until a condition holds."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.005)


@dataclasses.dataclass(kw_only=True)
class Ends:
    """Both ends of a link, and what shapes it.

    Attributes:
        engine: The gateway's.
        gateway: It.
        proxy: In between.
        client_engine: The client's.
        client: It.
    """

    engine: split_model.ToyEngine
    gateway: gateway.Gateway
    proxy: shaping_proxy.ShapingProxy
    client_engine: split_model.ToyEngine
    client: client.SplitClient

    async def at_baseline(self) -> None:
        """Waits until nothing is left of any session, at either end."""
        await until(lambda: self.gateway.num_sessions == 0)
        await until(lambda: not self.engine.open_pieces and not self.client_engine.open_pieces)
        await until(lambda: self.gateway.waiting_bytes == 0)


@contextlib.asynccontextmanager
async def serving(
    engine: split_model.ToyEngine,
    *,
    identity: messages.Identity = split_model.IDENTITY,
    endpoint: transport.Endpoint | None = None,
    weights: giver.Giver | None = None,
    borders: tuple[int, ...] | None = None,
    **limits: Any,
) -> AsyncIterator[gateway.Gateway]:
    """A gateway that wants `TOKEN`, on a free port."""
    made = gateway.Gateway(
        engine,
        identity,
        limits=settings.GatewaySection(**limits),
        keys=keys.ApiKeys([TOKEN]),
        weights=weights,
        borders=borders,
    )
    async with made.serving(endpoint or transport.Endpoint(host="127.0.0.1", port=0)):
        yield made


def client_of(
    endpoint: transport.Endpoint,
    identity: messages.Identity = split_model.IDENTITY,
    *,
    engine: split_model.ToyEngine | None = None,
    held_layers: tuple[tuple[int, int], ...] = ((0, split_model.NUM_LAYERS),),
    codecs: tuple[Codec, ...] = (Codec.F32,),
    **knobs: Any,
) -> client.SplitClient:
    """A client with small chunks that does not wait long between attempts."""
    return client.SplitClient(
        endpoint,
        identity,
        engine=engine or split_model.ToyEngine(),
        held_layers=held_layers,
        codecs=codecs,
        knobs=settings.ClientSection(**({"chunk_len": 8, "backoff_s": 0.01} | knobs)),
    )


@contextlib.asynccontextmanager
async def ends(
    *,
    engine: split_model.ToyEngine | None = None,
    client_engine: split_model.ToyEngine | None = None,
    identity: messages.Identity = split_model.IDENTITY,
    token: str = TOKEN,
    codecs: tuple[Codec, ...] = (Codec.F32,),
    knobs: dict[str, Any] | None = None,
    **limits: Any,
) -> AsyncIterator[Ends]:
    """Both ends, with a proxy between them.

    Args:
        engine: The gateway's.
        client_engine: The client's.
        identity: What the client says of its model.
        token: What it shows.
        codecs: That it knows.
        knobs: Of the client.
        limits: Knobs of the gateway.
    """
    engine = engine or split_model.ToyEngine()
    client_engine = client_engine or split_model.ToyEngine()
    async with (
        serving(engine, **limits) as served,
        shaping_proxy.ShapingProxy(served.port) as proxy,
        client_of(
            transport.Endpoint(host="127.0.0.1", port=proxy.port, token=token),
            identity,
            engine=client_engine,
            codecs=codecs,
            **(knobs or {}),
        ) as driven,
    ):
        yield Ends(
            engine=engine,
            gateway=served,
            proxy=proxy,
            client_engine=client_engine,
            client=driven,
        )
