"""Searching a RAG model's documents: what a query is turned into, the legs that run, and what is refused. Knows nothing of answers."""

import time
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from server.domain.errors import FailedPrecondition, InvalidInput, NotFound, Unavailable
from server.domain.generation import ChatMessage, EmbedRole, Role
from server.domain.models import ModelState, RagConfiguration
from server.domain.rag_indexes import SPACE_CHANGED, RagIndex
from server.domain.retrieval import MetadataFilter, PlaceChanged, RerankOutcome, RetrievalSettings, RetrievedChunk, Search, SearchMode
from server.services.followups import StandingQuery, make_self_standing
from server.services.model_ports import Engine
from server.services.ports import Database, Transaction
from server.services.rag_models import merge_retrieval
from server.services.requests import Retrieve
from server.services.reranking import rerank_chunks
from server.services.validation import Violations, check_messages, check_retrieval, check_settings

MAX_QUERY_CHARACTERS = 20_000
MAX_KNOWN = 1_000  # models
MAX_LOOKUPS = 3  # of one search: a model changes a few times in its life


@dataclass(frozen=True, slots=True)
class RetrievalTimings:
    """Seconds by stage."""

    embed_seconds: float
    search_seconds: float
    total_seconds: float
    rerank_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Retrieved:
    """What a search found, with the settings that it used. `rerank` None: none was asked for."""

    chunks: Sequence[RetrievedChunk]
    settings: RetrievalSettings
    timings: RetrievalTimings
    searched_query: str
    rerank: RerankOutcome | None = None


