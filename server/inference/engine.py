"""The embedded engine: the Engine port over torch, in this process. Loads on first use, keeps a memory budget, generates in batches."""

import asyncio
import itertools
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Protocol

from server.domain.embeddings import EmbeddingBackend, Embeddings
from server.domain.engines import EngineStatus
from server.domain.errors import FailedPrecondition
from server.domain.generation import EmbedRole, GenerationRequest, ModelReference, QuotedText, RenderedPrompt, TokenEvent
from server.domain.previews import MeasureOrder, Preview, PreviewOrder
from server.inference.embedding import Embedder, EmbeddingLanes
from server.inference.library import BaseModelResolver, LoadingOptions, Times
from server.inference.mailbox import Mailbox
from server.inference.memory import MemoryBudget
from server.inference.passingthread import PassingThread
from server.inference.plans import VersionFiles
from server.inference.residents import Residents
from server.inference.spinning import OthersMeter, SpinGovernor
from server.inference.stepping import Stepper


class Reranker(Protocol):
    """Scores texts for a query (rag/reranking.py, injected by app/). Blocking."""

    def score(self, model: str, query: str, texts: Sequence[str], deadline_seconds: float) -> Sequence[float] | None:
        """Give one score per text; None where `deadline_seconds` (of time.monotonic) came first."""


class Previewer(Protocol):
    """Shows records (datafiles/previewing.py, injected by app/). Blocking."""

    def preview(self, order: PreviewOrder) -> Preview:
        """Give the records of the order."""

    def measure(self, order: MeasureOrder) -> Sequence[Sequence[int]]:
        """Count the tokens of the order's records."""


