"""Documents: given as files or texts, known again by id, source or content; nothing is kept of what is refused."""

from pathlib import Path
from typing import Any

import pytest

from server.domain.documents import Document, DocumentState, NewDocument
from server.domain.errors import AlreadyExists, FailedPrecondition, InvalidInput, NotFound, ResourceExhausted
from server.domain.ids import DOCUMENT, new_id
from server.services.requests import AddDocuments, ImportDocument, UploadDocument
from server.storage import files
from tests.services.conftest import MAX_DOCUMENT_BYTES, ORGANIZATION, UseCases, fine_tune, pieces
from tests.services.test_creating_models import INLINE, rag
from tests.services.test_datasets import stored_files

PDF = b"%PDF-1.7 whatever"


@pytest.fixture
async def model_id(use_cases: UseCases) -> str:
    """A RAG model with one document, whose job waits."""
    return (await use_cases.models.create_rag_model(ORGANIZATION, rag())).model.model_id


async def upload(use_cases: UseCases, model_id: str, data: bytes = PDF, **fields: Any) -> Document:
    request = UploadDocument(model_id, **fields)
    return await use_cases.models.documents.upload(ORGANIZATION, request, pieces(data[:5], data[5:]))


async def add(use_cases: UseCases, model_id: str, *new: NewDocument) -> list[Document]:
    documents, _ = await use_cases.models.documents.add(ORGANIZATION, AddDocuments(model_id, new))
    return list(documents)


async def test_an_upload_waits_for_the_job_that_waits_already(use_cases: UseCases, model_id: str) -> None:
    document = await upload(use_cases, model_id, title="Ferry", source_uri="https://example.org/f", metadata={"year": 2026})
    assert (document.state, document.title, document.metadata) == (DocumentState.PENDING, "Ferry", {"year": 2026})
    assert (document.original_size_bytes, document.size_characters) == (len(PDF), 0)
    assert len(stored_files(use_cases)) == 1
    other = await upload(use_cases, model_id, b"another")
    assert other.job_id == document.job_id
    job = await use_cases.training.get_job(ORGANIZATION, document.job_id)
    assert job.model_id == model_id
    await use_cases.training.control.cancel(ORGANIZATION, job.job_id)
    assert (await upload(use_cases, model_id, b"a third")).job_id != job.job_id


async def test_the_same_file_again_changes_nothing(use_cases: UseCases, model_id: str) -> None:
    first = await upload(use_cases, model_id, source_uri="s")
    before = stored_files(use_cases)
    assert await upload(use_cases, model_id, source_uri="s") == first
    assert await upload(use_cases, model_id, document_id=first.document_id) == first
    assert await upload(use_cases, model_id) == first
    assert stored_files(use_cases) == before
    assert (await upload(use_cases, model_id, source_uri="elsewhere")).document_id != first.document_id


async def test_changed_content_takes_the_place_of_the_one_before(use_cases: UseCases, model_id: str) -> None:
    first = await upload(use_cases, model_id, source_uri="s", metadata={"year": 1}, title="T")
    second = await upload(use_cases, model_id, b"changed", source_uri="s")
    assert second.document_id == first.document_id
    third = await upload(use_cases, model_id, b"changed again", document_id=first.document_id)
    assert third.document_id == first.document_id
    # What waited for the job is not needed any more.
    assert len(stored_files(use_cases)) == 1
    await use_cases.models.documents.delete(ORGANIZATION, model_id, first.document_id)
    assert stored_files(use_cases) == []


async def test_the_same_content_described_in_another_way_is_not_indexed_again(use_cases: UseCases, model_id: str) -> None:
    (first,) = await add(use_cases, model_id, NewDocument("text", "Old", "s"))
    (second,) = await add(use_cases, model_id, NewDocument("text", "New", "s", {"year": 1}))
    (same,) = await add(use_cases, model_id, NewDocument("text", "", "s"))
    assert second.document_id == same.document_id == first.document_id


async def test_texts_are_known_again_by_content_and_title(use_cases: UseCases, model_id: str) -> None:
    first, twice, other = await add(use_cases, model_id, NewDocument("text", "A"), NewDocument("text", "A"), NewDocument("text", "B"))
    assert twice.document_id == first.document_id != other.document_id
    assert await add(use_cases, model_id, NewDocument("text", "A")) == [first]


async def test_two_documents_of_one_source_in_a_request_are_refused(use_cases: UseCases, model_id: str) -> None:
    with pytest.raises(InvalidInput, match=r"documents\[1\].source_uri"):
        await add(use_cases, model_id, NewDocument("a", source_uri="s"), NewDocument("b", source_uri="s"))
    with pytest.raises(InvalidInput, match=r"documents\[0\].document_id"):
        await add(use_cases, model_id, NewDocument("a", document_id=new_id(DOCUMENT)))
    with pytest.raises(InvalidInput, match=r"documents\[0\].metadata"):
        await add(use_cases, model_id, NewDocument("a", metadata={str(n): n for n in range(65)}))


