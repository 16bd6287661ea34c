"""Jobs that use a base model and so no row of models; results of jobs that are no version."""

from collections.abc import Sequence

from alembic import op

revision: str = "0008"
down_revision: str | None = "0007"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

CHANGES = """
ALTER TABLE jobs ALTER COLUMN model_id DROP NOT NULL;
CREATE TABLE job_results (
    organization TEXT COLLATE "C" NOT NULL,
    job_id TEXT COLLATE "C" NOT NULL,
    artifact_path TEXT NOT NULL,
    manifest_sha256 TEXT NOT NULL,
    size_bytes BIGINT NOT NULL,
    create_time TIMESTAMPTZ NOT NULL,
    PRIMARY KEY (organization, job_id),
    CONSTRAINT job_results_of_job FOREIGN KEY (organization, job_id)
        REFERENCES jobs (organization, job_id) ON DELETE CASCADE
);
"""


def upgrade() -> None:
    """Make the table, and let a job be without a model of its own."""
    op.execute(CHANGES)
