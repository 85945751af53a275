"""The routes beside completions: models, words, health, metrics, traces."""

import asyncio
import importlib.metadata
import pathlib
import time
from typing import Any

import fastapi
from starlette.requests import Request
from starlette.responses import Response

from nanoflow_jax.openai import requests
from nanoflow_jax.openai.errors import ApiError
from nanoflow_jax.serve import body, completion_schemas, completions, memory, schemas
from nanoflow_jax.serve import service as service_lib

JsonResponse = completions.JsonResponse
# Tokens up to this number become text at once: a thread costs more.
_FEW_TOKENS = 2000


def router(service: service_lib.Service, *, needs_key: bool = False) -> fastapi.APIRouter:
    """All routes of a server but those of its page, its files and its batches.

    Args:
        service: What they share.
        needs_key: Whether clients need a key, for the page to say.
    """
    made = fastapi.APIRouter()
    words = service.words

    @made.post("/v1/completions", **completion_schemas.completions(service.model_name))
    async def create_completion(http: Request) -> Response:
        """Continues one or several prompts."""
        return await completions.answer(service, requests.Endpoint.COMPLETIONS, http)

    @made.post("/v1/chat/completions", **completion_schemas.chat(service.model_name))
    async def create_chat_completion(http: Request) -> Response:
        """Answers a conversation."""
        return await completions.answer(service, requests.Endpoint.CHAT, http)

    @made.get("/v1/models", **schemas.models())
    async def list_models() -> Response:
        """The one model that is served."""
        return JsonResponse({"object": "list", "data": [_model(service)]})

    @made.get("/v1/models/{model:path}", **schemas.model())
    async def retrieve_model(model: str) -> Response:
        """The model, by its name."""
        service.check_model(model)
        return JsonResponse(_model(service))

    @made.post("/tokenize", **schemas.tokenize(service.model_name))
    async def tokenize(http: Request) -> Response:
        """Token ids of a text or of a conversation."""
        fields = await _read(service, http)
        request, with_texts = _tokenize_request(service, fields)
        ready = service.check_ready()
        ids = await service.encode(request, check=False)
        shown: dict[str, Any] = {
            "count": len(ids[0]),
            "max_model_len": ready.max_context_len,
            "tokens": ids[0],
        }
        if with_texts:
            assert words.tokenizer is not None
            spelling = words.tokenizer.id_to_token
            shown["token_strs"] = await asyncio.to_thread(lambda: list(map(spelling, ids[0])))
        return JsonResponse(shown)

    @made.post("/detokenize", **schemas.detokenize(service.model_name))
    async def detokenize(http: Request) -> Response:
        """The text of token ids."""
        fields = await _read(service, http)
        tokens = fields.pop("tokens", None)
        for name in fields:
            raise ApiError(
                f"{name!r:.80} is no field of /detokenize, which has model and tokens",
                param=name[:80],
                code="unknown_parameter",
            )
        if isinstance(tokens, list) and len(tokens) <= _FEW_TOKENS:
            text = _detokenized(service, tokens)
        else:
            text = await asyncio.to_thread(_detokenized, service, tokens)
        return JsonResponse({"prompt": text})

    @made.get("/health", **schemas.health())
    async def health() -> Response:
        """Whether requests can be served: 200, or 503 while starting or draining."""
        told: dict[str, object] = {"status": service.status}
        engine = service.client.ready
        if engine is not None and engine.sessions_at:
            sessions = service.client.load.sessions
            told["split"] = {"address": engine.sessions_at, "sessions": sessions}
        return JsonResponse(told, status_code=200 if service.status == "ready" else 503)

    @made.get("/version", **schemas.version())
    async def version() -> Response:
        """Version of the engine."""
        return JsonResponse({"version": importlib.metadata.version("nanoflow_jax")})

    @made.get("/metrics", **schemas.metrics())
    async def metrics() -> Response:
        """Counters, gauges and histograms in Prometheus' text form."""
        return Response(
            service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    @made.get("/page/stats", include_in_schema=False)
    async def page_stats() -> Response:
        """The state of the engine, as the page at / shows it."""
        return JsonResponse({**_stats(service), "needs_key": needs_key})

    if service.client.config.profile.dir:
        _add_profile_routes(made, service)
    return made


def _add_profile_routes(made: fastapi.APIRouter, service: service_lib.Service) -> None:
    folder = pathlib.Path(service.client.config.profile.dir)

    @made.post("/start_profile", **schemas.profile())
    async def start_profile() -> Response:
        """Begins to record what the device does."""
        return await _traced(service.client.start_trace(str(folder)), folder)

    @made.post("/stop_profile", **schemas.profile())
    async def stop_profile() -> Response:
        """Writes what was recorded, for xprof."""
        return await _traced(service.client.stop_trace(), folder)


async def _traced(act: Any, folder: pathlib.Path) -> Response:
    try:
        await act
    except ValueError as error:
        raise ApiError(str(error), code="profile", status_code=409) from error
    return JsonResponse({"folder": str(folder)})


async def _read(service: service_lib.Service, http: Request) -> dict[str, Any]:
    section = service.section
    fields = await body.read_object(
        http, most_bytes=section.max_body_bytes, timeout_s=section.read_timeout_s
    )
    model = fields.pop("model", None)
    if model is not None and not isinstance(model, str):
        raise ApiError(f"model={model!r:.80} is not text", param="model")
    service.check_model(model)
    return fields


def _tokenize_request(
    service: service_lib.Service, fields: dict[str, Any]
) -> tuple[requests.ApiRequest, bool]:
    with_texts = fields.pop("return_token_strs", None)
    if not isinstance(with_texts, bool | None):
        raise ApiError(
            f"return_token_strs={with_texts!r:.80} is not true or false", param="return_token_strs"
        )
    if ("prompt" in fields) == ("messages" in fields):
        raise ApiError("give either a prompt or messages", param="prompt")
    is_chat = "messages" in fields
    if not is_chat and not isinstance(fields["prompt"], str):
        raise ApiError(f"prompt={fields['prompt']!r:.80} is not text", param="prompt")
    endpoint = requests.Endpoint.CHAT if is_chat else requests.Endpoint.COMPLETIONS
    request = requests.parse(endpoint, fields, {}, tool_style=service.words.tool_style)
    return request, bool(with_texts)


def _detokenized(service: service_lib.Service, tokens: Any) -> str:
    ready = service.check_ready()
    most = schemas.MAX_DETOKENIZE
    if not isinstance(tokens, list) or len(tokens) > most:
        raise ApiError(f"tokens is not a list of at most {most} token ids", param="tokens")
    for token in tokens:
        if (
            not isinstance(token, int)
            or isinstance(token, bool)
            or not 0 <= token < ready.vocab_size
        ):
            raise ApiError(
                f"tokens: {token!r:.40} is not a token id of this model, 0 to "
                f"{ready.vocab_size - 1}",
                param="tokens",
            )
    if service.words.tokenizer is None:
        raise ApiError("this model has no tokenizer")
    return service.words.tokenizer.decode(tokens, skip_special_tokens=False)


def _model(service: service_lib.Service) -> dict[str, Any]:
    ready = service.client.ready
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.started,
        "owned_by": "nanoflow_jax",
        "max_model_len": ready.max_context_len if ready is not None else None,
    }


