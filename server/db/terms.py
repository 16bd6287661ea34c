"""The terms of chunks as the lexical search reads them: their rows, and the counts that say how rare a term is in its collection.

Not postings of one row per term and chunk: at 80 bytes each these would outgrow the texts forty times. A chunk has one row; pgvector
multiplies its weights with the query's in C, and a GIN index of the words finds the chunks in large collections.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

from sqlalchemy import CursorResult, delete, insert, text
from sqlalchemy.ext.asyncio import AsyncConnection

from server.db.document_tables import IndexKey, chunk_terms
from server.domain.retrieval import FIRST_INDEX, Chunk
from server.services.lexical.analysis import TERM_NUMBERS, PassageTerms, analyse_passage

# Stands in every chunk: its count is the collection's size.
EVERY_CHUNK = 0
# A word in the index carries 33 bits of its collection's hash above its own 30: no collection reads through another's chunks.
WORD_BITS = 30
COLLECTION_BITS = 33

# Sorted, so that two jobs of one model cannot wait for each other.
_COUNT = text(
    """
    INSERT INTO term_counts AS old (organization, model_id, index_number, term, chunk_count)
    SELECT :organization, :model_id, :index_number, new.term, new.chunk_count
    FROM unnest(CAST(:terms AS integer[]), CAST(:counts AS integer[])) AS new (term, chunk_count) ORDER BY new.term
    ON CONFLICT (organization, model_id, index_number, term) DO UPDATE SET chunk_count = old.chunk_count + excluded.chunk_count
    """
)
_READ = text(
    """
    SELECT weights::text FROM chunk_terms
    WHERE organization = :organization AND model_id = :model_id AND document_id = :document_id AND index_number = :index_number
    """
)


def scope_words(organization: str, model_id: str, index_number: int = FIRST_INDEX) -> int:
    """Give what a collection, an index of a model, adds to the numbers of its words."""
    # The first one's as it was before there were others: migrations of then still write it.
    name = f"{organization}\0{model_id}" + (f"\0{index_number}" if index_number != FIRST_INDEX else "")
    digest = blake2b(name.encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> (64 - COLLECTION_BITS)) << WORD_BITS


def write_weights(weights: Mapping[int, float]) -> str:
    """Write term weights as pgvector reads a sparsevec."""
    return "{" + ",".join(f"{number}:{weight:.6g}" for number, weight in weights.items()) + f"}}/{TERM_NUMBERS}"


def make_term_row(organization: str, model_id: str, passage: str) -> dict[str, Any]:
    """Analyse a passage; give the `words` and `weights` of its row."""
    return _describe(scope_words(organization, model_id), analyse_passage(passage))


async def insert_terms(connection: AsyncConnection, index: IndexKey, document_id: str, new: Sequence[Chunk]) -> None:
    """Write the terms of a document's new chunks in an index and count them."""
    scope = scope_words(index.organization, index.model_id, index.index_number)
    analysed = [(chunk.position, analyse_passage(chunk.searched_text)) for chunk in new]
    key = index.columns | {"document_id": document_id}
    rows = [key | {"position": position} | _describe(scope, terms) for position, terms in analysed]
    await connection.execute(insert(chunk_terms), rows)
    counts = Counter({EVERY_CHUNK: len(new)})
    for _, terms in analysed:
        counts.update(terms.weights.keys())
    await _count(connection, index, counts)


async def delete_terms(connection: AsyncConnection, index: IndexKey, document_id: str) -> None:
    """Remove the terms of a document's chunks in an index and count them off."""
    key = index.columns | {"document_id": document_id}
    written = (await connection.scalars(_READ, key)).all()
    if not written:
        return
    counts = Counter({EVERY_CHUNK: -len(written)})
    for weights in written:
        counts.subtract(_read_numbers(weights))
    await connection.execute(delete(chunk_terms).where(*index.rows_of(chunk_terms), chunk_terms.c.document_id == document_id))
    await _count(connection, index, counts)


async def _count(connection: AsyncConnection, index: IndexKey, counts: Counter[int]) -> CursorResult[Any]:
    return await connection.execute(_COUNT, index.columns | {"terms": list(counts.keys()), "counts": list(counts.values())})


def _describe(scope: int, terms: PassageTerms) -> dict[str, Any]:
    return {"words": sorted(scope | number for number in terms.words), "weights": write_weights(terms.weights)}


def _read_numbers(weights: str) -> list[int]:
    inner = weights[1 : weights.index("}")]
    return [int(pair.partition(":")[0]) for pair in inner.split(",")] if inner else []
