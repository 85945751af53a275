"""The server's application with all its routes, without an engine behind it."""

import contextlib
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import fastapi

from nanoflow_jax import config
from nanoflow_jax.engine_process import client
from nanoflow_jax.serve import (
    app,
    batch_routes,
    batches,
    files,
    gate,
    keys,
    metrics,
    page_routes,
    service,
)
from nanoflow_jax.tokenizer import words


@contextlib.contextmanager
def make(
    folder: pathlib.Path, api_keys: Iterable[str] = (), *more: fastapi.APIRouter
) -> Iterator[gate.Gate]:
    """The application, profiling routes included.

    Args:
        folder: Takes files and batches.
        api_keys: That it asks for.
        more: Further routers.
    """
    store = batches.BatchStore(folder / "batches", files.FileStore(folder / "files"))
    profiling = config.EngineConfig.from_knobs(profile_dir=str(folder))
    with contextlib.closing(words.Words.load(None)) as known:
        made = service.Service(
            config.ServerSection(),
            model_name="none",
            words=known,
            client=client.EngineClient(profiling, say=lambda text: None),
            metrics=metrics.Metrics(),
        )
        routers = (page_routes.make_router(), batch_routes.make_router(store), *more)
        yield app.build_app(made, api_keys=keys.ApiKeys(api_keys), more=routers)


def routes(whole: gate.Gate) -> list[tuple[str, str]]:
    """Methods and paths of all routes."""
    inner = whole._app
    assert isinstance(inner, fastapi.FastAPI)
    return list(_routes(inner.routes))


def _routes(found: Iterable[Any]) -> Iterator[tuple[str, str]]:
    for route in found:
        # Newer versions of FastAPI keep the routers that were put in.
        router = getattr(route, "original_router", None)
        if router is not None:
            yield from _routes(router.routes)
        else:
            yield from ((method, route.path) for method in sorted(route.methods))
