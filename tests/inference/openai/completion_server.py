"""A small HTTP server that answers as vLLM 0.32 was recorded to, and that misbehaves as it is told. It computes nothing."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

Json = dict[str, Any]
DONE = b"data: [DONE]\n\n"


def write_event(text: str = "", *, completed: int = 1, finish: str | None = None, stop: int | str | None = None, **more: object) -> bytes:
    """Write one event as vLLM does, with the counts of `continuous_usage_stats`."""
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish, "stop_reason": stop, "token_ids": None, **more}
    usage = {"prompt_tokens": 3, "total_tokens": 3 + completed, "completion_tokens": completed}
    return b"data: " + json.dumps({"id": "cmpl-1", "object": "text_completion", "choices": [choice], "usage": usage}).encode() + b"\n\n"


def write_usage(completed: int) -> bytes:
    """Write the event before the last."""
    usage = {"prompt_tokens": 3, "total_tokens": 3 + completed, "completion_tokens": completed}
    return b"data: " + json.dumps({"id": "cmpl-1", "choices": [], "usage": usage}).encode() + b"\n\n"


def write_error(message: str, code: int) -> Json:
    """Write the body of a refusal."""
    return {"error": {"message": message, "type": "BadRequestError", "param": None, "code": code}}


def answer_with(*texts: str) -> Sequence[bytes]:
    """Write a whole answer, an event per text."""
    events = [write_event(text, completed=place, finish="length" if place == len(texts) else None) for place, text in enumerate(texts, 1)]
    return [*events, write_usage(len(texts)), DONE]


@dataclass
class CompletionServer:
    """What it answers, and what it was asked. `pieces` None: nothing is sent until the client leaves."""

    served_name: str = "llama"
    owner: str = "vllm"
    pieces: Sequence[bytes] | None = field(default_factory=lambda: answer_with("one", " two"))
    is_cut: bool = False  # the connection ends in the middle of the answer
    status: int = 200
    refusal: Json = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    is_down: bool = False
    has_adapters: bool = True
    adapters: dict[str, str] = field(default_factory=dict)
    bodies: list[Json] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    url: str = ""

    async def list_models(self, request: web.Request) -> web.StreamResponse:
        """GET /v1/models."""
        self.keys.append(request.headers.get("authorization"))
        if self.is_down:
            return web.Response(status=503)
        base = {"id": self.served_name, "owned_by": self.owner, "root": "/models/x", "parent": None, "max_model_len": 200}
        adapters = [
            {"id": name, "owned_by": self.owner, "root": path, "parent": self.served_name, "max_model_len": None}
            for name, path in self.adapters.items()
        ]
        return web.json_response({"object": "list", "data": [base, *adapters]})

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/completions."""
        body = await request.json()
        self.bodies.append(body)
        if body["model"] not in (self.served_name, *self.adapters):
            return web.json_response(write_error(f"The model `{body['model']}` does not exist.", 404), status=404)
        if self.status != 200:
            return web.json_response(self.refusal, status=self.status, headers=self.headers)
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        try:
            if self.pieces is None:
                await response.write(write_event("begun"))
                await asyncio.sleep(3600)
            for piece in self.pieces or ():
                await response.write(piece)
            if self.is_cut and request.transport is not None:
                request.transport.abort()
        except asyncio.CancelledError:
            self.gone.set()
            raise
        return response

    async def load(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/load_lora_adapter."""
        if not self.has_adapters:
            return web.json_response({"detail": "Not Found"}, status=404)
        asked = await request.json()
        name = asked["lora_name"]
        if name in self.adapters:
            return web.json_response(write_error(f"The lora adapter '{name}' has already been loaded.", 400), status=400)
        self.adapters[name] = asked["lora_path"]
        return web.Response(text="Success")

    async def unload(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/unload_lora_adapter."""
        name = (await request.json())["lora_name"]
        if self.adapters.pop(name, None) is None:
            return web.json_response(write_error(f"The lora adapter '{name}' cannot be found.", 404), status=404)
        return web.Response(text="Success")


@asynccontextmanager
async def run_server(server: CompletionServer, port: int = 0, socket: str = "") -> AsyncIterator[CompletionServer]:
    """Serve on a port of this machine, a free one where none is named, or on a unix socket."""
    application = web.Application()
    routes: dict[str, Callable[[web.Request], Awaitable[web.StreamResponse]]] = {
        "completions": server.complete,
        "load_lora_adapter": server.load,
        "unload_lora_adapter": server.unload,
    }
    application.router.add_get("/v1/models", server.list_models)
    for name, handler in routes.items():
        application.router.add_post(f"/v1/{name}", handler)
    runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.UnixSite(runner, socket) if socket else web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    server.url = str(site.name)
    try:
        yield server
    finally:
        await runner.cleanup()
