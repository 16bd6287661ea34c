"""Datasets: every bad record named, nothing kept of what was refused."""

import gzip
from collections.abc import AsyncIterator

import pytest

from server.domain.datasets import Dataset, RecordKind
from server.domain.errors import AlreadyExists, FailedPrecondition, InvalidInput, NotFound, ResourceExhausted
from server.services.datasets import Progress
from server.services.requests import ImportDataset, PageRequest, UploadDataset
from tests.services.conftest import GOOD_LINE, ORGANIZATION, UseCases, fine_tune, pieces


def stored_files(use_cases: UseCases) -> list[str]:
    return sorted(str(path.relative_to(use_cases.storage)) for path in use_cases.storage.rglob("*") if path.is_file())


async def test_bad_records_are_named_by_line_and_the_good_ones_kept(use_cases: UseCases) -> None:
    data = pieces(GOOD_LINE, b"\n{broken\n", GOOD_LINE + b"[]")
    dataset = await use_cases.datasets.upload(ORGANIZATION, UploadDataset("d"), data)
    assert (dataset.record_count, dataset.invalid_record_count, dataset.record_kind) == (2, 2, RecordKind.COMPLETION)
    assert [(finding.line, finding.code) for finding in dataset.findings] == [(3, "BROKEN_JSON"), (4, "DUPLICATE"), (5, "NOT_AN_OBJECT")]
    assert [(finding.code, finding.count) for finding in dataset.finding_counts] == [(finding.code, 1) for finding in dataset.findings]
    assert stored_files(use_cases) == [dataset.path]
    assert await use_cases.datasets.get(ORGANIZATION, dataset.dataset_id) == dataset


@pytest.mark.parametrize(("data", "reason"), [(b"", "DATASET_EMPTY"), (b"\n \n", "DATASET_EMPTY"), (b"{\n[]\n" * 30, "DATASET_INVALID")])
async def test_an_empty_or_wholly_bad_dataset_is_refused_and_nothing_kept(use_cases: UseCases, data: bytes, reason: str) -> None:
    with pytest.raises(InvalidInput) as refusal:
        await use_cases.datasets.upload(ORGANIZATION, UploadDataset("d"), pieces(data))
    assert refusal.value.reason == reason
    assert stored_files(use_cases) == []
    if reason == "DATASET_INVALID":
        assert refusal.value.data.violations[1].field == "data.line[2]"
        assert "40 more" in str(refusal.value)


async def test_an_upload_over_the_limit_is_refused_and_nothing_kept(use_cases: UseCases) -> None:
    with pytest.raises(ResourceExhausted):
        await use_cases.datasets.upload(ORGANIZATION, UploadDataset("d"), pieces(GOOD_LINE * 200, GOOD_LINE * 200))
    assert stored_files(use_cases) == []


async def test_the_same_upload_again_answers_with_the_first(use_cases: UseCases) -> None:
    request = UploadDataset("d", request_id="r")
    first = await use_cases.datasets.upload(ORGANIZATION, request, pieces(GOOD_LINE))
    assert await use_cases.datasets.upload(ORGANIZATION, request, pieces(GOOD_LINE)) == first
    assert stored_files(use_cases) == [first.path]
    with pytest.raises(AlreadyExists):
        await use_cases.datasets.upload(ORGANIZATION, request, pieces(GOOD_LINE, GOOD_LINE))


async def test_a_dataset_that_is_only_validated_is_not_kept(use_cases: UseCases) -> None:
    dataset = await use_cases.datasets.upload(ORGANIZATION, UploadDataset("d", validate_only=True), pieces(GOOD_LINE))
    assert dataset.record_count == 1
    assert stored_files(use_cases) == []
    assert (await use_cases.datasets.list(ORGANIZATION, PageRequest())).items == []


async def test_a_dataset_in_use_is_not_deleted_until_its_job_has_ended(use_cases: UseCases) -> None:
    dataset = await use_cases.datasets.upload(ORGANIZATION, UploadDataset("d"), pieces(GOOD_LINE))
    made = await use_cases.models.create_fine_tuned_model(ORGANIZATION, fine_tune(dataset.dataset_id))
    assert made.job is not None
    with pytest.raises(FailedPrecondition, match=made.job.job_id):
        await use_cases.datasets.delete(ORGANIZATION, dataset.dataset_id)
    await use_cases.training.control.cancel(ORGANIZATION, made.job.job_id)
    await use_cases.datasets.delete(ORGANIZATION, dataset.dataset_id)
    assert stored_files(use_cases) == []
    with pytest.raises(NotFound):
        await use_cases.datasets.get(ORGANIZATION, dataset.dataset_id)


