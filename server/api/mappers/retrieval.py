"""Retrieval: settings, chunks, scores and citations."""

from modeltraining.v1 import inference_service_pb2, retrieval_pb2

from server.api.mappers.documents import metadata_to_proto
from server.api.mappers.filters import filter_from_proto, filter_to_proto
from server.api.mappers.generation import messages_from_proto
from server.api.mappers.values import enum_from_proto, enum_to_proto
from server.domain.retrieval import (
    MAX_CANDIDATES,
    Chunking,
    Citation,
    Rerank,
    RerankOutcome,
    RetrievalOverrides,
    RetrievalSettings,
    RetrievedChunk,
    Scores,
    SearchMode,
)
from server.services.requests import Retrieve
from server.services.retrieval import RetrievalTimings, Retrieved
from server.services.validation import Violations


def settings_to_proto(settings: RetrievalSettings) -> retrieval_pb2.RetrievalConfig:
    """Write the settings that a search uses."""
    return retrieval_pb2.RetrievalConfig(
        top_k=settings.top_k,
        similarity_threshold=settings.similarity_threshold,
        similarity_percentile=settings.similarity_percentile,
        search_mode=enum_to_proto(retrieval_pb2.RetrievalConfig.SearchMode, "SEARCH_MODE", settings.search_mode),
        dense_weight=settings.dense_weight,
        lexical_weight=settings.lexical_weight,
        filter=filter_to_proto(settings.filter) if settings.filter else None,
        max_context_tokens=settings.max_context_tokens or None,
        rerank=_rerank_to_proto(settings),
        max_chunks_per_document=settings.max_chunks_per_document,
        mmr_lambda=settings.mmr_lambda,
    )


def _rerank_to_proto(settings: RetrievalSettings) -> retrieval_pb2.RetrievalConfig.Rerank | None:
    if settings.rerank is None:
        return None
    return retrieval_pb2.RetrievalConfig.Rerank(
        model=settings.rerank.model, candidates=settings.candidate_count, timeout_seconds=settings.rerank.timeout_seconds
    )


def overrides_from_proto(message: retrieval_pb2.RetrievalConfig, found: Violations, field: str = "retrieval") -> RetrievalOverrides:
    """Read the settings that a request sets."""
    mode = enum_from_proto(
        retrieval_pb2.RetrievalConfig.SearchMode, "SEARCH_MODE", message.search_mode, SearchMode, found, f"{field}.search_mode"
    )
    return RetrievalOverrides(
        top_k=message.top_k if message.HasField("top_k") else None,
        similarity_threshold=message.similarity_threshold if message.HasField("similarity_threshold") else None,
        similarity_percentile=message.similarity_percentile if message.HasField("similarity_percentile") else None,
        search_mode=mode,
        max_context_tokens=message.max_context_tokens if message.HasField("max_context_tokens") else None,
        dense_weight=message.dense_weight if message.HasField("dense_weight") else None,
        lexical_weight=message.lexical_weight if message.HasField("lexical_weight") else None,
        filter=filter_from_proto(message.filter, found, f"{field}.filter") if message.HasField("filter") else None,
        rerank=_rerank_from_proto(message.rerank, found, f"{field}.rerank") if message.HasField("rerank") else None,
        max_chunks_per_document=message.max_chunks_per_document if message.HasField("max_chunks_per_document") else None,
        mmr_lambda=message.mmr_lambda if message.HasField("mmr_lambda") else None,
    )


def _rerank_from_proto(message: retrieval_pb2.RetrievalConfig.Rerank, found: Violations, field: str) -> Rerank:
    if message.HasField("candidates") and message.candidates < 1:
        found.add(f"{field}.candidates", f"must be 1 to {MAX_CANDIDATES:,}, not {message.candidates:,}")
    timeout_seconds = message.timeout_seconds if message.HasField("timeout_seconds") else Rerank(message.model).timeout_seconds
    return Rerank(message.model, message.candidates, timeout_seconds)


def rerank_outcome_to_proto(outcome: RerankOutcome | None) -> retrieval_pb2.RerankOutcome | None:
    """Write what became of a reranking; None where none was asked for."""
    if outcome is None:
        return None
    reasons = retrieval_pb2.RerankOutcome.Reason
    reason = enum_to_proto(reasons, "REASON", outcome.failure) if outcome.failure else reasons.Value("REASON_UNSPECIFIED")
    return retrieval_pb2.RerankOutcome(
        reranked=outcome.failure is None, reason=reason, message=outcome.message, candidate_count=outcome.candidate_count
    )


def chunking_to_proto(chunking: Chunking) -> retrieval_pb2.ChunkingConfig:
    """Write how documents are cut; a length of 0 is the embedding model's own and stays unset."""
    return retrieval_pb2.ChunkingConfig(max_tokens=chunking.max_tokens or None, overlap_tokens=chunking.overlap_tokens)


def chunk_to_proto(found: RetrievedChunk) -> retrieval_pb2.RetrievedChunk:
    """Write a chunk that was found."""
    return retrieval_pb2.RetrievedChunk(
        chunk_id=found.chunk.chunk_id,
        document_id=found.document_id,
        text=found.chunk.text,
        title=found.title,
        page=found.chunk.page,
        char_start=found.chunk.char_start,
        char_end=found.chunk.char_end,
        metadata=metadata_to_proto(found.metadata),
        scores=scores_to_proto(found.scores),
        heading_path=found.chunk.heading_path,
    )


def scores_to_proto(scores: Scores) -> retrieval_pb2.RetrievedChunk.Scores:
    """Write scores; those that were not computed stay unset."""
    return retrieval_pb2.RetrievedChunk.Scores(
        similarity=scores.similarity, lexical=scores.lexical, fused=scores.fused, rerank=scores.rerank
    )


def citation_to_proto(citation: Citation) -> retrieval_pb2.Citation:
    """Write a verified citation."""
    return retrieval_pb2.Citation(
        document_id=citation.document_id,
        chunk_id=citation.chunk_id,
        char_start=citation.char_start,
        char_end=citation.char_end,
        page=citation.page,
        quote=citation.quote,
        source=citation.source,
    )


def timings_to_proto(timings: RetrievalTimings) -> retrieval_pb2.RetrievalTimings:
    """Write how long a search took."""
    return retrieval_pb2.RetrievalTimings(
        embed_seconds=timings.embed_seconds,
        search_seconds=timings.search_seconds,
        total_seconds=timings.total_seconds,
        rerank_seconds=timings.rerank_seconds,
    )


def retrieve_from_proto(message: inference_service_pb2.RetrieveRequest, found: Violations) -> Retrieve:
    """Read a search."""
    return Retrieve(
        message.model_id, message.query, overrides_from_proto(message.retrieval, found), messages_from_proto(message.messages, found)
    )


def retrieved_to_proto(retrieved: Retrieved) -> inference_service_pb2.RetrieveResponse:
    """Write what a search found."""
    return inference_service_pb2.RetrieveResponse(
        chunks=[chunk_to_proto(chunk) for chunk in retrieved.chunks],
        retrieval=settings_to_proto(retrieved.settings),
        timings=timings_to_proto(retrieved.timings),
        rerank=rerank_outcome_to_proto(retrieved.rerank),
        searched_query=retrieved.searched_query,
    )
