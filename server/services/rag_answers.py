"""Answers from documents: search, fill the generator's context with whole chunks, generate, verify what is cited."""

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from server.domain.errors import FailedPrecondition
from server.domain.generation import (
    ChatMessage,
    Delta,
    EmbedRole,
    FinishReason,
    GenerationFinished,
    GenerationRequest,
    ModelReference,
    Role,
    Timings,
    TokenUsage,
)
from server.domain.models import ModelState, RagConfiguration
from server.domain.retrieval import Citation, MetadataFilter, RetrievalSettings, RetrievedChunk, Search, SearchMode
from server.services.citations import cite_answer
from server.services.lexical.analysis import analyse_query
from server.services.ports import Database, Engine, Transaction
from server.services.rag_models import merge_retrieval
from server.services.rag_prompt import build_messages, count_fitting, format_source, say_nothing_found
from server.services.references import References
from server.services.requests import RagGenerate, Retrieve
from server.services.validation import Violations, check_generation, check_messages, check_retrieval

MAX_QUERY_CHARACTERS = 20_000
DEFAULT_ANSWER_TOKENS = 256  # kept free in the context for the answer where the caller sets no max_tokens
# The chat template's own tokens around a prompt, and a tokenizer that joins texts otherwise than it counts them apart.
TEMPLATE_TOKENS = 128


@dataclass(frozen=True, slots=True)
class RetrievalTimings:
    """Seconds by stage."""

    embed_seconds: float
    search_seconds: float
    total_seconds: float


@dataclass(frozen=True, slots=True)
class Retrieved:
    """What a search found, with the settings that it used."""

    chunks: Sequence[RetrievedChunk]
    settings: RetrievalSettings
    timings: RetrievalTimings


@dataclass(frozen=True, slots=True)
class Sources:
    """The first item of an answer's stream: what it is made from."""

    chunks: Sequence[RetrievedChunk]
    grounded: bool
    timings: RetrievalTimings


@dataclass(frozen=True, slots=True)
class RagFinished:
    """The last item: how it ended, and what the text cites, verified against the documents."""

    finish_reason: FinishReason
    usage: TokenUsage
    timings: Timings
    model_id: str
    generator: ModelReference
    citations: Sequence[Citation]
    dropped_citation_count: int
    grounded: bool


RagEvent = Sources | Delta | RagFinished


@dataclass(frozen=True, slots=True)
class RagAnswer:
    """A whole answer."""

    text: str
    sources: Sources
    finished: RagFinished


