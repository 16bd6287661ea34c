"""Scoring what a search found again with a cross-encoder, within a time limit; where it runs out the order of the search stands."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from server.domain.errors import FailedPrecondition, InvalidInput, NotFound, ResourceExhausted, Unavailable
from server.domain.retrieval import Rerank, RerankFailure, RerankOutcome, RetrievalOverrides, RetrievedChunk
from server.services.model_ports import BaseModels, Engine
from server.services.validation import Violations

RERANK_MODEL_FIELD = "retrieval.rerank.model"


async def rerank_chunks(
    engine: Engine, rerank: Rerank, query: str, chunks: Sequence[RetrievedChunk], top_k: int
) -> tuple[Sequence[RetrievedChunk], RerankOutcome]:
    """Give the best `top_k` chunks in the cross-encoder's order, equal ones in the earlier order, and what became of it.

    Raises InvalidInput or FailedPrecondition for a model that is not there or no cross-encoder; nothing where only time or memory lack.
    """
    try:
        async with asyncio.timeout(rerank.timeout_seconds):
            texts = [found.chunk.text for found in chunks]
            scores = await engine.rerank(rerank.model, query, texts, rerank.timeout_seconds) if texts else []
    except TimeoutError:
        scores = None
    except (NotFound, InvalidInput) as error:
        raise InvalidInput.field(RERANK_MODEL_FIELD, str(error)) from error
    except (ResourceExhausted, Unavailable) as error:
        return chunks[:top_k], RerankOutcome(len(chunks), RerankFailure.UNAVAILABLE, str(error))
    if scores is None:
        message = f"{rerank.timeout_seconds:g} seconds were not enough for {len(chunks):,} candidates."
        return chunks[:top_k], RerankOutcome(len(chunks), RerankFailure.TIMEOUT, message)
    scored = [replace(one, scores=replace(one.scores, rerank=score)) for one, score in zip(chunks, scores, strict=True)]
    # Sorting is stable.
    order = sorted(zip(scored, scores, strict=True), key=lambda pair: pair[1], reverse=True)
    return [one for one, _ in order][:top_k], RerankOutcome(len(chunks))


async def check_cross_encoder(base_models: BaseModels, found: Violations, asked: RetrievalOverrides | None) -> None:
    """Note a cross-encoder that is unknown, unsafe, none, or cannot be had here now."""
    if asked is None or asked.rerank is None or not asked.rerank.model or any(one.field == RERANK_MODEL_FIELD for one in found.found):
        return
    try:
        await asyncio.to_thread(base_models.check_cross_encoder, asked.rerank.model)
    except (NotFound, InvalidInput, FailedPrecondition) as error:
        found.add(RERANK_MODEL_FIELD, str(error))
