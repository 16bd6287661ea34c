"""Datasets: uploaded or imported as a stream to disk, then looked through once in a process of its own; kept if a record is good."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime

from server.domain.datasets import Dataset, DatasetFormat, Inspection, InspectionOrder, RecordKind
from server.domain.errors import FailedPrecondition, FieldViolation, InvalidInput
from server.domain.findings import Severity
from server.domain.ids import DATASET, new_id
from server.domain.record_forms import parse_record
from server.services.idempotency import find_issued, hash_body, remember
from server.services.paging import close_page, open_page
from server.services.ports import Database, DatasetSources, Files, Inspector, StoredFile, Transaction
from server.services.requests import ImportDataset, Listed, PageRequest, UploadDataset
from server.services.validation import Violations

MAX_NAMED_FINDINGS = 20  # in the error of a dataset that is refused
MAX_URI_CHARACTERS = 2_000
PROGRESS_SECONDS = 1.0
MAX_UNPACKING = 4  # times max_bytes: how large a packed file may become


@dataclass(slots=True)
class Progress:
    """How far taking in a dataset is. `total_bytes` None: not known."""

    read_bytes: int = 0
    total_bytes: int | None = None
    records: int = 0


class Datasets:
    """Use cases of datasets."""

    def __init__(self, database: Database, files: Files, inspector: Inspector, sources: DatasetSources, max_bytes: int) -> None:
        self._database = database
        self._files = files
        self._inspector = inspector
        self._sources = sources
        self._max_bytes = max_bytes

    async def upload(self, organization: str, request: UploadDataset, data: AsyncIterator[bytes]) -> Dataset:
        """Store an upload. Raises InvalidInput where no record is good, ResourceExhausted where it is too large."""
        found = Violations()
        found.name(request.display_name, "", request.request_id)
        found.raise_if_any()
        return await self._take_in(organization, "UploadDataset", request, data, Progress())

    async def import_(self, organization: str, request: ImportDataset) -> AsyncGenerator[Progress | Dataset]:
        """Store what lies at a URI; gives how far it is every second, and last the dataset. Closing ends it and leaves nothing.

        Raises as `upload` does, and InvalidInput or FailedPrecondition for a URI that may not be read, NotFound, Unavailable.
        """
        found = Violations()
        found.name(request.display_name, "", request.request_id)
        found.text("uri", request.uri, MAX_URI_CHARACTERS, least=1)
        found.raise_if_any()
        progress = Progress()
        task = asyncio.create_task(self._import(organization, request, progress))
        try:
            while not (await asyncio.wait({task}, timeout=PROGRESS_SECONDS))[0]:
                yield Progress(progress.read_bytes, progress.total_bytes, progress.records)
            yield await task
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task

    async def _import(self, organization: str, request: ImportDataset, progress: Progress) -> Dataset:
        async with self._sources.open(request.uri) as source:
            progress.total_bytes = source.size_bytes
            return await self._take_in(organization, "ImportDataset", request, source.pieces, progress)

    async def add_inline(self, transaction: Transaction, organization: str, name: str, lines: Sequence[bytes]) -> Dataset:
        """Store records that came inside a request as a dataset of their own. The caller has checked them."""
        dataset_id = new_id(DATASET)
        path = _make_path(organization, dataset_id)

        async def stream() -> AsyncIterator[bytes]:
            for line in lines:
                yield line + b"\n"

        kinds = await asyncio.to_thread(lambda: {parse_record(line).kind for line in lines})
        kind = kinds.pop() if len(kinds) == 1 else RecordKind.MIXED
        stored = await self._files.write(path, stream(), self._max_bytes)
        dataset = _describe(dataset_id, name, path, stored, Inspection(DatasetFormat.JSONL, None, kind, len(lines), 0))
        await transaction.datasets.insert(dataset)
        return dataset

    async def get(self, organization: str, dataset_id: str) -> Dataset:
        """Read a dataset. Raises NotFound."""
        async with self._database.transaction(organization) as transaction:
            return await transaction.datasets.get(dataset_id)

    async def list(self, organization: str, request: PageRequest) -> Listed[Dataset]:
        """List datasets, newest first."""
        page = open_page(request, None)
        async with self._database.transaction(organization) as transaction:
            items = await transaction.datasets.list(page)
        return close_page(items, page, None, lambda dataset: dataset.dataset_id)

    async def delete(self, organization: str, dataset_id: str) -> None:
        """Remove a dataset and its file. Raises NotFound, FailedPrecondition while a job uses it."""
        async with self._database.transaction(organization) as transaction:
            await transaction.datasets.get(dataset_id)
            if jobs := await transaction.jobs.list_active(dataset_id=dataset_id):
                raise FailedPrecondition(
                    f"The dataset is in use by {', '.join(jobs)}. Cancel the job or wait for its end.",
                    reason="DATASET_IN_USE",
                    metadata={"job_id": jobs[0]},
                )
            await transaction.datasets.delete(dataset_id)
        await self._discard(organization, dataset_id)

    async def _take_in(
        self, organization: str, method: str, request: UploadDataset | ImportDataset, data: AsyncIterator[bytes], progress: Progress
    ) -> Dataset:
        """Write the bytes, look through them and keep them, or leave nothing."""
        dataset_id = new_id(DATASET)
        path = _make_path(organization, dataset_id)
        uri = request.uri if isinstance(request, ImportDataset) else ""
        try:
            stored = await self._files.write(path, _count(data, progress), self._max_bytes)
            inspection = await self._inspect(path, request, progress)
            dataset = _describe(dataset_id, request.display_name, path, stored, inspection, uri)
            kept = dataset if request.validate_only else await self._insert(organization, method, request, dataset)
        except BaseException:
            await self._discard(organization, dataset_id)
            raise
        if kept is not dataset or request.validate_only:
            await self._discard(organization, dataset_id)
        return kept

    async def _insert(self, organization: str, method: str, request: UploadDataset | ImportDataset, dataset: Dataset) -> Dataset:
        body = hash_body((request, dataset.sha256))
        async with self._database.transaction(organization) as transaction:
            if issued := await find_issued(transaction, method, request.request_id, body):
                return await transaction.datasets.get(issued["dataset_id"])
            await transaction.datasets.insert(dataset)
            await remember(transaction, method, request.request_id, body, {"dataset_id": dataset.dataset_id})
        return dataset

    async def _discard(self, organization: str, dataset_id: str) -> None:
        await self._files.delete_tree(f"{organization}/datasets/{dataset_id}")

    async def _inspect(self, path: str, request: UploadDataset | ImportDataset, progress: Progress) -> Inspection:
        """Look through a stored file. Raises InvalidInput where it cannot be read to its end, or no record is good."""
        place = await self._files.fetch(path)
        order = InspectionOrder(str(place), self._max_bytes * MAX_UNPACKING, request.format, request.record_kind)
        async with aclosing(self._inspector.inspect(order)) as messages:
            async for message in messages:
                if isinstance(message, Inspection):
                    if message.error_code:
                        raise InvalidInput.field("data", message.error, message.error_code)
                    if not message.record_count:
                        raise _refusal(message)
                    return message
                progress.records = message.records
        raise RuntimeError("an inspection ended without a result")


def _make_path(organization: str, dataset_id: str) -> str:
    return f"{organization}/datasets/{dataset_id}/records"


async def _count(data: AsyncIterator[bytes], progress: Progress) -> AsyncIterator[bytes]:
    async for piece in data:
        progress.read_bytes += len(piece)
        yield piece


def _describe(dataset_id: str, name: str, path: str, stored: StoredFile, inspection: Inspection, uri: str = "") -> Dataset:
    return Dataset(
        dataset_id=dataset_id,
        display_name=name,
        format=inspection.format,
        record_kind=inspection.record_kind,
        record_count=inspection.record_count,
        invalid_record_count=inspection.invalid_record_count,
        size_bytes=stored.size_bytes,
        sha256=stored.sha256,
        path=path,
        create_time=datetime.now(UTC),
        findings=tuple(inspection.findings),
        finding_counts=tuple(inspection.finding_counts),
        compression=inspection.compression,
        source_uri=uri,
    )


def _refusal(inspection: Inspection) -> InvalidInput:
    bad = inspection.invalid_record_count
    if not bad:
        return InvalidInput.field("data", "has no records", "DATASET_EMPTY")
    errors = [finding for finding in inspection.findings if finding.severity is Severity.ERROR][:MAX_NAMED_FINDINGS]
    named = [FieldViolation(f"data.line[{f.line}]", f"{f.code}: {f.message}") for f in errors]
    listed = "; ".join(f"line {f.line}: {f.message}" for f in errors)
    more = f" And {bad - len(named):,} more." if bad > len(named) else ""
    return InvalidInput(f"None of the {bad:,} records is good: {listed}{more}", reason="DATASET_INVALID", violations=named)