async def test_another_organization_sees_no_dataset(use_cases: UseCases) -> None:
    dataset = await use_cases.datasets.upload(ORGANIZATION, UploadDataset("d"), pieces(GOOD_LINE))
    assert (await use_cases.datasets.list("other", PageRequest())).items == []
    for attempt in (use_cases.datasets.get, use_cases.datasets.delete):
        with pytest.raises(NotFound):
            await attempt("other", dataset.dataset_id)
    assert stored_files(use_cases) == [dataset.path]


async def test_pages_follow_each_other_without_gap_and_end(use_cases: UseCases) -> None:
    made = [await use_cases.datasets.upload(ORGANIZATION, UploadDataset(f"d{n}"), pieces(GOOD_LINE)) for n in range(5)]
    seen, token = [], ""
    for _ in range(3):
        page = await use_cases.datasets.list(ORGANIZATION, PageRequest(2, token))
        seen += [dataset.dataset_id for dataset in page.items]
        token = page.next_page_token
    assert seen == sorted((dataset.dataset_id for dataset in made), reverse=True)
    assert token == ""


@pytest.mark.parametrize("request_", [PageRequest(0), PageRequest(1001), PageRequest(1, "rubbish"), PageRequest(1, "WzEsMl0")])
async def test_a_senseless_page_is_refused(use_cases: UseCases, request_: PageRequest) -> None:
    with pytest.raises(InvalidInput):
        await use_cases.datasets.list(ORGANIZATION, request_)


async def collect(events: AsyncIterator[Progress | Dataset]) -> list[Progress | Dataset]:
    return [event async for event in events]


async def test_an_import_keeps_where_it_came_from_and_is_made_once(use_cases: UseCases) -> None:
    place = use_cases.storage.parent / "imports" / "x.jsonl"
    place.parent.mkdir()
    place.write_bytes(GOOD_LINE * 2)
    request = ImportDataset("d", f"file://{place}", request_id="r", record_kind=RecordKind.COMPLETION)
    *_, dataset = await collect(use_cases.datasets.import_(ORGANIZATION, request))
    assert isinstance(dataset, Dataset)
    assert (dataset.record_count, dataset.source_uri, dataset.size_bytes) == (2, request.uri, 2 * len(GOOD_LINE))
    assert await collect(use_cases.datasets.import_(ORGANIZATION, request)) == [dataset]
    assert stored_files(use_cases) == [dataset.path]


async def test_an_import_that_is_left_or_refused_leaves_nothing(use_cases: UseCases, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.services.datasets.PROGRESS_SECONDS", 0.01)
    place = use_cases.storage.parent / "imports" / "x.jsonl"
    place.parent.mkdir()
    place.write_bytes(GOOD_LINE * 10)
    events = use_cases.datasets.import_(ORGANIZATION, ImportDataset("d", f"file://{place}"))
    assert isinstance(await anext(events), Progress)
    await events.aclose()
    assert stored_files(use_cases) == []
    place.write_bytes(b"x" * 20_000)
    with pytest.raises(ResourceExhausted):
        await collect(use_cases.datasets.import_(ORGANIZATION, ImportDataset("d", f"file://{place}")))
    assert stored_files(use_cases) == []
    assert (await use_cases.datasets.list(ORGANIZATION, PageRequest())).items == []


async def test_a_named_kind_of_record_is_taken_at_its_word(use_cases: UseCases) -> None:
    both = b'{"text": "The river.", "prompt": "p", "completion": "the answer"}'
    dataset = await use_cases.datasets.upload(ORGANIZATION, UploadDataset("d", record_kind=RecordKind.TEXT), pieces(both))
    assert dataset.record_kind is RecordKind.TEXT
    with pytest.raises(InvalidInput, match="`messages`"):
        await use_cases.datasets.upload(ORGANIZATION, UploadDataset("d", record_kind=RecordKind.CHAT), pieces(both))


async def test_a_file_that_cannot_be_read_on_is_refused_whole(use_cases: UseCases) -> None:
    packed = gzip.compress(GOOD_LINE * 100)
    with pytest.raises(InvalidInput) as refusal:
        await use_cases.datasets.upload(ORGANIZATION, UploadDataset("d"), pieces(packed[:-12]))
    assert refusal.value.reason == "BROKEN_FILE"
    assert stored_files(use_cases) == []
