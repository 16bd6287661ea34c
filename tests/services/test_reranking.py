"""Reranking as a stage of the search: the cross-encoder's order, equal scores, and the earlier order where it cannot be had."""

import asyncio
from collections.abc import Sequence
from typing import cast

import pytest

from server.domain.errors import FailedPrecondition, InvalidInput, NotFound, ResourceExhausted, ServiceError, Unavailable
from server.domain.retrieval import Chunk, Rerank, RerankFailure, RerankOutcome, RetrievedChunk, Scores
from server.services.model_ports import Engine
from server.services.reranking import rerank_chunks

CHUNKS = [RetrievedChunk(Chunk(f"chk_{text}", 0, text, 0, 1, 1), "doc_1", "", Scores(similarity=0.5)) for text in "abcd"]


class Scoring:
    """An engine that answers with what it was given: scores, an error, or nothing for a second."""

    def __init__(self, answer: dict[str, float] | ServiceError | None, seconds: float = 0.0) -> None:
        self._answer, self._seconds = answer, seconds

    async def rerank(self, model: str, query: str, texts: Sequence[str], timeout_seconds: float) -> Sequence[float] | None:
        """Score by the table."""
        assert (model, query, timeout_seconds) == ("m", "q", 0.1)
        await asyncio.sleep(self._seconds)
        if isinstance(self._answer, ServiceError):
            raise self._answer
        return None if self._answer is None else [self._answer[text] for text in texts]


async def rerank(engine: Scoring, chunks: Sequence[RetrievedChunk] = CHUNKS) -> tuple[list[tuple[str, float | None]], RerankOutcome]:
    found, outcome = await rerank_chunks(cast(Engine, engine), Rerank("m", timeout_seconds=0.1), "q", chunks, 3)
    assert all(one.scores.similarity == 0.5 for one in found)
    return [(one.chunk.text, one.scores.rerank) for one in found], outcome


async def test_the_cross_encoders_order_stands_and_equal_scores_keep_the_earlier_one() -> None:
    found, outcome = await rerank(Scoring({"a": 0.1, "b": 0.7, "c": -2.0, "d": 0.7}))
    assert found == [("b", 0.7), ("d", 0.7), ("a", 0.1)]
    assert outcome == RerankOutcome(4)


@pytest.mark.parametrize(
    ("engine", "failure", "message"),
    [
        (Scoring(None), RerankFailure.TIMEOUT, "0.1 seconds were not enough for 4 candidates."),
        (Scoring({}, 30.0), RerankFailure.TIMEOUT, "0.1 seconds were not enough for 4 candidates."),
        (Scoring(Unavailable("It is down.")), RerankFailure.UNAVAILABLE, "It is down."),
        (Scoring(ResourceExhausted("No memory.")), RerankFailure.UNAVAILABLE, "No memory."),
    ],
)
async def test_where_time_or_memory_lack_the_earlier_order_stands_and_it_is_told(
    engine: Scoring, failure: RerankFailure, message: str
) -> None:
    async with asyncio.timeout(5):
        found, outcome = await rerank(engine)
    assert found == [("a", None), ("b", None), ("c", None)]
    assert outcome == RerankOutcome(4, failure, message)


async def test_a_model_that_is_not_there_is_an_error_of_its_field() -> None:
    for error in (NotFound.of("base model", "m"), InvalidInput("It is pickled.")):
        with pytest.raises(InvalidInput) as refused:
            await rerank(Scoring(error))
        assert [violation.field for violation in refused.value.data.violations] == ["retrieval.rerank.model"]
    with pytest.raises(FailedPrecondition):
        await rerank(Scoring(FailedPrecondition("No cross-encoder.")))


async def test_nothing_found_is_nothing_to_rerank() -> None:
    assert await rerank(Scoring(Unavailable("never asked")), []) == ([], RerankOutcome(0))