class EmbeddedEngine:
    """Implements the Engine port. All methods belong to one event loop; `start` first, `stop` last.

    Weights that nobody used for `idle_seconds` are unloaded; None: only where others need the memory. Other engines of this machine
    may join `memory`.
    """

    def __init__(
        self,
        *,
        base_models: BaseModelResolver,
        versions: VersionFiles,
        embedder: Embedder | None,
        previewer: Previewer | None = None,
        reranker: Reranker | None = None,
        options: LoadingOptions,
        max_model_bytes: int,
        idle_seconds: float | None = None,
    ) -> None:
        self._stepper, self._governor = Stepper(), SpinGovernor(OthersMeter().measure)
        self.memory = MemoryBudget(max_model_bytes, idle_seconds)
        self._residents = Residents(self._stepper, base_models=base_models, versions=versions, options=options, memory=self.memory)
        self._instance, self._numbers = secrets.token_hex(8), itertools.count()
        self._sweeper: asyncio.Task[None] | None = None
        self._embedding = EmbeddingLanes(embedder) if embedder is not None else None
        self._reranker, self._reranking = reranker, PassingThread("engine-reranks")
        self._previewer, self._previewing = previewer, PassingThread("engine-previews")

    def start(self) -> None:
        """Start computing."""
        self._stepper.start()
        self._governor.start()
        self._sweeper = asyncio.get_running_loop().create_task(self.memory.sweep())

    async def stop(self) -> None:
        """End: requests that still run fail as Unavailable."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        await asyncio.to_thread(self._stepper.stop)
        await asyncio.to_thread(self._governor.stop)
        self._residents.stop()
        if self._embedding is not None:
            self._embedding.stop()
        self._reranking.shutdown(wait=False, cancel_futures=True)
        self._previewing.shutdown(wait=False, cancel_futures=True)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent]:
        """Stream deltas, then GenerationFinished; closing the iterator frees the place before the next step."""
        received, name = time.monotonic(), f"{request.request_id}#{next(self._numbers)}"
        async with self._residents.use(request.model) as use:
            times = Times(received, use.load_seconds, use.adapter_load_seconds)
            generation = await asyncio.to_thread(use.model.prepare, name, request, use.adapter, times)
            mailbox = Mailbox()
            self._stepper.submit(use.model.batch, generation, mailbox)
            try:
                async with aclosing(mailbox.read()) as events:
                    async for event in events:
                        yield event
            finally:
                self._stepper.cancel(use.model.batch, name)

    async def count_tokens(self, model: ModelReference, texts: Sequence[str]) -> Sequence[int]:
        """Count tokens by the model's own tokenizer, without special tokens."""
        async with self._residents.use(model) as use:
            tokenizer = use.voice.tokenizer
            return await asyncio.to_thread(lambda: [len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts])

    async def render(self, request: GenerationRequest) -> RenderedPrompt:
        """Give what the model would be given for a request; a prompt over the context is no error here."""
        async with self._residents.use(request.model) as use:
            context = use.model.count_context_tokens(use.adapter)
            built = await asyncio.to_thread(use.voice.prompts.build, request, context)
            return RenderedPrompt(built.text, built.token_ids, context, built.dropped_messages)

    async def quote_texts(self, model: ModelReference, texts: Sequence[str]) -> Sequence[QuotedText]:
        """Break what the model's tokenizer or chat template would take for more than text."""
        async with self._residents.use(model) as use:
            quoter = use.voice.quoter
            return await asyncio.to_thread(lambda: [quoter.quote(text) for text in texts])

    async def read_context_tokens(self, model: ModelReference) -> int:
        """Give what a prompt and its answer may take together, in tokens."""
        async with self._residents.use(model) as use:
            return use.model.count_context_tokens(use.adapter)

    async def load(self, model: ModelReference, *, pinned: bool = False) -> None:
        """Load a model or a version with its weights; pinned, it stays until `unload` or `forget`."""
        await self._residents.load(model, pinned=pinned)

    async def unload(self, model: ModelReference) -> None:
        """Drop a version's adapter, or weights that only it needs, and its pin. Running requests end undisturbed."""
        await self._residents.unload(model)

    async def embed(
        self, embedding_model: str, texts: Sequence[str], role: EmbedRole, backend: EmbeddingBackend = EmbeddingBackend.FLOAT32
    ) -> Embeddings:
        """Embed to unit vectors, one per text, through the injected embedder."""
        if self._embedding is None:
            raise FailedPrecondition("This engine embeds nothing.", reason="EMBEDDER_MISSING")
        return await self._embedding.embed(embedding_model, texts, role, backend)

    async def rerank(self, model: str, query: str, texts: Sequence[str], timeout_seconds: float) -> Sequence[float] | None:
        """Score texts for a query through the injected reranker; None where the time, waiting and loading included, was not enough."""
        if self._reranker is None:
            raise FailedPrecondition("This engine reranks nothing.", reason="RERANKER_MISSING")
        deadline = time.monotonic() + timeout_seconds
        return await asyncio.get_running_loop().run_in_executor(self._reranking, self._reranker.score, model, query, texts, deadline)

    async def preview(self, order: PreviewOrder) -> Preview:
        """Show records as a base model reads them, through the injected previewer; needs the tokenizer only."""
        if self._previewer is None:
            raise FailedPrecondition("This engine previews nothing.", reason="PREVIEWER_MISSING")
        return await asyncio.get_running_loop().run_in_executor(self._previewing, self._previewer.preview, order)

    async def measure(self, order: MeasureOrder) -> Sequence[Sequence[int]]:
        """Count the tokens of records, one list per record with a count per sequence, through the injected previewer."""
        if self._previewer is None:
            raise FailedPrecondition("This engine measures nothing.", reason="PREVIEWER_MISSING")
        return await asyncio.get_running_loop().run_in_executor(self._previewing, self._previewer.measure, order)

    async def forget(self, model_id: str) -> None:
        """Drop a deleted model's adapters and weights, and a base model of that name that nobody uses. Running requests end undisturbed."""
        await self._residents.forget(model_id)

    async def describe(self) -> EngineStatus:
        """Tell what is loaded and how busy it is."""
        return EngineStatus(self._instance, self._residents.describe(), self._residents.list_quarantined())
