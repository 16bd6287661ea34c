"""Which engine serves which base model: one for each that is routed, one for all others. Embedding stays with the embedded engine."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Protocol

from server.domain.embeddings import EmbeddingBackend, Embeddings
from server.domain.engines import EngineStatus
from server.domain.generation import EmbedRole, GenerationRequest, ModelReference, QuotedText, RenderedPrompt, TokenEvent
from server.domain.previews import MeasureOrder, Preview, PreviewOrder
from server.inference.engine import EmbeddedEngine
from server.services.model_ports import Generator


class StoppableGenerator(Generator, Protocol):
    """A generator with an end."""

    async def stop(self) -> None:
        """End: requests that still run fail as Unavailable."""


class RoutedEngine:
    """Implements the Engine port. `routes` names the base models that others than `default` generate with."""

    def __init__(self, embedded: EmbeddedEngine, default: StoppableGenerator, routes: Mapping[str, StoppableGenerator]) -> None:
        self._embedded, self._default, self._routes = embedded, default, dict(routes)
        self._all = tuple({id(engine): engine for engine in (default, *routes.values())}.values())

    def start(self) -> None:
        """Start computing."""
        self._embedded.start()

    async def stop(self) -> None:
        """End: requests that still run fail as Unavailable."""
        others = [engine for engine in self._all if engine is not self._embedded]
        await asyncio.gather(self._embedded.stop(), *(engine.stop() for engine in others))

    def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        """Stream deltas, then GenerationFinished."""
        return self._find(request.model).generate(request)

    async def count_tokens(self, model: ModelReference, texts: Sequence[str]) -> Sequence[int]:
        """Count tokens by the model's own tokenizer, without special tokens."""
        return await self._find(model).count_tokens(model, texts)

    async def render(self, request: GenerationRequest) -> RenderedPrompt:
        """Give what the model would be given for a request."""
        return await self._find(request.model).render(request)

    async def quote_texts(self, model: ModelReference, texts: Sequence[str]) -> Sequence[QuotedText]:
        """Break what the model's tokenizer or chat template would take for more than text."""
        return await self._find(model).quote_texts(model, texts)

    async def read_context_tokens(self, model: ModelReference) -> int:
        """Give what a prompt and its answer may take together, in tokens."""
        return await self._find(model).read_context_tokens(model)

    async def load(self, model: ModelReference, *, pinned: bool = False) -> None:
        """Load a model or a version."""
        await self._find(model).load(model, pinned=pinned)

    async def unload(self, model: ModelReference) -> None:
        """Drop a version's adapter, or weights that only it needs, and its pin."""
        await self._find(model).unload(model)

    async def embed(
        self, embedding_model: str, texts: Sequence[str], role: EmbedRole, backend: EmbeddingBackend = EmbeddingBackend.FLOAT32
    ) -> Embeddings:
        """Embed to unit vectors, one per text."""
        return await self._embedded.embed(embedding_model, texts, role, backend)

    async def rerank(self, model: str, query: str, texts: Sequence[str], timeout_seconds: float) -> Sequence[float] | None:
        """Score texts for a query by a cross-encoder; None where the time was not enough."""
        return await self._embedded.rerank(model, query, texts, timeout_seconds)

    async def preview(self, order: PreviewOrder) -> Preview:
        """Show records as a base model reads them."""
        return await self._embedded.preview(order)

    async def measure(self, order: MeasureOrder) -> Sequence[Sequence[int]]:
        """Count the tokens of records by a base model's tokenizer."""
        return await self._embedded.measure(order)

    async def forget(self, model_id: str) -> None:
        """Drop what any engine has loaded for a deleted model; one that is down does not keep the others from it."""
        results = await asyncio.gather(*(engine.forget(model_id) for engine in self._all), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def describe(self) -> EngineStatus:
        """Tell what all engines hold. Raises Unavailable while one is down: some models cannot be served then."""
        statuses = await asyncio.gather(*(engine.describe() for engine in self._all))
        return EngineStatus(
            "-".join(status.instance for status in statuses),
            tuple(model for status in statuses for model in status.models),
            sorted({model_id for status in statuses for model_id in status.quarantined}),
        )

    def _find(self, model: ModelReference) -> StoppableGenerator:
        return self._routes.get(model.base_model, self._default)
