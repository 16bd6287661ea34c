"""An index over documents' metadata, for filters that keep few of them."""

from collections.abc import Sequence

from alembic import op

revision: str = "0006"
down_revision: str | None = "0005"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    """Make the index: of whole pairs of key and value, which is a third of the size that keys and values apart would take."""
    op.execute("CREATE INDEX documents_by_metadata ON documents USING gin (metadata jsonb_path_ops)")
