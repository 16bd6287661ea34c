"""Previews of datasets: records as a base model reads them, page by page."""

from collections.abc import Sequence
from dataclasses import dataclass

from server.domain.datasets import Dataset, RecordKind
from server.domain.orders import DatasetFile
from server.domain.previews import PreviewedRecord, PreviewOrder
from server.domain.specs import LossOn, OverlongPolicy
from server.services.fine_tuning import check_base_model
from server.services.model_ports import BaseModels, Engine
from server.services.paging import close_page, open_numbered_page
from server.services.ports import Database
from server.services.requests import PageRequest, PreviewDataset
from server.services.validation import MAX_CONTEXT_TOKENS, Violations

MAX_RECORDS = 100
DEFAULT_RECORDS = 10
MIN_SEQUENCE_TOKENS = 8
DEFAULT_SEQUENCE_TOKENS = 2048
MAX_TOKENS_SHOWN = 8192
DEFAULT_TOKENS_SHOWN = 1024


@dataclass(frozen=True, slots=True)
class DatasetPreview:
    """A page of records, read by `base_model`."""

    records: Sequence[PreviewedRecord]
    base_model: str
    template_sha256: str
    next_page_token: str


class Previews:
    """Use cases of previews."""

    def __init__(self, database: Database, engine: Engine, base_models: BaseModels) -> None:
        self._database = database
        self._engine = engine
        self._base_models = base_models

    async def preview(self, organization: str, request: PreviewDataset) -> DatasetPreview:
        """Show records. Raises NotFound, InvalidInput, FailedPrecondition for a base model that cannot be had here, Unavailable."""
        found = Violations()
        _check_numbers(found, request)
        base_model = self._base_models.canonical_name(request.base_model)
        async with self._database.transaction(organization) as transaction:
            dataset = await transaction.datasets.get(request.dataset_id)
        await check_base_model(self._base_models, found, "base_model", base_model)
        found.raise_if_any()
        numbers, next_page_token = _choose_records(request, dataset, base_model)
        preview = await self._engine.preview(_make_order(request, dataset, base_model, numbers))
        return DatasetPreview(preview.records, base_model, preview.template_sha256, next_page_token)


def _check_numbers(found: Violations, request: PreviewDataset) -> None:
    found.number("page_size", request.page_size, 1, MAX_RECORDS)
    found.number("max_sequence_tokens", request.max_sequence_tokens, MIN_SEQUENCE_TOKENS, MAX_CONTEXT_TOKENS)
    found.number("max_tokens_shown", request.max_tokens_shown, 1, MAX_TOKENS_SHOWN)
    if len(request.records) > MAX_RECORDS:
        found.add("records", f"must be at most {MAX_RECORDS}, not {len(request.records)}")
    for place, number in enumerate(request.records[:MAX_RECORDS]):
        found.number(f"records[{place}]", number, 1, 2**31 - 1)


def _choose_records(request: PreviewDataset, dataset: Dataset, base_model: str) -> tuple[Sequence[int], str]:
    """Give the numbers of the records to show, and the token of the next page. Raises InvalidInput."""
    total = dataset.record_count + dataset.invalid_record_count
    if request.records:
        found = Violations()
        for place, number in enumerate(request.records):
            if number > total:
                found.add(f"records[{place}]", f"is {number}, but the dataset has {total:,} records")
        found.raise_if_any()
        return sorted(set(request.records)), ""
    filters = (dataset.dataset_id, base_model, request.max_sequence_tokens, request.overlong_policy, request.loss_on)
    page, last = open_numbered_page(PageRequest(request.page_size or DEFAULT_RECORDS, request.page_token), filters)
    first = (last or 0) + 1
    listed = close_page(range(first, min(total, first + page.size - 1) + 1), page, filters, str)
    return listed.items, listed.next_page_token


def _make_order(request: PreviewDataset, dataset: Dataset, base_model: str, numbers: Sequence[int]) -> PreviewOrder:
    file = DatasetFile(dataset.path, dataset.sha256, dataset.format, dataset.record_kind, dataset.record_count)
    return PreviewOrder(
        base_model=base_model,
        dataset=file,
        records=tuple(numbers),
        max_sequence_tokens=request.max_sequence_tokens or DEFAULT_SEQUENCE_TOKENS,
        overlong_policy=request.overlong_policy or OverlongPolicy.REJECT,
        loss_on=request.loss_on or LossOn.ASSISTANT,
        needs_pairs=dataset.record_kind is RecordKind.PREFERENCE,
        max_tokens_shown=request.max_tokens_shown or DEFAULT_TOKENS_SHOWN,
    )
