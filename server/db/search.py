"""The one statement of a search over a model's chunks: by vectors, by words, or both fused by rank."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import TextClause, text

from server.db.terms import EVERY_CHUNK, scope_words
from server.domain.retrieval import MetadataCondition, MetadataFilter, Search, SearchMode
from server.services.lexical.analysis import TERM_NUMBERS

# Rounding aside, no similarity is above 1. The bound keeps NaN out, which PostgreSQL sorts above every number.
MAX_SIMILARITY = 2.0
# Cormack, Clarke and Büttcher, "Reciprocal Rank Fusion outperforms Condorcet and individual Rank Learning Methods" (2009).
RANK_OFFSET = 60
# How many chunks each leg gives to the fusion, at least: a chunk may be far down in one and first in the other.
FUSED_PER_LEG = 100
# Up to so many chunks all are compared with a query's terms. In a larger collection the candidates are the chunks that hold its rarest
# words: words are added, from the rarest on, until they stand in so many chunks together. On 7,000 English passages 200 lost nothing.
COMPARED_CHUNKS = 5_000

# Documents that may be found.
_SEARCHED = """
searched AS (
    SELECT document_id FROM documents
    WHERE organization = :organization AND model_id = :model_id AND state = 'INDEXED'{conditions}
)"""

_DENSE = """
dense AS (
    SELECT document_id, position, 1 - (embedding <=> CAST(:vector AS halfvec)) AS score
    FROM chunk_vectors
    WHERE organization = :organization AND model_id = :model_id AND index_number = :index_number
        AND document_id IN (SELECT document_id FROM searched)
    ORDER BY embedding <=> CAST(:vector AS halfvec), document_id, position LIMIT :depth
)"""

# BM25: the chunk's part of each weight is stored, rarity and boost are the query's. `weighted` has only terms that the collection has.
_QUERY_TERMS = """
collection AS (
    SELECT chunk_count AS size FROM term_counts
    WHERE organization = :organization AND model_id = :model_id AND index_number = :index_number AND term = :every_chunk
),
weighted AS (
    SELECT asked.number, asked.is_word, counted.chunk_count,
        asked.boost * ln(1 + (greatest(size - chunk_count, 0) + 0.5) / (chunk_count + 0.5)) AS weight
    FROM unnest(CAST(:numbers AS integer[]), CAST(:boosts AS double precision[]), CAST(:are_words AS boolean[]))
        AS asked (number, boost, is_word)
    JOIN term_counts AS counted
        ON counted.organization = :organization AND counted.model_id = :model_id AND counted.index_number = :index_number
            AND counted.term = asked.number AND counted.chunk_count > 0
    CROSS JOIN collection
),
query AS (
    SELECT CAST('{{' || string_agg(number || ':' || CAST(weight AS real), ',') || '}}/{dimensions}' AS sparsevec) AS terms FROM weighted
)"""

# Both halves stand in the plan; the collection's size, known before either starts, lets one of them run.
_LEXICAL = """
candidates AS (
    SELECT array_agg(CAST(:scope AS bigint) | number) AS words FROM (
        SELECT number, sum(chunk_count) OVER (ORDER BY chunk_count, number) - chunk_count AS chunks_before FROM weighted WHERE is_word
    ) AS rarest WHERE chunks_before < :compared_chunks
),
lexical AS (
    SELECT document_id, position, score FROM (
        SELECT document_id, position, -(weights <#> (SELECT terms FROM query)) AS score FROM chunk_terms
        WHERE organization = :organization AND model_id = :model_id AND index_number = :index_number
            AND (SELECT size FROM collection) <= :compared_chunks AND document_id IN (SELECT document_id FROM searched)
        UNION ALL
        SELECT document_id, position, -(weights <#> (SELECT terms FROM query)) AS score FROM chunk_terms
        WHERE words && (SELECT words FROM candidates) AND (SELECT size FROM collection) > :compared_chunks
            AND organization = :organization AND model_id = :model_id AND index_number = :index_number
            AND document_id IN (SELECT document_id FROM searched)
    ) AS compared
    WHERE score > 0 ORDER BY score DESC, document_id, position LIMIT :depth
)"""

# Every fused chunk gets both scores, also where only one leg found it.
_FUSED = """
fused AS (
    SELECT document_id, position,
        coalesce(:dense_weight / (:rank_offset + dense.place), 0) + coalesce(:lexical_weight / (:rank_offset + lexical.place), 0) AS fused
    FROM (SELECT *, row_number() OVER (ORDER BY score DESC, document_id, position) AS place
        FROM dense WHERE score <= :max_similarity) AS dense
    FULL JOIN (SELECT *, row_number() OVER (ORDER BY score DESC, document_id, position) AS place FROM lexical) AS lexical
        USING (document_id, position)
),
found AS (
    SELECT document_id, position, 1 - (embedding <=> CAST(:vector AS halfvec)) AS similarity,
        coalesce(-(weights <#> (SELECT terms FROM query)), 0) AS lexical, fused
    FROM fused
    JOIN chunk_vectors USING (document_id, position)
    JOIN chunk_terms USING (organization, model_id, index_number, document_id, position)
    WHERE organization = :organization AND model_id = :model_id AND index_number = :index_number AND fused > 0
)"""

_FOUND_DENSE = """
found AS (SELECT document_id, position, score AS similarity, NULL AS lexical, NULL AS fused FROM dense)"""
_FOUND_LEXICAL = """
found AS (SELECT document_id, position, NULL AS similarity, score AS lexical, NULL AS fused FROM lexical)"""

_HITS = """
SELECT chunks.*, documents.title, documents.metadata, found.similarity, found.lexical, found.fused
FROM (SELECT * FROM found WHERE {threshold} ORDER BY {score} DESC, document_id, position LIMIT :top_k) AS found
JOIN chunks USING (document_id, position)
JOIN documents USING (organization, model_id, document_id)
WHERE organization = :organization AND model_id = :model_id AND index_number = :index_number
ORDER BY found.{score} DESC, document_id, position"""
# After the limit of the dense leg: below it lie the last ones only, and each distance is computed once.
_THRESHOLD = "similarity BETWEEN :similarity_threshold AND :max_similarity"


@dataclass(frozen=True, slots=True)
class _Leg:
    """What a mode is made of: its parts, the score that it sorts by, and whether similarities are known."""

    parts: Sequence[str]
    score: str
    has_similarity: bool


_LEGS = {
    SearchMode.DENSE: _Leg((_DENSE, _FOUND_DENSE), "similarity", True),
    SearchMode.LEXICAL: _Leg((_QUERY_TERMS.format(dimensions=TERM_NUMBERS), _LEXICAL, _FOUND_LEXICAL), "lexical", False),
    SearchMode.HYBRID: _Leg((_DENSE, _QUERY_TERMS.format(dimensions=TERM_NUMBERS), _LEXICAL, _FUSED), "fused", True),
}


def build_search(
    organization: str, model_id: str, search: Search, *, compared_chunks: int = COMPARED_CHUNKS
) -> tuple[TextClause, Mapping[str, Any]]:
    """Build the statement of a search with its parameters: one row for each chunk found, best first."""
    settings = search.settings
    leg = _LEGS[settings.search_mode]
    conditions, values = build_conditions(settings.filter)
    parts = [_SEARCHED.format(conditions="".join(f" AND {condition}" for condition in conditions)), *leg.parts]
    threshold = _THRESHOLD if leg.has_similarity else "true"
    is_fused = settings.search_mode is SearchMode.HYBRID
    parameters = values | {
        "organization": organization,
        "model_id": model_id,
        "index_number": search.index_number,
        "top_k": settings.top_k,
        "depth": max(settings.top_k, FUSED_PER_LEG) if is_fused else settings.top_k,
        "similarity_threshold": settings.similarity_threshold,
        "max_similarity": MAX_SIMILARITY,
        "vector": "[" + ",".join(map(repr, search.vector)) + "]",
        "numbers": [term.number for term in search.terms],
        "boosts": [term.boost for term in search.terms],
        "are_words": [term.is_word for term in search.terms],
        "every_chunk": EVERY_CHUNK,
        "scope": scope_words(organization, model_id, search.index_number),
        "compared_chunks": compared_chunks,
        "rank_offset": RANK_OFFSET,
        "dense_weight": float(settings.dense_weight),
        "lexical_weight": float(settings.lexical_weight),
    }
    statement = text(f"WITH {','.join(parts)}{_HITS.format(score=leg.score, threshold=threshold)}")
    return statement, parameters


def build_conditions(where: MetadataFilter) -> tuple[list[str], dict[str, Any]]:
    """Build the conditions of a filter on documents' metadata, with their parameters. JSON's 1 equals 1.0, and neither equals true."""
    conditions: list[str] = []
    values: dict[str, Any] = {}
    for place, condition in enumerate(where):
        key = f"key_{place}"
        values[key] = condition.key
        field = f"documents.metadata -> :{key}"
        for number, (test, value) in enumerate(_list_tests(condition)):
            name = f"value_{place}_{number}"
            conditions.append(test.format(field=field, key=key, value=name))
            values[name] = value
    return conditions, values


def _list_tests(condition: MetadataCondition) -> list[tuple[str, Any]]:
    if condition.exists is not None:
        return [("jsonb_exists(documents.metadata, :{key}) = :{value}", condition.exists)]
    if condition.equals is not None:
        return [("{field} = CAST(:{value} AS jsonb)", json.dumps(condition.equals))]
    bounds = {">=": condition.at_least, "<=": condition.at_most}
    given = [(sign, json.dumps(bound)) for sign, bound in bounds.items() if bound is not None]
    if not given:
        return [("{field} = ANY(CAST(:{value} AS jsonb[]))", [json.dumps(one) for one in condition.any_of])]
    # Values of another type than the bound's are outside, whatever order jsonb gives to types.
    of_type = "jsonb_typeof({field}) = jsonb_typeof(CAST(:{value} AS jsonb)) AND {field} %s CAST(:{value} AS jsonb)"
    return [(of_type % sign, bound) for sign, bound in given]
