"""Documents of RAG models: given as text or file, listed, read and deleted. What indexes them is a job."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from datetime import UTC, datetime

from server.domain.documents import Document, DocumentFile, DocumentFormat, DocumentState, NewDocument
from server.domain.errors import AlreadyExists, FailedPrecondition, InvalidInput, NotFound, ResourceExhausted
from server.domain.ids import DOCUMENT, new_id
from server.domain.jobs import Job
from server.domain.models import Model, ModelType
from server.services.idempotency import find_issued, hash_body, remember
from server.services.paging import close_page, open_page
from server.services.ports import Database, DatasetSources, Files, Transaction
from server.services.requests import AddDocuments, ImportDocument, ListDocuments, Listed, UploadDocument
from server.services.staging import MAX_SOURCE_CHARACTERS, Staged, check_description, check_documents, new_index_job, stage_documents
from server.services.validation import MAX_REQUEST_ID_CHARACTERS, Violations

READ_BYTES = 1 << 20  # of a download at a time


class Documents:
    """Use cases of documents."""

    def __init__(self, database: Database, files: Files, sources: DatasetSources, max_bytes: int) -> None:
        self._database = database
        self._files = files
        self._sources = sources
        self._max_bytes = max_bytes

    async def upload(self, organization: str, request: UploadDocument, data: AsyncIterator[bytes]) -> Document:
        """Store a file and let it wait for a job. Nothing of it is kept where it is refused, or where the model has it already.

        Raises NotFound, FailedPrecondition, InvalidInput, AlreadyExists, ResourceExhausted where it is too large or the disk is full.
        """
        described = NewDocument("", request.title, request.source_uri, request.metadata or {}, request.document_id)
        await self._check(organization, request, described, Violations())
        return await self._take_in(organization, "UploadDocument", request, described, data)

    async def import_(self, organization: str, request: ImportDocument) -> Document:
        """Store what lies at a URI likewise. Raises as `upload` does, and what the URI's place raises."""
        found = Violations()
        found.text("uri", request.uri, MAX_SOURCE_CHARACTERS, least=1)
        described = NewDocument("", request.title, request.uri, request.metadata or {}, request.document_id)
        await self._check(organization, request, described, found)
        async with self._sources.open(request.uri) as source:
            if source.size_bytes is not None and source.size_bytes > self._max_bytes:
                raise ResourceExhausted(f"The file is larger than {self._max_bytes:,} bytes.", reason="UPLOAD_TOO_LARGE")
            return await self._take_in(organization, "ImportDocument", request, described, source.pieces)

    async def _check(self, organization: str, request: UploadDocument | ImportDocument, described: NewDocument, found: Violations) -> None:
        if not found.found:
            check_description(found, described)
        found.text("request_id", request.request_id, MAX_REQUEST_ID_CHARACTERS)
        found.raise_if_any()
        async with self._database.transaction(organization) as transaction:
            await _get_rag_model(transaction, request.model_id)

    async def _take_in(
        self,
        organization: str,
        method: str,
        request: UploadDocument | ImportDocument,
        described: NewDocument,
        data: AsyncIterator[bytes],
    ) -> Document:
        """Write a file, and keep it or leave nothing."""
        path = f"{organization}/documents/{request.model_id}/{new_id(DOCUMENT)}"
        stored = await self._files.write(path, data, self._max_bytes)
        try:
            if not stored.size_bytes:
                raise InvalidInput.field("data", "is empty", "DOCUMENT_EMPTY")
            new = replace(described, file=DocumentFile(path, stored.size_bytes, stored.sha256))
            document, dropped = await self._keep(organization, method, request, new)
        except (InvalidInput, NotFound, FailedPrecondition, AlreadyExists):
            # Nothing was committed. After any other end something may be: a file that no row names goes with the worker's sweep.
            await self._files.delete_tree(path)
            raise
        for each in dropped:
            await self._files.delete_tree(each)
        return document

    async def _keep(
        self, organization: str, method: str, request: UploadDocument | ImportDocument, new: NewDocument
    ) -> tuple[Document, Sequence[str]]:
        """Store what a file becomes; give its document, and files that nobody needs."""
        assert new.file is not None
        body = hash_body((request, new.file.sha256))
        async with self._database.transaction(organization) as transaction:
            if issued := await find_issued(transaction, method, request.request_id, body):
                return await transaction.documents.get(request.model_id, issued["document_id"]), [new.file.path]
            model = await _get_rag_model(transaction, request.model_id, lock=True)
            if request.validate_only:
                return _preview(request.model_id, new), [new.file.path]
            _, staged = await _stage(transaction, model, [new], "document_id")
            document_id = staged.document_ids[0]
            await remember(transaction, method, request.request_id, body, {"document_id": document_id})
            return await transaction.documents.get(model.model_id, document_id), staged.dropped_paths

    async def add(self, organization: str, request: AddDocuments) -> tuple[Sequence[Document], Job | None]:
        """Add documents given as text; they are found once the job that comes with them has indexed them. None: nothing is to do."""
        body = hash_body(request)
        found = Violations()
        check_documents(found, request.documents)
        if not request.documents:
            found.add("documents", "must not be empty")
        found.raise_if_any()
        async with self._database.transaction(organization) as transaction:
            if issued := await find_issued(transaction, "AddDocuments", request.request_id, body):
                ids = issued["document_ids"].split(",")
                job = await transaction.jobs.get(issued["job_id"]) if issued["job_id"] else None
                return [await transaction.documents.get(request.model_id, name) for name in ids], job
            model = await _get_rag_model(transaction, request.model_id, lock=True)
            if request.validate_only:
                return [], replace(new_index_job(model), job_id="")
            job, staged = await _stage(transaction, model, request.documents, "documents[{place}].document_id")
            documents = [await transaction.documents.get(model.model_id, name) for name in staged.document_ids]
            if job is None and documents[-1].job_id:
                job = await transaction.jobs.get(documents[-1].job_id)
            made = {"document_ids": ",".join(staged.document_ids), "job_id": job.job_id if job else ""}
            await remember(transaction, "AddDocuments", request.request_id, body, made)
        for path in staged.dropped_paths:
            await self._files.delete_tree(path)
        return documents, job

    async def list(self, organization: str, request: ListDocuments) -> Listed[Document]:
        """List a model's documents, newest first. Raises NotFound."""
        filters = (request.model_id, request.state)
        page = open_page(request.page, filters)
        async with self._database.transaction(organization) as transaction:
            await transaction.models.get(request.model_id)
            items = await transaction.documents.list(request.model_id, page, state=request.state)
        return close_page(items, page, filters, lambda document: document.document_id)

    async def get(self, organization: str, model_id: str, document_id: str) -> Document:
        """Read a document. Raises NotFound."""
        async with self._database.transaction(organization) as transaction:
            await transaction.models.get(model_id)
            return await transaction.documents.get(model_id, document_id)

    async def read_text(self, organization: str, model_id: str, document_id: str) -> AsyncGenerator[bytes, None]:
        """Give the text that is cited, in pieces of UTF-8. Raises NotFound, FailedPrecondition while the file was not read yet."""
        async with self._database.transaction(organization) as transaction:
            await transaction.models.get(model_id)
            text = await transaction.documents.get_text(model_id, document_id)
        if not text:
            message = "The document's file was not read yet, or could not be read."
            raise FailedPrecondition(message, reason="DOCUMENT_NOT_READ", metadata={"document_id": document_id})
        async with aclosing(_give(text.encode())) as pieces:
            async for piece in pieces:
                yield piece

    async def read_original(
        self, organization: str, model_id: str, document_id: str
    ) -> tuple[DocumentFormat | None, AsyncGenerator[bytes, None]]:
        """Give a document as it was given, in pieces, and how it is written (None: a text). Raises NotFound."""
        async with self._database.transaction(organization) as transaction:
            await transaction.models.get(model_id)
            original = await transaction.documents.get_original(model_id, document_id)
        if not original.path and not original.text:
            raise NotFound.of("file of document", document_id)
        return original.format, self._read(original.path) if original.path else _give(original.text.encode())

    async def _read(self, path: str) -> AsyncGenerator[bytes, None]:
        place = await self._files.fetch(path)
        with open(place, "rb") as file:
            while piece := await asyncio.to_thread(file.read, READ_BYTES):
                yield piece

    async def delete(self, organization: str, model_id: str, document_id: str) -> None:
        """Remove a document with its chunks and files, at once. Raises NotFound."""
        async with self._database.transaction(organization) as transaction:
            await transaction.models.get(model_id)
            paths = await transaction.documents.delete(model_id, document_id)
        for path in paths:
            await self._files.delete_tree(path)