class RagAnswers:
    """The use cases Retrieve, RagGenerate and StreamRagGenerate."""

    def __init__(self, database: Database, engine: Engine, references: References) -> None:
        self._database = database
        self._engine = engine
        self._references = references

    async def retrieve(self, organization: str, request: Retrieve) -> Retrieved:
        """Search without generating. Raises InvalidInput, NotFound, FailedPrecondition, Unavailable."""
        found = Violations()
        _check_query(found, request.model_id, request.query)
        check_retrieval(found, request.retrieval)
        found.raise_if_any()
        rag = await self._read_configuration(organization, request.model_id)
        return await self._search(organization, request.model_id, request.query, rag, merge_retrieval(rag.retrieval, request.retrieval))

    async def generate(self, organization: str, request: RagGenerate, request_id: str) -> RagAnswer:
        """Answer as a whole."""
        texts: list[str] = []
        sources: Sources | None = None
        async with aclosing(self.stream(organization, request, request_id)) as events:
            async for event in events:
                if isinstance(event, Sources):
                    sources = event
                elif isinstance(event, Delta):
                    texts.append(event.text)
                elif sources is not None:
                    return RagAnswer("".join(texts), sources, event)
        raise RuntimeError("the answer's stream ended without its last event")

    async def stream(self, organization: str, request: RagGenerate, request_id: str) -> AsyncGenerator[RagEvent, None]:
        """Stream the sources, the text, and the verified citations. Where nothing passes the threshold no model is asked."""
        _check(request)
        rag = await self._read_configuration(organization, request.model_id)
        generator = await self._references.resolve(organization, rag.generator_model_id)
        settings = merge_retrieval(rag.retrieval, request.retrieval)
        retrieved = await self._search(organization, request.model_id, request.query, rag, settings)
        if not retrieved.chunks:
            for piece in _say_not_found(request, generator, retrieved):
                yield piece
            return
        chunks = await self._fit(generator, request, rag, retrieved)
        yield Sources(chunks, True, retrieved.timings)
        messages = build_messages(request.query, chunks, template=rag.prompt_template, earlier=request.messages)
        asked = GenerationRequest(request_id, generator, request.parameters, messages=messages)
        texts: list[str] = []
        async with aclosing(self._engine.generate(asked)) as events:
            async for event in events:
                if isinstance(event, GenerationFinished):
                    yield _finish(request.model_id, generator, event, "".join(texts), chunks)
                    return
                texts.append(event.text)
                yield event

    async def _read_configuration(self, organization: str, model_id: str) -> RagConfiguration:
        async with self._database.transaction(organization) as transaction:
            model = await transaction.models.get(model_id)
        metadata = {"model_id": model_id, "state": model.state.value}
        if model.rag is None:
            raise FailedPrecondition("This is no RAG model: ask it at /inference (Generate).", reason="NOT_A_RAG_MODEL", metadata=metadata)
        if model.state is not ModelState.READY:
            raise FailedPrecondition(f"The model is {model.state.value}, not READY.", reason="MODEL_NOT_READY", metadata=metadata)
        return model.rag

    async def _search(self, organization: str, model_id: str, query: str, rag: RagConfiguration, settings: RetrievalSettings) -> Retrieved:
        _check_weights(settings)
        start = time.perf_counter()
        vector: Sequence[float] = ()
        if settings.search_mode is not SearchMode.LEXICAL:
            vector = (await self._engine.embed(rag.embedding_model, [query], EmbedRole.QUERY))[0]
        embedded = time.perf_counter()
        search = Search(settings, vector, analyse_query(query) if settings.search_mode is not SearchMode.DENSE else ())
        async with self._database.transaction(organization) as transaction:
            chunks = await transaction.documents.search(model_id, search)
            if not chunks and settings.filter:
                await _check_filter(transaction, model_id, settings.filter)
        end = time.perf_counter()
        return Retrieved(chunks, settings, RetrievalTimings(embedded - start, end - embedded, end - start))

    async def _fit(
        self, generator: ModelReference, request: RagGenerate, rag: RagConfiguration, retrieved: Retrieved
    ) -> Sequence[RetrievedChunk]:
        """Take whole chunks, best first, while they fit into the generator's context; at least the best one."""
        frame = build_messages(request.query, [], template=rag.prompt_template, earlier=request.messages)
        texts = ["\n".join(message.content for message in frame), *(format_source(99, c) + "\n\n" for c in retrieved.chunks)]
        counts = await self._engine.count_tokens(generator, texts)
        context = await self._engine.read_context_tokens(generator)
        room = context - counts[0] - TEMPLATE_TOKENS - (request.parameters.max_tokens or DEFAULT_ANSWER_TOKENS)
        if retrieved.settings.max_context_tokens:
            room = min(room, retrieved.settings.max_context_tokens)
        return retrieved.chunks[: max(1, count_fitting(counts[1:], room))]


def _finish(
    model_id: str, generator: ModelReference, event: GenerationFinished, text: str, chunks: Sequence[RetrievedChunk]
) -> RagFinished:
    cited = cite_answer(text, chunks)
    return RagFinished(
        event.finish_reason, event.usage, event.timings, model_id, generator, cited.citations, cited.dropped_count, grounded=True
    )


def _say_not_found(request: RagGenerate, generator: ModelReference, retrieved: Retrieved) -> Sequence[RagEvent]:
    nothing = Timings(0.0, 0.0, 0.0)
    return [
        Sources((), False, retrieved.timings),
        Delta(say_nothing_found(request.query)),
        RagFinished(FinishReason.STOP, TokenUsage(0, 0), nothing, request.model_id, generator, (), 0, grounded=False),
    ]


def _check_weights(settings: RetrievalSettings) -> None:
    if settings.search_mode is SearchMode.HYBRID and not settings.dense_weight and not settings.lexical_weight:
        found = Violations()
        found.add("retrieval.dense_weight", "must not be 0 where lexical_weight is 0 too: nothing would be searched")
        found.raise_if_any()


async def _check_filter(transaction: Transaction, model_id: str, where: MetadataFilter) -> None:
    """Refuse keys that no document has, where nothing was found: most likely they are misspelt. Asking whether a key exists is fine."""
    keys = [condition.key for condition in where if condition.exists is None]
    unknown = set(await transaction.documents.list_unknown_keys(model_id, keys)) if keys else set()
    found = Violations()
    for place, condition in enumerate(where):
        if condition.exists is None and condition.key in unknown:
            found.add(f"retrieval.filter.conditions[{place}].key", f"no document of this model has {condition.key!r} in its metadata")
    found.raise_if_any()


def _check_query(found: Violations, model_id: str, query: str) -> None:
    if not model_id:
        found.add("model_id", "is required")
    found.text("query", query, MAX_QUERY_CHARACTERS, least=1)


def _check(request: RagGenerate) -> None:
    found = Violations()
    _check_query(found, request.model_id, request.query)
    check_messages(found, [*request.messages, ChatMessage(Role.USER, request.query or "?")])
    check_retrieval(found, request.retrieval)
    check_generation(found, request.parameters)
    found.raise_if_any()
