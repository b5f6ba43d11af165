"""The HTTP application: OpenAI's chat completions and completions, models, vectors, health and metrics."""

from __future__ import annotations

import secrets
import sys
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from steertune.recipes.lab.forms import has_template
from steertune.recipes.serving.bodies import read_body
from steertune.recipes.serving.effect_routes import effect_routes
from steertune.recipes.serving.errors import ApiError
from steertune.recipes.serving.explorer import explorer_route
from steertune.recipes.serving.metrics import Metrics
from steertune.recipes.serving.names import BASE
from steertune.recipes.serving.replies import stream, whole
from steertune.recipes.serving.schema import ChatRequest, CompletionRequest
from steertune.recipes.serving.service import Service
from steertune.recipes.serving.vector_routes import vector_routes


def create_app(service: Service) -> FastAPI:
    """The application of a service; shutting it down stops the service."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.stop()

    # FastAPI's interactive documentation loads scripts from other servers
    app = FastAPI(title="steertune", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_Counted, metrics=service.metrics)
    if service.settings.hosts is not None:  # a website can point its own name at this machine (DNS rebinding)
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*service.settings.hosts], www_redirect=False)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _failure)
    guarded = [Depends(_Guard(service.settings.key))]
    app.include_router(vector_routes(service), dependencies=guarded)
    app.include_router(effect_routes(service), dependencies=guarded)
    app.include_router(explorer_route(service))
    _add_answers(app, service, guarded)
    _add_models(app, service, guarded)
    _add_state(app, service, guarded)
    return app


def _add_answers(app: FastAPI, service: Service, guarded: list[Any]) -> None:
    async def answered(body: ChatRequest | CompletionRequest, request: Request) -> Any:
        started = await service.start(body)
        if not body.stream:
            return JSONResponse(await whole(started, request))
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        return StreamingResponse(stream(started, with_usage), media_type="text/event-stream")

    @app.post("/v1/chat/completions", dependencies=guarded)
    async def chat(request: Request) -> Any:
        return await answered(await read_body(request, service, ChatRequest), request)

    @app.post("/v1/completions", dependencies=guarded)
    async def completions(request: Request) -> Any:
        return await answered(await read_body(request, service, CompletionRequest), request)


def _add_models(app: FastAPI, service: Service, guarded: list[Any]) -> None:
    def models() -> list[dict[str, Any]]:
        names = [service.settings.name, *(f"{BASE}+{name}" for name in service.vectors.named)]
        chat = has_template(service.tokenizer)  # whether it takes messages; not one of OpenAI's fields
        return [{"id": name, "object": "model", "created": 0, "owned_by": "steertune", "chat": chat} for name in names]

    @app.get("/v1/models", dependencies=guarded)
    async def listed() -> dict[str, Any]:
        return {"object": "list", "data": models()}

    @app.get("/v1/models/{name:path}", dependencies=guarded)
    async def one(name: str) -> dict[str, Any]:
        for model in models():
            if model["id"] == name:
                return model
        names = [model["id"] for model in models()]
        raise ApiError(404, f"No model {name!r:.80} is served. It can be one of {names}.", "model_not_found")


def _add_state(app: FastAPI, service: Service, guarded: list[Any]) -> None:
    @app.get("/health")
    async def health() -> Any:
        engine, error = service.worker.engine, service.worker.error
        state = {"status": "ok" if error is None else "failed", "running": engine.running}
        return JSONResponse(state | {"waiting": service.worker.waiting}, 200 if error is None else 503)

    @app.get("/metrics", dependencies=guarded)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=service.metrics.content_type)


class _Guard:
    """Refuses requests without the key, if there is one."""

    def __init__(self, key: str | None) -> None:
        self.key = key

    async def __call__(self, request: Request) -> None:
        if self.key is None:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not secrets.compare_digest(given.encode(), self.key.encode()):
            raise ApiError(401, "The key is missing or wrong. Send Authorization: Bearer KEY.", "invalid_api_key")


class _Counted:
    """Counts requests by endpoint and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                endpoint = "none" if route is None else route.path
                self.metrics.requests.labels(endpoint, message["status"]).inc()
            await send(message)

        await self.app(scope, receive, counting if scope["type"] == "http" else send)


async def _api_error(request: Request, error: Any) -> Response:
    return error.response


async def _http_error(request: Request, error: Any) -> Response:
    return ApiError(error.status_code, f"{request.method} {request.url.path!r:.80}: {error.detail}.").response


async def _failure(request: Request, error: Exception) -> Response:
    traceback.print_exception(error, file=sys.stderr)
    return ApiError(500, f"{type(error).__name__}: {error}"[:1000]).response
