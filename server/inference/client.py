"""The Engine port from another process: calls over the engine's socket, typed errors raised again, reconnection.

Imports no torch."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import TypeVar

from grpc import ChannelConnectivity, StatusCode, aio

from server.domain.embeddings import EmbeddingBackend, Embeddings
from server.domain.engines import EngineStatus
from server.domain.errors import ServiceError, Unavailable, error_from_data
from server.domain.generation import (
    EmbedRole,
    GenerationFinished,
    GenerationRequest,
    ModelReference,
    QuotedText,
    RenderedPrompt,
    TokenEvent,
)
from server.domain.previews import MeasureOrder, Preview, PreviewOrder
from server.inference import wire
from server.services.codec import Codec

T = TypeVar("T")
Request = TypeVar("Request")
# A restarted engine is found again within this time, though gRPC's own back-off would grow to two minutes.
MAX_RECONNECT_SECONDS = 0.5
# How long a call waits for a connection: two attempts of the above, so that a quick restart costs time and no errors.
CONNECT_SECONDS = 1.5
# What a caller is told to wait for an engine that does not come back within that: about what loading its code takes.
RETRY_SECONDS = 5.0
# An engine that does not tell its state within this time hangs: it is not healthy, whatever the socket says.
DESCRIBE_SECONDS = 10.0
OPTIONS = (
    ("grpc.max_receive_message_length", wire.MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", wire.MAX_MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", int(MAX_RECONNECT_SECONDS * 1000)),
    # Channels to the same socket would share a connection, and one's back-off would delay another.
    ("grpc.use_local_subchannel_pool", 1),
)


class EngineClient:
    """Implements the Engine port over a unix socket. Belongs to the event loop that it is made on."""

    def __init__(self, socket_path: Path) -> None:
        self._channel = aio.insecure_channel(f"unix:{socket_path}", options=OPTIONS)

    async def close(self) -> None:
        """End the connection; calls that run are cancelled, and so the engine frees their places."""
        await self._channel.close()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent]:
        """Stream deltas, then GenerationFinished; closing the iterator cancels the call. Raises what the engine raised, or Unavailable."""
        method = self._channel.unary_stream(f"/{wire.SERVICE_NAME}/Generate", wire.GENERATE.encode, wire.GENERATE_REPLY.decode)
        await self._connect()
        call = method(request)
        try:
            async for reply in call:
                if isinstance(reply, wire.Failure):
                    raise error_from_data(reply.error)
                yield reply
                if isinstance(reply, GenerationFinished):
                    return
            raise Unavailable("The engine ended a stream too early.", reason="ENGINE_LOST", retry_after_seconds=RETRY_SECONDS)
        except aio.AioRpcError as error:
            raise _translate(error) from error
        finally:
            call.cancel()

    async def count_tokens(self, model: ModelReference, texts: Sequence[str]) -> Sequence[int]:
        """Count tokens by the model's own tokenizer, without special tokens."""
        return (await self._call("CountTokens", wire.COUNT_TOKENS, wire.CountTokens(model, tuple(texts)), wire.TokenCounts)).counts

    async def render(self, request: GenerationRequest) -> RenderedPrompt:
        """Give what the model would be given for a request; a prompt over the context is no error here."""
        return await self._call("Render", wire.GENERATE, request, RenderedPrompt)

    async def quote_texts(self, model: ModelReference, texts: Sequence[str]) -> Sequence[QuotedText]:
        """Break what the model's tokenizer or chat template would take for more than text."""
        return (await self._call("QuoteTexts", wire.QUOTE_TEXTS, wire.QuoteTexts(model, tuple(texts)), wire.QuotedTexts)).texts

    async def read_context_tokens(self, model: ModelReference) -> int:
        """Give the model's context length in tokens."""
        return (await self._call("ReadContextTokens", wire.READ_CONTEXT_TOKENS, wire.ReadContextTokens(model), wire.ContextTokens)).tokens

    async def embed(
        self, embedding_model: str, texts: Sequence[str], role: EmbedRole, backend: EmbeddingBackend = EmbeddingBackend.FLOAT32
    ) -> Embeddings:
        """Embed to unit vectors, one per text."""
        asked = wire.Embed(embedding_model, tuple(texts), role, backend)
        return wire.unpack_embeddings(await self._call("Embed", wire.EMBED, asked, wire.Vectors))

    async def rerank(self, model: str, query: str, texts: Sequence[str], timeout_seconds: float) -> Sequence[float] | None:
        """Score texts for a query by a cross-encoder; None where the time was not enough."""
        asked = wire.Rerank(model, query, tuple(texts), timeout_seconds)
        return (await self._call("Rerank", wire.RERANK, asked, wire.RerankScores)).scores

    async def preview(self, order: PreviewOrder) -> Preview:
        """Show records as a base model reads them."""
        return (await self._call("Preview", wire.PREVIEW, order, wire.Previewed)).preview

    async def load(self, model: ModelReference, *, pinned: bool = False) -> None:
        """Load a model or a version; pinned, it stays until `unload`, `forget` or a restart of the engine."""
        await self._call("Load", wire.LOAD, wire.Load(model, pinned), wire.Done)

    async def unload(self, model: ModelReference) -> None:
        """Drop a version's adapter, or weights that only it needs, and its pin."""
        await self._call("Unload", wire.UNLOAD, wire.Unload(model), wire.Done)

    async def measure(self, order: MeasureOrder) -> Sequence[Sequence[int]]:
        """Count the tokens of records by a base model's tokenizer, without its weights."""
        return (await self._call("Measure", wire.MEASURE, order, wire.Measured)).counts

    async def forget(self, model_id: str) -> None:
        """Drop what is loaded for a deleted model."""
        await self._call("Forget", wire.FORGET, wire.Forget(model_id), wire.Done)

    async def describe(self) -> EngineStatus:
        """Tell what is loaded and how busy it is; raises Unavailable while the engine is down, which makes it the health check."""
        return await self._call("Describe", wire.DESCRIBE, wire.Describe(), EngineStatus, DESCRIBE_SECONDS)

    async def _connect(self) -> None:
        """Give a lost connection time to come back: right after a restart gRPC would still fail calls until its next attempt."""
        if self._channel.get_state(try_to_connect=True) is ChannelConnectivity.READY:
            return
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await self._channel.channel_ready()
        except TimeoutError:
            raise _make_unavailable() from None

    async def _call(
        self, method: str, codec: Codec[Request], request: Request, expected: type[T], timeout_seconds: float | None = None
    ) -> T:
        call = self._channel.unary_unary(f"/{wire.SERVICE_NAME}/{method}", codec.encode, wire.UNARY_REPLY.decode)
        await self._connect()
        try:
            reply = await call(request, timeout=timeout_seconds)
        except aio.AioRpcError as error:
            raise _translate(error) from error
        if isinstance(reply, wire.Failure):
            raise error_from_data(reply.error)
        if not isinstance(reply, expected):
            raise Unavailable("The engine answered something else.", reason="ENGINE_FAILED")
        return reply


def _translate(error: aio.AioRpcError) -> ServiceError:
    """Make a broken connection a typed error. Whatever gRPC itself reports means that the engine did not do its part."""
    if error.code() in (StatusCode.UNAVAILABLE, StatusCode.CANCELLED):
        return _make_unavailable()
    return Unavailable("The engine failed on this call.", reason="ENGINE_FAILED")


def _make_unavailable() -> Unavailable:
    return Unavailable("The engine cannot be reached.", reason="ENGINE_UNAVAILABLE", retry_after_seconds=RETRY_SECONDS)
