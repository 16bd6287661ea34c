"""The text of a search's statement, by all that it depends on. Values are parameters, but for limits: the planner must know those."""
# ruff: noqa: S608  # made of fixed texts and numbers

from dataclasses import dataclass
from functools import lru_cache

from sqlalchemy import TextClause, text

from server.db.terms import EVERY_CHUNK
from server.db.vector_tables import name_vector_table
from server.domain.retrieval import SearchMode
from server.services.lexical.analysis import TERM_NUMBERS

# Rounding aside, no similarity is above 1. The bound keeps NaN out, which PostgreSQL sorts above every number.
MAX_SIMILARITY = 2.0
# Cormack, Clarke and Büttcher, "Reciprocal Rank Fusion outperforms Condorcet and individual Rank Learning Methods" (2009).
RANK_OFFSET = 60
# Documents of so many chunks together are compared one by one where a filter keeps no more of a large index. For 1 % of 200,000 that took a
# quarter of the time of scanning the HNSW index on, which found 89 % of the nearest ten: what passes lies far apart in its graph.
SCANNED_CHUNKS = 20_000
# Up to so many chunks all are compared with a query's terms.
COMPARED_CHUNKS = 5_000
# In a larger collection the candidates are the chunks that hold its rarest words: words are added, from the rarest on, until they stand in
# so many chunks together. Against comparing every chunk this and what follows changed MRR@10 by less than 0.0001 on GSM8K's 7,400 stories
# (.8434) and on their 45,516 sentences (.7737), and recall@10 by none and .001; of the best ten 99.9 and 99.4 % stayed the same.
CANDIDATE_CHUNKS = 2_000
# Of the chunks that have only common words of the query so many of each kind: any, since all of them would take seconds. They are looked
# at only where few have a rare word: those should stand before them, and a leg gives no more than a hundred.
COMMON_CHUNKS = 1_000
FEW_CHUNKS = 200

_MODEL = "organization = :organization AND model_id = :model_id"
_INDEX = f"{_MODEL} AND index_number = :index_number"
_ORDER = "{score} DESC, document_id, position"
# What a chunk of a large collection must hold to be a candidate: a rare word; of the common ones two, at best; or the least common one.
# NULL where there are not so many: every chunk contains an empty list, and the whole index would be read for it.
_HAS_RARE = "words && (SELECT words FROM rare)"
_HAS_COMMON = (
    "words @> (SELECT words[1:2] FROM common WHERE cardinality(words) >= 2)",
    "words @> (SELECT ARRAY[words[1], words[3]] FROM common WHERE cardinality(words) >= 3)",
    "words @> (SELECT words[2:3] FROM common WHERE cardinality(words) >= 3)",
    "words && (SELECT words[1:1] FROM common)",
)


@dataclass(frozen=True, slots=True)
class Shape:
    """What a statement's text depends on.

    `own_table`: the key of the table of the index's own, with an HNSW index for this `dimension`; None: the shared one, without.
    `depth`: chunks of each leg. `pool`: of these the best, from which `most` are given, at most `per_document` (0: any) of a document.
    `pairwise`: with each chunk its similarity to those before it.
    """

    mode: SearchMode
    depth: int
    pool: int
    most: int
    own_table: int | None = None
    dimension: int = 0
    conditions: tuple[str, ...] = ()
    per_document: int = 0
    pairwise: bool = False
    compared_chunks: int = COMPARED_CHUNKS
    scanned_chunks: int = SCANNED_CHUNKS

    @property
    def vectors(self) -> str:
        """The table that holds the vectors."""
        return name_vector_table(self.own_table)

    @property
    def candidate_chunks(self) -> int:
        """How many chunks of a large collection rare words may bring."""
        return min(self.compared_chunks, CANDIDATE_CHUNKS)

    @property
    def distance(self) -> str:
        """The cosine distance; with an index, in the very words that make the planner use it."""
        return f"embedding <=> CAST(:vector AS halfvec{f'({self.dimension})' if self.own_table is not None else ''})"

    @property
    def score(self) -> str:
        """What the chunks are ordered by."""
        return {SearchMode.DENSE: "similarity", SearchMode.LEXICAL: "lexical", SearchMode.HYBRID: "fused"}[self.mode]


