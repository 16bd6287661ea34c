"""Files as documents: what was read of them, contents that wait beside the one that is found, pages, headings and hashes of chunks."""

from collections.abc import Sequence

from alembic import op

revision: str = "0005"
down_revision: str | None = "0004"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

CHANGES = """
ALTER TABLE documents ADD COLUMN job_id TEXT COLLATE "C" NOT NULL DEFAULT '';
ALTER TABLE documents ADD COLUMN revision INTEGER NOT NULL DEFAULT 1;
ALTER TABLE documents ADD COLUMN content_revision INTEGER NOT NULL DEFAULT 0;
ALTER TABLE documents ADD COLUMN path TEXT NOT NULL DEFAULT '';
ALTER TABLE documents ADD COLUMN format TEXT NOT NULL DEFAULT '';
ALTER TABLE documents ADD COLUMN original_size_bytes BIGINT NOT NULL DEFAULT 0;
ALTER TABLE documents ADD COLUMN original_sha256 TEXT NOT NULL DEFAULT '';
ALTER TABLE documents ADD COLUMN page_count INTEGER NOT NULL DEFAULT 0;
ALTER TABLE documents ADD COLUMN page_starts JSONB NOT NULL DEFAULT '[]';
ALTER TABLE documents ADD COLUMN headings JSONB NOT NULL DEFAULT '[]';
ALTER TABLE documents ADD COLUMN warnings JSONB NOT NULL DEFAULT '[]';
ALTER TABLE documents ADD COLUMN error_reason TEXT NOT NULL DEFAULT '';
ALTER TABLE documents ADD COLUMN update_time TIMESTAMPTZ;
DROP INDEX documents_pending;

UPDATE documents SET original_size_bytes = size_bytes, original_sha256 = content_sha256,
    content_revision = CASE state WHEN 'INDEXED' THEN 1 ELSE 0 END, error_reason = CASE error WHEN '' THEN '' ELSE 'DOCUMENT_INVALID' END;
-- Sources may be longer than what an index takes.
CREATE INDEX documents_by_source ON documents (organization, model_id, md5(source_uri)) WHERE source_uri <> '';
CREATE INDEX documents_by_original ON documents (organization, model_id, original_sha256) WHERE original_sha256 <> '';

CREATE TABLE staged_documents (
    organization TEXT COLLATE "C" NOT NULL,
    model_id TEXT COLLATE "C" NOT NULL,
    document_id TEXT COLLATE "C" NOT NULL,
    revision INTEGER NOT NULL,
    title TEXT NOT NULL,
    source_uri TEXT NOT NULL,
    metadata JSONB NOT NULL,
    text TEXT NOT NULL,
    path TEXT NOT NULL,
    size_bytes BIGINT NOT NULL,
    sha256 TEXT NOT NULL,
    PRIMARY KEY (organization, model_id, document_id),
    CONSTRAINT staged_documents_of_document FOREIGN KEY (organization, model_id, document_id)
        REFERENCES documents (organization, model_id, document_id) ON DELETE CASCADE
);
INSERT INTO staged_documents
    SELECT organization, model_id, document_id, 1, title, source_uri, metadata, text, '', size_bytes, content_sha256
    FROM documents WHERE state = 'PENDING';

ALTER TABLE chunks ADD COLUMN heading_path TEXT[] NOT NULL DEFAULT '{}';
ALTER TABLE chunks ADD COLUMN content_hash TEXT NOT NULL DEFAULT '';
"""


def upgrade() -> None:
    """Make the changes; what was PENDING waits as before."""
    op.execute(CHANGES)
