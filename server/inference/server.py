"""The engine's side of its socket: gRPC with generic handlers, domain dataclasses as messages, domain errors as data."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Protocol, TypeVar

import grpc
from grpc import aio

from server.domain.errors import ServiceError, Unavailable
from server.domain.generation import GenerationRequest
from server.domain.previews import MeasureOrder, PreviewOrder
from server.inference import wire
from server.services.codec import Codec
from server.services.model_ports import Engine, RecordMeter

T = TypeVar("T")
Reply = TypeVar("Reply")
STOP_GRACE_SECONDS = 1.0
OPTIONS = (("grpc.max_receive_message_length", wire.MAX_MESSAGE_BYTES), ("grpc.max_send_message_length", wire.MAX_MESSAGE_BYTES))

logger = logging.getLogger(__name__)


class ServedEngine(Engine, RecordMeter, Protocol):
    """An engine that lives in this process (EmbeddedEngine, RoutedEngine)."""

    def start(self) -> None:
        """Start computing; on the event loop that all calls belong to."""

    async def stop(self) -> None:
        """End: requests that still run fail as Unavailable."""


async def serve(engine: ServedEngine, socket_path: Path, *, stop: asyncio.Event, on_ready: Callable[[], None] = lambda: None) -> None:
    """Serve an engine on a unix socket until `stop` is set; calls `on_ready` once it can be reached. Replaces a dead engine's socket."""
    socket_path.parent.mkdir(parents=True, exist_ok=True)
    socket_path.unlink(missing_ok=True)
    engine.start()
    server = aio.server(options=OPTIONS)
    server.add_generic_rpc_handlers((_make_handlers(engine),))
    server.add_insecure_port(f"unix:{socket_path}")
    try:
        await server.start()
        # Whoever may open the socket may use every model: only this user.
        socket_path.chmod(0o600)
        on_ready()
        await stop.wait()
    finally:
        await server.stop(STOP_GRACE_SECONDS)
        await engine.stop()


def _make_handlers(engine: ServedEngine) -> grpc.GenericRpcHandler:
    async def count_tokens(request: wire.CountTokens) -> wire.UnaryReply:
        return wire.TokenCounts(tuple(await engine.count_tokens(request.model, request.texts)))

    async def render(request: GenerationRequest) -> wire.UnaryReply:
        return await engine.render(request)

    async def quote_texts(request: wire.QuoteTexts) -> wire.UnaryReply:
        return wire.QuotedTexts(tuple(await engine.quote_texts(request.model, request.texts)))

    async def read_context_tokens(request: wire.ReadContextTokens) -> wire.UnaryReply:
        return wire.ContextTokens(await engine.read_context_tokens(request.model))

    async def embed(request: wire.Embed) -> wire.UnaryReply:
        return wire.pack_embeddings(await engine.embed(request.embedding_model, request.texts, request.role, request.backend))

    async def rerank(request: wire.Rerank) -> wire.UnaryReply:
        return wire.RerankScores(await engine.rerank(request.model, request.query, request.texts, request.timeout_seconds))

    async def preview(request: PreviewOrder) -> wire.UnaryReply:
        return wire.Previewed(await engine.preview(request))

    async def load(request: wire.Load) -> wire.UnaryReply:
        await engine.load(request.model, pinned=request.pinned)
        return wire.Done()

    async def unload(request: wire.Unload) -> wire.UnaryReply:
        await engine.unload(request.model)
        return wire.Done()

    async def measure(request: MeasureOrder) -> wire.UnaryReply:
        return wire.Measured(tuple(map(tuple, await engine.measure(request))))

    async def forget(request: wire.Forget) -> wire.UnaryReply:
        await engine.forget(request.model_id)
        return wire.Done()

    async def describe(_: wire.Describe) -> wire.UnaryReply:
        return await engine.describe()

    return grpc.method_handlers_generic_handler(
        wire.SERVICE_NAME,
        {
            "Generate": grpc.unary_stream_rpc_method_handler(_handle_generate(engine)),
            "CountTokens": _handle_unary(wire.COUNT_TOKENS, count_tokens),
            "Render": _handle_unary(wire.GENERATE, render),
            "QuoteTexts": _handle_unary(wire.QUOTE_TEXTS, quote_texts),
            "ReadContextTokens": _handle_unary(wire.READ_CONTEXT_TOKENS, read_context_tokens),
            "Embed": _handle_unary(wire.EMBED, embed),
            "Rerank": _handle_unary(wire.RERANK, rerank),
            "Preview": _handle_unary(wire.PREVIEW, preview),
            "Measure": _handle_unary(wire.MEASURE, measure),
            "Load": _handle_unary(wire.LOAD, load),
            "Unload": _handle_unary(wire.UNLOAD, unload),
            "Forget": _handle_unary(wire.FORGET, forget),
            "Describe": _handle_unary(wire.DESCRIBE, describe),
        },
    )


def _handle_generate(engine: ServedEngine) -> Callable[[bytes, "aio.ServicerContext[bytes, bytes]"], Awaitable[None]]:
    async def handle(data: bytes, context: "aio.ServicerContext[bytes, bytes]") -> None:
        # `write` waits while the reader is slow; a client that goes cancels this coroutine, which closes the engine's iterator.
        try:
            async with aclosing(engine.generate(wire.GENERATE.decode(data))) as events:
                async for event in events:
                    await context.write(wire.GENERATE_REPLY.encode(event))
        except Exception as error:  # the border: nothing leaves but data
            await context.write(wire.GENERATE_REPLY.encode(wire.Failure(_to_service_error(error).data)))

    return handle


def _handle_unary(codec: Codec[T], answer: Callable[[T], Awaitable[wire.UnaryReply]]) -> "grpc.RpcMethodHandler[bytes, bytes]":
    async def handle(data: bytes, _: "aio.ServicerContext[bytes, bytes]") -> bytes:
        try:
            return wire.UNARY_REPLY.encode(await answer(codec.decode(data)))
        except Exception as error:  # the border: nothing leaves but data
            return wire.UNARY_REPLY.encode(wire.Failure(_to_service_error(error).data))

    return grpc.unary_unary_rpc_method_handler(handle)


def _to_service_error(error: Exception) -> ServiceError:
    if isinstance(error, ServiceError):
        return error
    logger.error("the engine failed on a call", exc_info=error)
    return Unavailable("The engine failed on this call.", reason="ENGINE_FAILED")