@lru_cache(maxsize=1_000)
def write_statement(shape: Shape) -> TextClause:
    """Write the statement: a row for each chunk, best first; one row without a chunk where nothing is found.

    Every row has `revision`: of the model and its index as the search saw them.
    """
    parts = [_CURRENT]
    parts += [_write_matching(shape)] if shape.conditions else []
    parts += [_write_dense(shape)] if shape.mode is not SearchMode.LEXICAL else []
    parts += [_QUERY_TERMS, _write_candidates(shape), _write_lexical(shape)] if shape.mode is not SearchMode.DENSE else []
    parts += [_write_found(shape), _write_best(shape)]
    return text(f"WITH {', '.join(parts)}{_write_hits(shape)}")


_CURRENT = f"""
current AS (
    SELECT models.xmin || '.' || rag_indexes.xmin AS revision
    FROM models JOIN rag_indexes USING (organization, model_id) WHERE {_INDEX}
)"""

# BM25: the chunk's part of each weight is stored, rarity and boost are the query's. `weighted` has only terms that the collection has.
_QUERY_TERMS = f"""
collection AS (SELECT chunk_count AS size FROM term_counts WHERE {_INDEX} AND term = {EVERY_CHUNK}),
weighted AS (
    SELECT asked.number, asked.is_word, counted.chunk_count,
        asked.boost * ln(1 + (greatest(size - chunk_count, 0) + 0.5) / (chunk_count + 0.5)) AS weight
    FROM unnest(CAST(:numbers AS integer[]), CAST(:boosts AS double precision[]), CAST(:are_words AS boolean[]))
        AS asked (number, boost, is_word)
    JOIN term_counts AS counted ON {_INDEX} AND counted.term = asked.number AND counted.chunk_count > 0
    CROSS JOIN collection
),
query AS (
    SELECT CAST('{{' || string_agg(number || ':' || CAST(weight AS real), ',') || '}}/{TERM_NUMBERS}' AS sparsevec) AS terms FROM weighted
)"""


def _write_conditions(shape: Shape) -> str:
    return " AND ".join((_MODEL, *shape.conditions))


def _write_matching(shape: Shape) -> str:
    """Find the documents that a filter keeps, and say whether they are few; no more are read than answers this."""
    most = max(shape.scanned_chunks, shape.compared_chunks)
    return f"""
matching AS MATERIALIZED (
    SELECT document_id, greatest(chunk_count, 1) AS chunk_count FROM documents WHERE {_write_conditions(shape)} LIMIT {most + 1}
),
breadth AS (SELECT coalesce(sum(chunk_count), 0) AS chunks FROM matching)"""


def _write_match(shape: Shape, table: str) -> str:
    """Test a row's document as the row comes, never as a join: the scan keeps its order and ends when there are enough."""
    return f"(SELECT true FROM documents WHERE documents.document_id = {table}.document_id AND {_write_conditions(shape)})"


def _write_dense(shape: Shape) -> str:
    chosen = f"SELECT document_id, position, 1 - ({shape.distance}) AS score FROM"
    if shape.own_table is None:
        kept = f" AND document_id IN (SELECT document_id FROM documents WHERE {_write_conditions(shape)})" if shape.conditions else ""
        search = f"{chosen} {shape.vectors} WHERE {_INDEX}{kept} ORDER BY {shape.distance}, document_id, position LIMIT {shape.depth}"
    elif not shape.conditions:
        # The table holds this index alone. Any other condition or order would keep the planner from its HNSW index.
        search = f"{chosen} {shape.vectors} ORDER BY {shape.distance} LIMIT {shape.depth}"
    else:
        # Few documents: their chunks, found by key, are compared exactly; by score, since an order by distance would tempt the planner to
        # walk the HNSW index. Many: that index is scanned on until enough of them came.
        search = f"""(
        {chosen} matching JOIN {shape.vectors} USING (document_id)
        WHERE {_INDEX} AND (SELECT chunks FROM breadth) <= {shape.scanned_chunks} ORDER BY score DESC LIMIT {shape.depth}
    ) UNION ALL (
        {chosen} {shape.vectors}
        WHERE (SELECT chunks FROM breadth) > {shape.scanned_chunks} AND {_write_match(shape, shape.vectors)}
        ORDER BY {shape.distance} LIMIT {shape.depth}
    )"""
    return f"""
dense AS MATERIALIZED (
    {search}
)"""


