"""What whole fine-tuning keeps: lineage and exports of versions, estimates, retries, the best checkpoint, findings by code."""

from collections.abc import Sequence

from alembic import op

revision: str = "0002"
down_revision: str | None = "0001"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

CHANGES = """
ALTER TABLE datasets ADD COLUMN finding_counts JSONB NOT NULL DEFAULT '[]';
ALTER TABLE datasets ADD COLUMN compression TEXT;
ALTER TABLE datasets ADD COLUMN source_uri TEXT NOT NULL DEFAULT '';

ALTER TABLE jobs ADD COLUMN estimate JSONB;
ALTER TABLE jobs ADD COLUMN retry_of_job_id TEXT COLLATE "C";
ALTER TABLE jobs ADD COLUMN peak_device_memory_bytes BIGINT NOT NULL DEFAULT 0;
-- One retry of each job at most; and the way back along a chain of them.
CREATE UNIQUE INDEX jobs_by_retried ON jobs (organization, retry_of_job_id) WHERE retry_of_job_id IS NOT NULL;

-- The attempts at a job: a few of its events.
CREATE INDEX job_events_of_states ON job_events (organization, job_id, sequence) WHERE kind = 'state_changed';

ALTER TABLE checkpoints ADD COLUMN best BOOLEAN NOT NULL DEFAULT false;

ALTER TABLE model_versions ADD COLUMN attempt INTEGER NOT NULL DEFAULT 1;
ALTER TABLE model_versions ADD COLUMN checkpoint_step INTEGER NOT NULL DEFAULT 0;
ALTER TABLE model_versions ADD COLUMN spec JSONB;
ALTER TABLE model_versions ADD COLUMN library_versions JSONB NOT NULL DEFAULT '{}';
ALTER TABLE model_versions ADD COLUMN template_sha256 TEXT NOT NULL DEFAULT '';

-- Attempts and configurations of versions that are there already stand with their jobs, which live as long as the model.
UPDATE model_versions SET spec = jobs.spec, attempt = jobs.attempt FROM jobs
    WHERE jobs.organization = model_versions.organization AND jobs.job_id = model_versions.job_id;

-- The number of the latest version that was ever made: one that was deleted is not given again to another.
ALTER TABLE models ADD COLUMN last_version INTEGER NOT NULL DEFAULT 0;
UPDATE models SET last_version = latest.version
    FROM (SELECT organization, model_id, max(version) AS version FROM model_versions GROUP BY organization, model_id) AS latest
    WHERE latest.organization = models.organization AND latest.model_id = models.model_id;

CREATE TABLE model_exports (
    organization TEXT COLLATE "C" NOT NULL,
    model_id TEXT COLLATE "C" NOT NULL,
    version INTEGER NOT NULL,
    format TEXT NOT NULL,
    job_id TEXT COLLATE "C" NOT NULL,
    artifact_path TEXT NOT NULL,
    manifest_sha256 TEXT NOT NULL,
    size_bytes BIGINT NOT NULL,
    metrics JSONB NOT NULL,
    create_time TIMESTAMPTZ NOT NULL,
    PRIMARY KEY (organization, model_id, version, format),
    CONSTRAINT model_exports_of_version FOREIGN KEY (organization, model_id, version)
        REFERENCES model_versions (organization, model_id, version) ON DELETE CASCADE
);
"""


def upgrade() -> None:
    """Make the changes."""
    op.execute(CHANGES)