def _stats(service: service_lib.Service) -> dict[str, Any]:
    load, ready, totals = service.client.load, service.client.ready, service.metrics.totals
    settings = {}
    if ready is not None:
        names = ("device", "dtype", "num_pages", "page_size", "max_requests", "dense_batch")
        settings = {name: getattr(ready, name) for name in (*names, "max_context_len")}
    return {
        "now_s": time.monotonic(),
        "uptime_s": time.monotonic() - service.began,
        "status": service.status,
        "model": service.model_name,
        "settings": settings,
        "totals": {
            "prompt_tokens": load.prefill_tokens,
            "generation_tokens": load.generated_tokens,
            "requests": {name: totals[name] for name in ("stop", "length", "abort", "error")},
            "preemptions": load.preemptions,
            "late_compiles": load.late_compiles,
            "steps": load.steps,
            "step_decode_tokens": load.decode_tokens,
            "step_prefill_tokens": load.prefill_tokens,
        },
        "running": load.running,
        "waiting": load.waiting,
        "pages_used": load.pages_used,
        "pages_total": ready.num_pages if ready is not None else 0,
        "latency": service.metrics.percentiles(),
        "operations": [],
        "cpu_s": {"engine": load.cpu_s, "front": time.process_time()},
        "memory_bytes": memory.of_server(service.client.pid),
    }