async def test_nothing_is_kept_of_an_upload_that_is_refused(use_cases: UseCases, model_id: str) -> None:
    tuned = await use_cases.models.create_fine_tuned_model(ORGANIZATION, fine_tune(**INLINE))
    before = stored_files(use_cases)
    with pytest.raises(FailedPrecondition, match="RAG"):
        await upload(use_cases, tuned.model.model_id)
    with pytest.raises(InvalidInput, match="empty"):
        await upload(use_cases, model_id, b"")
    with pytest.raises(InvalidInput, match="document_id"):
        await upload(use_cases, model_id, document_id=new_id(DOCUMENT))
    with pytest.raises(ResourceExhausted):
        await upload(use_cases, model_id, b"x" * (MAX_DOCUMENT_BYTES + 1))
    assert (await upload(use_cases, model_id, validate_only=True)).document_id == ""
    assert stored_files(use_cases) == before


async def test_a_full_disk_refuses_an_upload_and_nothing_else(use_cases: UseCases, model_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "RESERVED_BYTES", 1 << 60)
    with pytest.raises(ResourceExhausted) as refusal:
        await upload(use_cases, model_id)
    assert refusal.value.reason == "DISK_FULL"
    assert stored_files(use_cases) == []
    assert len(await add(use_cases, model_id, NewDocument("a text needs no file"))) == 1


async def test_a_model_that_is_gone_is_told_before_the_file_is_read(use_cases: UseCases) -> None:
    with pytest.raises(NotFound):
        await upload(use_cases, "mdl_none")
    assert stored_files(use_cases) == []


async def test_a_repeated_request_answers_with_its_first_document(use_cases: UseCases, model_id: str) -> None:
    first = await upload(use_cases, model_id, request_id="r", title="T")
    assert await upload(use_cases, model_id, request_id="r", title="T") == first
    assert len(stored_files(use_cases)) == 1
    with pytest.raises(AlreadyExists):
        await upload(use_cases, model_id, b"another", request_id="r", title="T")
    assert len(stored_files(use_cases)) == 1


async def test_files_go_with_their_model(use_cases: UseCases, model_id: str) -> None:
    document = await upload(use_cases, model_id)
    await use_cases.training.control.cancel(ORGANIZATION, document.job_id)
    await use_cases.models.delete_model(ORGANIZATION, model_id)
    assert stored_files(use_cases) == []


async def read_text(use_cases: UseCases, model_id: str, document_id: str) -> bytes:
    return b"".join([piece async for piece in use_cases.models.documents.read_text(ORGANIZATION, model_id, document_id)])


async def test_an_import_is_known_again_by_its_uri(use_cases: UseCases, model_id: str, tmp_path: Path) -> None:
    place = tmp_path / "imports" / "report.pdf"
    place.parent.mkdir()
    place.write_bytes(PDF)
    request = ImportDocument(model_id, f"file://{place}", metadata={"year": 1})
    first = await use_cases.models.documents.import_(ORGANIZATION, request)
    assert (first.source_uri, first.metadata, first.original_size_bytes) == (request.uri, {"year": 1}, len(PDF))
    assert await use_cases.models.documents.import_(ORGANIZATION, request) == first
    place.write_bytes(PDF + b" changed")
    changed = await use_cases.models.documents.import_(ORGANIZATION, request)
    assert (changed.document_id, changed.metadata) == (first.document_id, {"year": 1})
    assert len(stored_files(use_cases)) == 1


async def test_an_import_from_elsewhere_or_over_the_limit_is_refused(use_cases: UseCases, model_id: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="root"):
        await use_cases.models.documents.import_(ORGANIZATION, ImportDocument(model_id, "file:///etc/passwd"))
    place = tmp_path / "imports" / "large"
    place.parent.mkdir()
    place.write_bytes(b"x" * (MAX_DOCUMENT_BYTES + 1))
    with pytest.raises(ResourceExhausted):
        await use_cases.models.documents.import_(ORGANIZATION, ImportDocument(model_id, f"file://{place}"))
    assert stored_files(use_cases) == []


async def test_what_was_given_and_what_is_cited_can_be_had(use_cases: UseCases, model_id: str) -> None:
    (text,) = await add(use_cases, model_id, NewDocument("نص the text"))
    assert await read_text(use_cases, model_id, text.document_id) == "نص the text".encode()
    file = await upload(use_cases, model_id)
    with pytest.raises(FailedPrecondition, match="not read yet"):
        await read_text(use_cases, model_id, file.document_id)
    for document, content in ((text, "نص the text".encode()), (file, PDF)):
        form, pieces_given = await use_cases.models.documents.read_original(ORGANIZATION, model_id, document.document_id)
        assert (form, b"".join([piece async for piece in pieces_given])) == (None, content)
