"""Several indexes of one model: chunks, vectors and terms carry the number of theirs. What is there becomes its model's first."""

from collections.abc import Sequence

from alembic import op

revision: str = "0004"
down_revision: str | None = "0003"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

TABLE = """
CREATE TABLE rag_indexes (
    organization TEXT COLLATE "C" NOT NULL,
    model_id TEXT COLLATE "C" NOT NULL,
    index_number INTEGER NOT NULL,
    state TEXT NOT NULL,
    embedding_model TEXT NOT NULL,
    chunking JSONB NOT NULL,
    revision TEXT NOT NULL,
    space JSONB,
    fingerprint TEXT NOT NULL,
    dimension INTEGER,
    calibration JSONB,
    index_key BIGINT GENERATED ALWAYS AS IDENTITY,
    vector_table TEXT,
    create_time TIMESTAMP WITH TIME ZONE NOT NULL,
    PRIMARY KEY (organization, model_id, index_number),
    CONSTRAINT rag_indexes_by_key UNIQUE (organization, index_key),
    CONSTRAINT rag_indexes_of_model FOREIGN KEY (organization, model_id)
        REFERENCES models (organization, model_id) ON DELETE CASCADE
);
INSERT INTO rag_indexes
    (organization, model_id, index_number, state, embedding_model, chunking, revision, fingerprint, dimension, create_time)
SELECT organization, model_id, 1, CASE state WHEN 'READY' THEN 'READY' ELSE 'BUILDING' END,
    rag->>'embedding_model', rag->'chunking', '', '', embedding_dimension, create_time
FROM models WHERE rag IS NOT NULL;
ALTER TABLE models DROP COLUMN embedding_dimension, ADD COLUMN serving_index INTEGER;
UPDATE models SET serving_index = 1 WHERE rag IS NOT NULL;
"""

# A default that stands in no row takes no time, however many rows there are; the keys are built anew.
CHUNKS = """
ALTER TABLE {table} ADD COLUMN index_number INTEGER NOT NULL DEFAULT 1;
ALTER TABLE {table} ALTER COLUMN index_number DROP DEFAULT;
ALTER TABLE {table} DROP CONSTRAINT {table}_pkey, ADD PRIMARY KEY (organization, model_id, document_id, index_number, position);
"""
COUNTS = """
ALTER TABLE term_counts ADD COLUMN index_number INTEGER NOT NULL DEFAULT 1;
ALTER TABLE term_counts ALTER COLUMN index_number DROP DEFAULT;
ALTER TABLE term_counts DROP CONSTRAINT term_counts_of_model, DROP CONSTRAINT term_counts_pkey,
    ADD PRIMARY KEY (organization, model_id, index_number, term),
    ADD CONSTRAINT term_counts_of_index FOREIGN KEY (organization, model_id, index_number)
        REFERENCES rag_indexes (organization, model_id, index_number) ON DELETE CASCADE;
"""


def upgrade() -> None:
    """Make the table and widen the keys."""
    op.execute(TABLE)
    for table in ("chunks", "chunk_vectors", "chunk_terms"):
        op.execute(CHUNKS.format(table=table))
    op.execute(COUNTS)
