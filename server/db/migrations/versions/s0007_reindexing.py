"""What an index that is built beside the one that answers has of each document."""

from collections.abc import Sequence

from alembic import op

revision: str = "0007"
down_revision: str | None = "0006"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

TABLE = """
CREATE TABLE reindexed_documents (
    organization TEXT COLLATE "C" NOT NULL,
    model_id TEXT COLLATE "C" NOT NULL,
    index_number INTEGER NOT NULL,
    document_id TEXT COLLATE "C" NOT NULL,
    content_revision INTEGER NOT NULL,
    chunk_count INTEGER NOT NULL,
    error TEXT NOT NULL,
    error_reason TEXT NOT NULL,
    PRIMARY KEY (organization, model_id, index_number, document_id),
    CONSTRAINT reindexed_documents_of_index FOREIGN KEY (organization, model_id, index_number)
        REFERENCES rag_indexes (organization, model_id, index_number) ON DELETE CASCADE,
    CONSTRAINT reindexed_documents_of_document FOREIGN KEY (organization, model_id, document_id)
        REFERENCES documents (organization, model_id, document_id) ON DELETE CASCADE
);
CREATE INDEX reindexed_documents_by_document ON reindexed_documents (organization, model_id, document_id);
"""


def upgrade() -> None:
    """Make the table."""
    op.execute(TABLE)