def _write_candidates(shape: Shape) -> str:
    return f"""
ranked AS (
    SELECT CAST(:scope AS bigint) | number AS word, chunk_count, sum(chunk_count) OVER (ORDER BY chunk_count, number) AS chunks_together
    FROM weighted WHERE is_word
),
rare AS (
    SELECT array_agg(word) AS words, coalesce(max(chunks_together), 0) AS chunks
    FROM ranked WHERE chunks_together <= {shape.candidate_chunks}
),
common AS (
    SELECT array_agg(word ORDER BY chunk_count, word) AS words
    FROM (SELECT * FROM ranked WHERE chunks_together > {shape.candidate_chunks} ORDER BY chunk_count, word LIMIT 3) AS rarest
)"""


def _write_lexical(shape: Shape) -> str:
    """Compare all chunks of a small collection, or of few documents; else those that the index of words gives, so many of each kind.

    Both halves stand in the plan; what is counted before either starts lets one of them run.
    """
    score = "-(weights <#> (SELECT terms FROM query))"
    chosen = f"SELECT document_id, position, {score} AS score FROM"
    is_small = is_compared = f"(SELECT size FROM collection) <= {shape.compared_chunks}"
    of_few, kept = "", ""
    if shape.conditions:
        kept = f" AND {_write_match(shape, 'chunk_terms')}"
        is_few = f"(SELECT chunks FROM breadth) <= {shape.compared_chunks}"
        is_compared = f"({is_small} OR {is_few})"
        # Found by their documents' keys: of a large collection all chunks would be read, and the document of each.
        of_few = f"""{chosen} matching JOIN chunk_terms USING (document_id) WHERE {_INDEX} AND {is_few} AND NOT {is_small}
        UNION ALL """
    common = min(shape.candidate_chunks, COMMON_CHUNKS)
    lacking = f"(SELECT chunks FROM rare) < {FEW_CHUNKS}"
    tests = [(_HAS_RARE, shape.candidate_chunks)] + [(f"{test} AND {lacking}", common) for test in _HAS_COMMON]
    by_words = "\n        UNION ALL ".join(
        # A word's number holds its collection, bar a collision. Fenced off, or the planner reads the keys of the whole collection, too.
        f"(SELECT * FROM (SELECT * FROM (SELECT * FROM chunk_terms WHERE {test} OFFSET 0) AS holding WHERE {_INDEX} LIMIT {most})"
        f" AS chunk_terms WHERE NOT {is_compared}{kept})"
        for test, most in tests
    )
    # Tested after the limit, below which only lower scores lie: in the scans themselves each would be computed twice.
    return f"""
lexical AS MATERIALIZED (
    SELECT * FROM (
        {of_few}{chosen} chunk_terms WHERE {_INDEX} AND {is_small}{kept}
        UNION
        SELECT document_id, position, {score} FROM (
        {by_words}
        ) AS candidates
        ORDER BY score DESC, document_id, position LIMIT {shape.depth}
    ) AS best WHERE score > 0
)"""