async def _get_rag_model(transaction: Transaction, model_id: str, *, lock: bool = False) -> Model:
    model = await transaction.models.get(model_id, lock=lock)
    if model.type is not ModelType.RAG:
        raise FailedPrecondition("Only RAG models have documents.", reason="NOT_A_RAG_MODEL", metadata={"model_id": model.model_id})
    return model


async def _stage(transaction: Transaction, model: Model, documents: Sequence[NewDocument], field: str) -> tuple[Job | None, Staged]:
    """Let contents wait for a job: one that is QUEUED anyway, else a new one; None where there is nothing to do."""
    new_job = new_index_job(model)
    queued = await transaction.jobs.find_queued(model.model_id, new_job.spec)
    staged = await stage_documents(transaction, model.model_id, queued or new_job, documents, field)
    if not staged.needs_job:
        return None, staged
    if queued is None:
        await transaction.jobs.insert(new_job)
    return await transaction.jobs.get((queued or new_job).job_id), staged


def _preview(model_id: str, new: NewDocument) -> Document:
    """Show a document as it would be stored."""
    return Document(
        document_id="",
        model_id=model_id,
        title=new.title,
        state=DocumentState.PENDING,
        size_characters=0,
        size_bytes=0,
        content_sha256="",
        create_time=datetime.now(UTC),
        metadata=new.metadata,
        source_uri=new.source_uri,
        original_size_bytes=new.size_bytes,
        original_sha256=new.sha256,
    )


async def _give(data: bytes) -> AsyncGenerator[bytes, None]:
    for start in range(0, len(data), READ_BYTES):
        yield data[start : start + READ_BYTES]
