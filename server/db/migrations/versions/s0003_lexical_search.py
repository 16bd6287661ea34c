"""The lexical search: the terms of each chunk, and in how many chunks of its collection each term stands. Fills both for what is there."""

from collections.abc import Sequence

from alembic import op
from sqlalchemy import Connection, text

from server.db.terms import make_term_row

revision: str = "0003"
down_revision: str | None = "0002"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

TABLES = """
CREATE TABLE chunk_terms (
    organization TEXT COLLATE "C" NOT NULL,
    model_id TEXT COLLATE "C" NOT NULL,
    document_id TEXT COLLATE "C" NOT NULL,
    position INTEGER NOT NULL,
    words BIGINT[] NOT NULL,
    weights sparsevec NOT NULL,
    PRIMARY KEY (organization, model_id, document_id, position),
    CONSTRAINT chunk_terms_of_document FOREIGN KEY (organization, model_id, document_id)
        REFERENCES documents (organization, model_id, document_id) ON DELETE CASCADE
);
CREATE TABLE term_counts (
    organization TEXT COLLATE "C" NOT NULL,
    model_id TEXT COLLATE "C" NOT NULL,
    term INTEGER NOT NULL,
    chunk_count INTEGER NOT NULL,
    PRIMARY KEY (organization, model_id, term),
    CONSTRAINT term_counts_of_model FOREIGN KEY (organization, model_id)
        REFERENCES models (organization, model_id) ON DELETE CASCADE
);
"""

# Weights stay in their row up to a page, as vectors do: a scan must not follow a pointer per chunk. Counts change with every document:
# room on their page keeps that off the index.
STORAGE = """
ALTER TABLE chunk_terms ALTER COLUMN weights SET STORAGE EXTERNAL, SET (toast_tuple_target = 8160);
ALTER TABLE term_counts SET (fillfactor = 70);
"""

CHUNKS_PER_READ = 500
READ = """
SELECT organization, model_id, document_id, position, text FROM chunks
WHERE (organization, model_id, document_id, position) > (:organization, :model_id, :document_id, :position)
ORDER BY organization, model_id, document_id, position LIMIT :most
"""
WRITE = """
INSERT INTO chunk_terms (organization, model_id, document_id, position, words, weights)
VALUES (:organization, :model_id, :document_id, :position, :words, CAST(:weights AS sparsevec))
"""
# The number 0 stands in every chunk: its count is the collection's size.
COUNT = """
INSERT INTO term_counts (organization, model_id, term, chunk_count)
SELECT organization, model_id, term, count(*) FROM chunk_terms
CROSS JOIN LATERAL (SELECT split_part(pair, ':', 1)::integer AS term
    FROM string_to_table(btrim(split_part(weights::text, '/', 1), '{}'), ',') AS pair WHERE pair <> '' UNION ALL SELECT 0) AS terms
GROUP BY organization, model_id, term
"""
INDEX = "CREATE INDEX chunk_terms_by_word ON chunk_terms USING gin (words)"


def upgrade() -> None:
    """Make the tables; analyse the chunks that exist (about a minute for 50,000)."""
    op.execute(TABLES)
    op.execute(STORAGE)
    _analyse_chunks(op.get_bind())
    op.execute(COUNT)
    op.execute(INDEX)


def _analyse_chunks(connection: Connection) -> None:
    last: dict[str, object] = {"organization": "", "model_id": "", "document_id": "", "position": -1}
    while rows := connection.execute(text(READ), last | {"most": CHUNKS_PER_READ}).mappings().all():
        keys = [{name: row[name] for name in last} for row in rows]
        terms = [make_term_row(row["organization"], row["model_id"], row["text"]) for row in rows]
        connection.execute(text(WRITE), [key | row for key, row in zip(keys, terms, strict=True)])
        last = keys[-1]