def _write_found(shape: Shape) -> str:
    """Name the scores. A fused chunk gets both, also where only one leg found it: similarity for the threshold, the other at the end."""
    if shape.mode is SearchMode.DENSE:
        return "\nfound AS (SELECT document_id, position, score AS similarity, NULL AS lexical, NULL AS fused FROM dense)"
    if shape.mode is SearchMode.LEXICAL:
        return "\nfound AS (SELECT document_id, position, NULL AS similarity, score AS lexical, NULL AS fused FROM lexical)"
    return f"""
fused AS (
    SELECT document_id, position, dense.score AS similarity, lexical.score AS lexical,
        coalesce(:dense_weight / ({RANK_OFFSET} + dense.place), 0) + coalesce(:lexical_weight / ({RANK_OFFSET} + lexical.place), 0) AS fused
    FROM (SELECT *, row_number() OVER (ORDER BY score DESC, document_id, position) AS place
        FROM dense WHERE score <= {MAX_SIMILARITY}) AS dense
    FULL JOIN (SELECT *, row_number() OVER (ORDER BY score DESC, document_id, position) AS place FROM lexical) AS lexical
        USING (document_id, position)
),
found AS MATERIALIZED (
    SELECT document_id, position, coalesce(similarity, (SELECT 1 - ({shape.distance}) FROM {shape.vectors} AS vectors WHERE {_INDEX}
        AND vectors.document_id = fused.document_id AND vectors.position = fused.position)) AS similarity, lexical, fused
    FROM fused WHERE fused > 0
)"""


def _write_best(shape: Shape) -> str:
    """Keep what passes the threshold, the best of it, and of each document so many."""
    # After the limit of the dense leg: below it lie the last ones only, and each distance is computed once.
    threshold = "true" if shape.mode is SearchMode.LEXICAL else f"similarity BETWEEN :similarity_threshold AND {MAX_SIMILARITY}"
    order = _ORDER.format(score=shape.score)
    best = f"SELECT * FROM found WHERE {threshold} ORDER BY {order} LIMIT {shape.pool}"
    if shape.per_document:
        numbered = f"SELECT *, row_number() OVER (PARTITION BY document_id ORDER BY {order}) AS of_document FROM ({best}) AS best"
        best = f"SELECT * FROM ({numbered}) AS best WHERE of_document <= {shape.per_document} ORDER BY {order} LIMIT {shape.most}"
    placed = f"SELECT best.*, row_number() OVER (ORDER BY {order}) AS place FROM ({best}) AS best"
    if shape.pairwise:
        vectors = f"SELECT embedding FROM {shape.vectors} AS vectors WHERE {_INDEX}"
        of_chunk = "vectors.document_id = placed.document_id AND vectors.position = placed.position"
        placed = f"SELECT placed.*, embedding FROM ({placed}) AS placed JOIN LATERAL ({vectors} AND {of_chunk}) AS vectors ON true"
    return f"\nplaced AS MATERIALIZED ({placed})"


# Where pages begin within a chunk, so that what is cited of it can name its own page. A document without pages costs nothing.
_PAGE_BREAKS = """CASE WHEN chunks.page IS NOT NULL THEN ARRAY(
            SELECT CAST(start AS integer) FROM jsonb_array_elements_text(documents.page_starts) AS start
            WHERE CAST(start AS integer) > chunks.char_start AND CAST(start AS integer) < chunks.char_end ORDER BY 1) END"""


def _write_hits(shape: Shape) -> str:
    lexical = "placed.lexical"
    if shape.mode is SearchMode.HYBRID:
        of_chunk = "chunk_terms.document_id = placed.document_id AND chunk_terms.position = placed.position"
        computed = f"SELECT -(weights <#> (SELECT terms FROM query)) FROM chunk_terms WHERE {_INDEX} AND {of_chunk}"
        lexical = f"coalesce(placed.lexical, ({computed}), 0)"
    pairs = "NULL"
    if shape.pairwise:
        similar = "array_agg(CAST(1 - (other.embedding <=> placed.embedding) AS real) ORDER BY other.place)"
        pairs = f"(SELECT {similar} FROM placed AS other WHERE other.place < placed.place)"
    return f"""
SELECT current.revision, hits.* FROM current LEFT JOIN (
    SELECT chunks.*, documents.title, documents.metadata, placed.place, placed.similarity, {lexical} AS lexical, placed.fused,
        {pairs} AS pairs, {_PAGE_BREAKS} AS page_breaks
    FROM placed JOIN chunks USING (document_id, position) JOIN documents USING (organization, model_id, document_id)
    WHERE {_INDEX}
) AS hits ON true
ORDER BY hits.place"""
