"""Uploading datasets: streamed to disk, every record read once, each bad one named with its line and reason."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from server.domain.datasets import Dataset, DatasetFormat, RecordKind
from server.domain.errors import FailedPrecondition, FieldViolation, InvalidInput
from server.domain.findings import Finding
from server.domain.ids import DATASET, new_id
from server.domain.record_forms import parse_record
from server.domain.records import RecordInvalid
from server.services.idempotency import find_issued, hash_body, remember
from server.services.paging import close_page, open_page
from server.services.ports import Database, Files, StoredFile, Transaction
from server.services.requests import Listed, PageRequest, UploadDataset
from server.services.validation import Violations

MAX_SAMPLED_FINDINGS = 100  # kept with the dataset; the count covers all
MAX_NAMED_FINDINGS = 20  # in the error of a dataset that is refused


class Datasets:
    """Use cases of datasets."""

    def __init__(self, database: Database, files: Files, max_bytes: int) -> None:
        self._database = database
        self._files = files
        self._max_bytes = max_bytes

    async def upload(self, organization: str, request: UploadDataset, data: AsyncIterator[bytes]) -> Dataset:
        """Store an upload. Raises InvalidInput where no record is good, ResourceExhausted where it is too large."""
        found = Violations()
        found.name(request.display_name, "", request.request_id)
        found.raise_if_any()
        dataset_id = new_id(DATASET)
        path = f"{organization}/datasets/{dataset_id}/records.jsonl"
        try:
            stored = await self._files.write(path, data, self._max_bytes)
            dataset = _describe(dataset_id, request.display_name, path, stored, await self._scan(path))
            kept = dataset if request.validate_only else await self._insert(organization, request, dataset)
        except BaseException:
            await self._discard(organization, dataset_id)
            raise
        if kept is not dataset or request.validate_only:
            await self._discard(organization, dataset_id)
        return kept

    async def add_inline(self, transaction: Transaction, organization: str, name: str, lines: Sequence[bytes]) -> Dataset:
        """Store records that came inside a request as a dataset of their own. The caller has checked them."""
        dataset_id = new_id(DATASET)
        path = f"{organization}/datasets/{dataset_id}/records.jsonl"

        async def stream() -> AsyncIterator[bytes]:
            for line in lines:
                yield line + b"\n"

        stored = await self._files.write(path, stream(), self._max_bytes)
        dataset = _describe(dataset_id, name, path, stored, await self._scan(path))
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

    async def _insert(self, organization: str, request: UploadDataset, dataset: Dataset) -> Dataset:
        body = hash_body((request, dataset.sha256))
        async with self._database.transaction(organization) as transaction:
            if issued := await find_issued(transaction, "UploadDataset", request.request_id, body):
                return await transaction.datasets.get(issued["dataset_id"])
            await transaction.datasets.insert(dataset)
            await remember(transaction, "UploadDataset", request.request_id, body, {"dataset_id": dataset.dataset_id})
        return dataset

    async def _discard(self, organization: str, dataset_id: str) -> None:
        await self._files.delete_tree(f"{organization}/datasets/{dataset_id}")

    async def _scan(self, path: str) -> "_Scan":
        scan = _Scan()
        async for lines in self._files.read_lines(path):
            # Parsing is work for the processor: not on the event loop, which serves everybody else.
            await asyncio.to_thread(scan.read, lines)
        if not scan.good:
            raise _refusal(scan)
        return scan


@dataclass(slots=True)
class _Scan:
    """What one pass over the records found."""

    line: int = 0
    good: int = 0
    bad: int = 0
    kinds: Counter[RecordKind] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)

    def read(self, lines: Sequence[bytes]) -> None:
        """Read the next lines; blank ones are passed over."""
        for raw in lines:
            self.line += 1
            # Some editors write a byte order mark before the first line.
            text = raw.removeprefix(b"\xef\xbb\xbf") if self.line == 1 else raw
            if not text.strip():
                continue
            try:
                record = parse_record(text)
            except RecordInvalid as error:
                self.bad += 1
                if len(self.findings) < MAX_SAMPLED_FINDINGS:
                    self.findings.append(error.to_finding(self.line))
            else:
                self.good += 1
                self.kinds[record.kind] += 1


def _describe(dataset_id: str, name: str, path: str, stored: StoredFile, scan: _Scan) -> Dataset:
    return Dataset(
        dataset_id=dataset_id,
        display_name=name,
        format=DatasetFormat.JSONL,
        record_kind=next(iter(scan.kinds)) if len(scan.kinds) == 1 else RecordKind.MIXED,
        record_count=scan.good,
        invalid_record_count=scan.bad,
        size_bytes=stored.size_bytes,
        sha256=stored.sha256,
        path=path,
        create_time=datetime.now(UTC),
        findings=tuple(scan.findings),
    )


def _refusal(scan: _Scan) -> InvalidInput:
    if not scan.bad:
        return InvalidInput.field("data", "has no records: send one JSON object per line", "DATASET_EMPTY")
    named = [FieldViolation(f"data.line[{f.line}]", f"{f.code}: {f.message}") for f in scan.findings[:MAX_NAMED_FINDINGS]]
    listed = "; ".join(f"line {f.line}: {f.message}" for f in scan.findings[:MAX_NAMED_FINDINGS])
    more = f" And {scan.bad - len(named):,} more." if scan.bad > len(named) else ""
    return InvalidInput(f"None of the {scan.bad:,} records is good: {listed}{more}", reason="DATASET_INVALID", violations=named)
