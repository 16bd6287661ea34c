"""A search over an index's chunks as one statement: by vectors, by words, or both fused by rank.

A small index is compared whole. A large one has a table of its own with an HNSW index for its vectors (vector_tables), and its words are
found by a GIN index. A filter that keeps few documents is searched through these, exactly; one that keeps many is tested as the scan of
the index goes on. Which of the two it is only the statement can know: both stand in its plan, and a count lets one run.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from psycopg import Error
from sqlalchemy import Row, TextClause, and_, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from server.db.document_tables import IndexKey, rag_indexes
from server.db.metadata_filters import build_conditions
from server.db.rag_indexes import PLACE_REVISION
from server.db.search_sql import COMPARED_CHUNKS, SCANNED_CHUNKS, Shape, write_statement
from server.db.tables import models
from server.db.terms import scope_words
from server.domain.errors import FailedPrecondition, InvalidInput
from server.domain.retrieval import Chunk, PlaceChanged, RetrievalSettings, RetrievedChunk, Scores, Search, SearchMode, SearchPlace
from server.services.diversity import choose_diverse

UNDEFINED_TABLE = "42P01"
DATA_EXCEPTION = "22000"  # pgvector: the dimensions differ
# How many chunks each leg gives to the fusion, at least: a chunk may be far down in one and first in the other.
FUSED_PER_LEG = 100
# From how many of the best those are chosen that a limit per document or a wish for diversity lets through: so many times as are asked for.
POOL_TIMES = 10
DIVERSE_TIMES = 4
FEWEST_POOLED = 50
MOST_POOLED = 1_000


def build_search(
    organization: str,
    model_id: str,
    search: Search,
    place: SearchPlace,
    *,
    compared_chunks: int = COMPARED_CHUNKS,
    scanned_chunks: int = SCANNED_CHUNKS,
) -> tuple[TextClause, Mapping[str, Any]]:
    """Build the statement of a search with its parameters: one row for each chunk found, best first, or one without a chunk."""
    settings = search.settings
    conditions, values = build_conditions(settings.filter)
    most = _widen(settings.top_k, DIVERSE_TIMES) if settings.is_diverse else settings.top_k
    pool = _widen(most, POOL_TIMES) if settings.max_chunks_per_document else most
    shape = Shape(
        mode=settings.search_mode,
        depth=max(pool, FUSED_PER_LEG) if settings.search_mode is SearchMode.HYBRID else pool,
        pool=pool,
        most=most,
        own_table=place.own_table,
        dimension=place.dimension if place.own_table is not None else 0,
        conditions=conditions,
        per_document=settings.max_chunks_per_document,
        pairwise=settings.is_diverse,
        compared_chunks=compared_chunks,
        scanned_chunks=scanned_chunks,
    )
    parameters = values | {
        "organization": organization,
        "model_id": model_id,
        "index_number": place.index_number,
        "similarity_threshold": settings.similarity_threshold,
        "vector": write_vector(search.vector),
        "numbers": [term.number for term in search.terms],
        "boosts": [term.boost for term in search.terms],
        "are_words": [term.is_word for term in search.terms],
        "scope": scope_words(organization, model_id, place.index_number),
        "dense_weight": float(settings.dense_weight),
        "lexical_weight": float(settings.lexical_weight),
    }
    return write_statement(shape), parameters


def write_vector(numbers: Sequence[float]) -> str:
    """Write a vector as pgvector reads one: nine digits tell every float32 from the next, and take a third of the time of all digits."""
    return f"[{','.join(['%.9g'] * len(numbers)) % tuple(numbers)}]"


def _widen(most: int, times: int) -> int:
    return min(max(most * times, FEWEST_POOLED), max(most, MOST_POOLED))


async def run_search(connection: AsyncConnection, index: IndexKey, search: Search) -> Sequence[RetrievedChunk]:
    """Give the chunks that a search finds, best first. Raises InvalidInput, FailedPrecondition, PlaceChanged."""
    if not all(map(math.isfinite, search.vector)):
        raise InvalidInput("The query's vector has numbers that are not finite.", reason="EMBEDDING_NOT_FINITE")
    place = search.place or await _look_up(connection, index)
    if place is None:
        return []
    statement, parameters = build_search(index.organization, index.model_id, search, place)
    try:
        rows = (await connection.execute(statement, parameters)).all()
    except DBAPIError as error:
        sqlstate = error.orig.sqlstate if isinstance(error.orig, Error) else None
        if sqlstate == UNDEFINED_TABLE:
            raise PlaceChanged from error
        if sqlstate == DATA_EXCEPTION:
            message = f"The model's vectors do not have {len(search.vector)} numbers each."
            raise FailedPrecondition(message, reason="EMBEDDING_DIMENSION_MISMATCH") from error
        raise
    if not rows or rows[0].revision != place.revision:
        raise PlaceChanged
    hits = [row for row in rows if row.chunk_id is not None]
    if search.settings.is_diverse:
        hits = _diversify(hits, search.settings)
    return [_retrieved_from_row(row) for row in hits]


def _diversify(hits: Sequence[Row[Any]], settings: RetrievalSettings) -> list[Row[Any]]:
    if settings.search_mode is SearchMode.DENSE:
        relevances = [row.similarity for row in hits]
    else:
        # Scores without a scale: the best one's is taken for 1.
        scores = [row.lexical if settings.search_mode is SearchMode.LEXICAL else row.fused for row in hits]
        relevances = [score / scores[0] for score in scores]
    chosen = choose_diverse(relevances, [row.pairs or () for row in hits], settings.mmr_lambda, settings.top_k)
    return [hits[number] for number in chosen]


async def _look_up(connection: AsyncConnection, index: IndexKey) -> SearchPlace | None:
    columns = (rag_indexes.c.index_key, rag_indexes.c.vector_table, rag_indexes.c.dimension, PLACE_REVISION)
    of_model = and_(models.c.organization == rag_indexes.c.organization, models.c.model_id == rag_indexes.c.model_id)
    query = select(*columns).select_from(rag_indexes.join(models, of_model)).where(*index.rows_of(rag_indexes))
    row = (await connection.execute(query)).one_or_none()
    if row is None:
        return None
    own_table = row.index_key if row.vector_table is not None else None
    return SearchPlace(index.index_number, row.place_revision, own_table, row.dimension or 0)


def _retrieved_from_row(row: Row[Any]) -> RetrievedChunk:
    chunk = Chunk(row.chunk_id, row.position, row.text, row.char_start, row.char_end, row.token_count, row.page, tuple(row.heading_path))
    return RetrievedChunk(
        chunk, row.document_id, row.title, Scores(row.similarity, row.lexical, row.fused), row.metadata, row.page_breaks or ()
    )
