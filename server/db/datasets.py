"""Rows of datasets; the records themselves are files."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Row, delete, exists, insert, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from server.db.tables import IS_ACTIVE, datasets, jobs
from server.domain.datasets import Compression, Dataset, DatasetFormat, RecordKind
from server.domain.errors import FailedPrecondition, NotFound
from server.domain.findings import Finding
from server.domain.ids import DATASET, is_id
from server.domain.orders import DatasetFile
from server.services.codec import Codec
from server.services.ports import Page

_FINDINGS = Codec[Sequence[Finding]](Sequence[Finding])


class PostgresDatasets:
    """The Datasets of one organization, on an open transaction."""

    def __init__(self, connection: AsyncConnection, organization: str) -> None:
        self._connection = connection
        self._organization = organization

    async def insert(self, dataset: Dataset) -> None:
        """Add a dataset."""
        row = {
            "organization": self._organization,
            "dataset_id": dataset.dataset_id,
            "display_name": dataset.display_name,
            "format": dataset.format,
            "record_kind": dataset.record_kind,
            "record_count": dataset.record_count,
            "invalid_record_count": dataset.invalid_record_count,
            "size_bytes": dataset.size_bytes,
            "sha256": dataset.sha256,
            "path": dataset.path,
            "findings": _FINDINGS.to_json(dataset.findings),
            "create_time": dataset.create_time,
            "finding_counts": _FINDINGS.to_json(dataset.finding_counts),
            "compression": dataset.compression,
            "source_uri": dataset.source_uri,
        }
        await self._connection.execute(insert(datasets).values(row))

    async def get(self, dataset_id: str) -> Dataset:
        """Read a dataset. Raises NotFound."""
        if not is_id(dataset_id, DATASET):
            raise NotFound.of("dataset", dataset_id)
        row = (await self._connection.execute(select(datasets).where(*self._own(dataset_id)))).one_or_none()
        if row is None:
            raise NotFound.of("dataset", dataset_id)
        return dataset_from_row(row)

    async def list(self, page: Page) -> Sequence[Dataset]:
        """List datasets, newest first."""
        conditions = [datasets.c.organization == self._organization]
        conditions += [datasets.c.dataset_id < page.before_id] if page.before_id is not None else []
        query = select(datasets).where(*conditions).order_by(datasets.c.dataset_id.desc()).limit(page.size)
        return [dataset_from_row(row) for row in await self._connection.execute(query)]

    async def delete(self, dataset_id: str) -> None:
        """Remove the row. Raises NotFound, and FailedPrecondition where a job began to use it since the caller looked."""
        if not is_id(dataset_id, DATASET):
            raise NotFound.of("dataset", dataset_id)
        # The row lock first: a job that is just being added holds a share of it.
        if await self._connection.scalar(select(datasets.c.dataset_id).where(*self._own(dataset_id)).with_for_update()) is None:
            raise NotFound.of("dataset", dataset_id)
        using = exists().where(jobs.c.organization == self._organization, uses_dataset(dataset_id), IS_ACTIVE)
        if await self._connection.scalar(select(using)):
            raise FailedPrecondition(
                "A job that is not finished uses the dataset.", reason="DATASET_IN_USE", metadata={"dataset_id": dataset_id}
            )
        await self._connection.execute(delete(datasets).where(*self._own(dataset_id)))

    def _own(self, dataset_id: str) -> tuple[ColumnElement[bool], ...]:
        return datasets.c.organization == self._organization, datasets.c.dataset_id == dataset_id


def uses_dataset(dataset_id: str) -> ColumnElement[bool]:
    """Tell of a row of jobs whether it trains on this dataset, evaluates on it or answers its records."""
    return or_(jobs.c.dataset_id == dataset_id, jobs.c.eval_dataset_id == dataset_id)


def dataset_from_row(row: Row[Any]) -> Dataset:
    """Read a row of `datasets`."""
    return Dataset(
        dataset_id=row.dataset_id,
        display_name=row.display_name,
        format=DatasetFormat(row.format),
        record_kind=RecordKind(row.record_kind),
        record_count=row.record_count,
        invalid_record_count=row.invalid_record_count,
        size_bytes=row.size_bytes,
        sha256=row.sha256,
        path=row.path,
        create_time=row.create_time,
        findings=tuple(_FINDINGS.from_json(row.findings)),
        finding_counts=tuple(_FINDINGS.from_json(row.finding_counts)),
        compression=Compression(row.compression) if row.compression else None,
        source_uri=row.source_uri,
    )


def dataset_file_from_row(row: Row[Any]) -> DatasetFile:
    """Read of a row of `datasets` what a job needs to read the file."""
    form, kind = DatasetFormat(row.format), RecordKind(row.record_kind)
    return DatasetFile(row.path, row.sha256, form, kind, row.record_count, row.invalid_record_count)