class Retrieval:
    """The use case Retrieve, and the search that answers and evaluations are made of."""

    def __init__(self, database: Database, engine: Engine) -> None:
        self._database = database
        self._engine = engine
        # By organization and model, the last read last.
        self._known: OrderedDict[tuple[str, str], RagConfiguration] = OrderedDict()

    async def retrieve(self, organization: str, request: Retrieve) -> Retrieved:
        """Search without generating. Raises InvalidInput, NotFound, FailedPrecondition, Unavailable."""
        found = Violations()
        check_query(found, request.model_id, request.query, request.messages)
        check_retrieval(found, request.retrieval)
        found.raise_if_any()
        asked = (organization, request.model_id, make_self_standing(request.query, request.messages))
        if known := self._known.get((organization, request.model_id)):
            # What was read for an earlier call. The search itself tells, in its one round trip, whether it still holds.
            with suppress(PlaceChanged, InvalidInput, NotFound, FailedPrecondition):
                return await self._search(*asked, known, merge_retrieval(known.retrieval, request.retrieval))
        rag = await self.read_configuration(organization, request.model_id)
        return await self.search(*asked, rag, merge_retrieval(rag.retrieval, request.retrieval))

    async def read_configuration(self, organization: str, model_id: str) -> RagConfiguration:
        """Read how a RAG model searches and answers. Raises NotFound, FailedPrecondition for another model or one that is not READY."""
        self._known.pop((organization, model_id), None)
        async with self._database.reading(organization) as transaction:
            state, rag = await transaction.models.read_rag(model_id)
        metadata = {"model_id": model_id, "state": state.value}
        if rag is None:
            raise FailedPrecondition("This is no RAG model: ask it at /inference (Generate).", reason="NOT_A_RAG_MODEL", metadata=metadata)
        if state is not ModelState.READY:
            raise FailedPrecondition(f"The model is {state.value}, not READY.", reason="MODEL_NOT_READY", metadata=metadata)
        while len(self._known) >= MAX_KNOWN:
            self._known.popitem(last=False)
        self._known[organization, model_id] = rag
        return rag

    async def embed_queries(self, rag: RagConfiguration, queries: Sequence[str]) -> Sequence[Sequence[float]]:
        """Embed queries in the very space of the model's index, to unit vectors. Raises FailedPrecondition where that cannot be had."""
        embeddings = await self._engine.embed(rag.embedding_model, queries, EmbedRole.QUERY, rag.embedding_backend)
        demanded = rag.index.fingerprint if rag.index else ""
        # An index of before spaces were kept demands none.
        if demanded and embeddings.fingerprint != demanded:
            raise FailedPrecondition(
                f"{rag.embedding_model} as it is here now gives other vectors than those of the model's index: build the index anew "
                "(ReindexModel), or put the embedding model's files back.",
                reason=SPACE_CHANGED,
                metadata={"index_fingerprint": demanded, "fingerprint": embeddings.fingerprint},
            )
        return embeddings.vectors

    async def search(
        self,
        organization: str,
        model_id: str,
        query: StandingQuery,
        rag: RagConfiguration,
        settings: RetrievalSettings,
        vector: Sequence[float] | None = None,
    ) -> Retrieved:
        """Find the chunks for a query that was checked, best first. `vector`: the query as it was embedded before; None: embed it.

        Raises Unavailable where another index answers since `rag` was read, and the vector may be none of its space.
        """
        for _ in range(MAX_LOOKUPS):
            with suppress(PlaceChanged):
                return await self._search(organization, model_id, query, rag, settings, vector)
            fresh = await self.read_configuration(organization, model_id)
            if fresh.index_number != rag.index_number and vector is not None:
                break
            rag = fresh
        raise Unavailable("The model is being changed. Try again.", reason="MODEL_CHANGED", retry_after_seconds=0.0)

    async def _search(
        self,
        organization: str,
        model_id: str,
        query: StandingQuery,
        rag: RagConfiguration,
        settings: RetrievalSettings,
        vector: Sequence[float] | None = None,
    ) -> Retrieved:
        """Search once. Raises PlaceChanged where the model or its index was changed since `rag` was read."""
        _check_together(settings)
        settings = resolve_threshold(settings, rag.index)
        start = time.perf_counter()
        if settings.search_mode is SearchMode.LEXICAL:
            vector = ()
        elif vector is None:
            vector = (await self.embed_queries(rag, [query.searched]))[0]
        embedded = time.perf_counter()
        search = Search(
            replace(settings, top_k=settings.candidate_count),
            vector,
            query.analyse() if settings.search_mode is not SearchMode.DENSE else (),
            rag.index_number,
            rag.index.place if rag.index else None,
        )
        async with self._database.reading(organization) as transaction:
            chunks = await transaction.documents.search(model_id, search)
            if not chunks and settings.filter:
                await _check_filter(transaction, model_id, settings.filter)
        searched, outcome = time.perf_counter(), None
        if settings.rerank is not None:
            chunks, outcome = await rerank_chunks(self._engine, settings.rerank, query.searched, chunks, settings.top_k)
        end = time.perf_counter()
        timings = RetrievalTimings(embedded - start, searched - embedded, end - start, end - searched if outcome else 0.0)
        return Retrieved(chunks, settings, timings, query.searched, outcome)


def check_query(found: Violations, model_id: str, query: str, earlier: Sequence[ChatMessage]) -> None:
    """Check what every question carries."""
    if not model_id:
        found.add("model_id", "is required")
    found.text("query", query, MAX_QUERY_CHARACTERS, least=1)
    check_messages(found, [*earlier, ChatMessage(Role.USER, "?")], allows_tools=False)
    for place, message in enumerate(earlier):
        if message.tool_calls:
            found.add(f"messages[{place}].tool_calls", "must not be given here")


def resolve_threshold(settings: RetrievalSettings, index: RagIndex | None) -> RetrievalSettings:
    """Turn a percentile into the threshold that it comes to in the index's space. Raises FailedPrecondition without a calibration."""
    if settings.similarity_percentile is None or settings.search_mode is SearchMode.LEXICAL:
        return settings
    if index is None or index.calibration is None:
        raise FailedPrecondition(
            "The index was built before similarities of unrelated texts were measured: reindex the model, or give a similarity_threshold.",
            reason="CALIBRATION_MISSING",
        )
    return replace(settings, similarity_threshold=index.calibration.find_similarity(settings.similarity_percentile))


def _check_together(settings: RetrievalSettings) -> None:
    found = Violations()
    check_settings(found, settings)
    if settings.search_mode is SearchMode.HYBRID and not settings.dense_weight and not settings.lexical_weight:
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
