"""What a given document becomes: a new one, the next content of one that is there, or nothing new. Checks, and the job that indexes it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from server.domain.documents import DocumentState, NewDocument
from server.domain.ids import DOCUMENT, JOB, new_id
from server.domain.jobs import Job, JobKind, JobState
from server.domain.models import Model
from server.domain.specs import IndexSpec
from server.services.ports import KnownDocument, Transaction
from server.services.validation import MAX_KEY_CHARACTERS, MAX_VALUE_CHARACTERS, Violations

MAX_DOCUMENTS = 1_000  # per request
MAX_DOCUMENT_CHARACTERS = 2_000_000  # of one given as text
MAX_TITLE_CHARACTERS = 500
MAX_SOURCE_CHARACTERS = 2_000
MAX_METADATA_KEYS = 64


@dataclass(slots=True)
class Staged:
    """What came of given documents: the id that each one has, in their order, whether any waits for the job, files that nobody needs."""

    document_ids: list[str] = field(default_factory=list)
    needs_job: bool = False
    dropped_paths: list[str] = field(default_factory=list)


def new_index_job(model: Model) -> Job:
    """Make a QUEUED job that indexes what waits of a RAG model."""
    if model.rag is None:
        raise ValueError(f"{model.model_id} is not a RAG model")
    now = datetime.now(UTC)
    return Job(
        job_id=new_id(JOB),
        kind=JobKind.RAG_INDEX,
        model_id=model.model_id,
        state=JobState.QUEUED,
        spec=IndexSpec(
            model.rag.embedding_model, model.rag.chunking, model.rag.index_number, embedding_backend=model.rag.embedding_backend
        ),
        create_time=now,
        update_time=now,
    )


def check_documents(found: Violations, documents: Sequence[NewDocument], *, is_new: bool = False) -> None:
    """Check documents given as text; `is_new`: their model is, so they can replace none."""
    if len(documents) > MAX_DOCUMENTS:
        found.add("documents", f"must be at most {MAX_DOCUMENTS:,} per request, not {len(documents):,}: add the others later")
        return
    seen: dict[str, int] = {}
    for place, document in enumerate(documents):
        here = f"documents[{place}]"
        found.text(f"{here}.text", document.text, MAX_DOCUMENT_CHARACTERS, least=1)
        check_description(found, document, f"{here}.")
        if is_new and document.document_id:
            found.add(f"{here}.document_id", "must be empty: the model has no documents yet")
        for name, value in (("document_id", document.document_id), ("source_uri", document.source_uri)):
            if value and seen.setdefault(f"{name} {value}", place) != place:
                found.add(f"{here}.{name}", f"is that of documents[{seen[f'{name} {value}']}] too: each one is one document")


def check_description(found: Violations, document: NewDocument, prefix: str = "") -> None:
    """Check title, source and metadata of a document."""
    found.text(f"{prefix}title", document.title, MAX_TITLE_CHARACTERS)
    found.text(f"{prefix}source_uri", document.source_uri, MAX_SOURCE_CHARACTERS)
    if len(document.metadata) > MAX_METADATA_KEYS:
        found.add(f"{prefix}metadata", f"must have at most {MAX_METADATA_KEYS} keys, not {len(document.metadata):,}")
        return
    for key, value in document.metadata.items():
        here = f"{prefix}metadata[{key[:MAX_KEY_CHARACTERS]!r}]"
        found.text(here, key, MAX_KEY_CHARACTERS, least=1)
        if isinstance(value, str):
            found.text(here, value, MAX_VALUE_CHARACTERS)
        elif not math.isfinite(value):
            found.add(here, "must be finite")


async def stage_documents(transaction: Transaction, model_id: str, job: Job, documents: Sequence[NewDocument], field: str = "") -> Staged:
    """Let contents that are new wait for the job. The model's row must be locked. Raises InvalidInput for an id that does not exist.

    `field` is what a document_id is called in the request, with {place} where the document stands in it.
    """
    known = await transaction.staged.list_known(model_id, documents) if documents else ()
    index = _Index(known)
    violations = Violations()
    staged = Staged()
    added: list[tuple[str, NewDocument]] = []
    for place, new in enumerate(documents):
        same = index.find(new)
        if same is None and new.document_id:
            violations.add(field.format(place=place), f"the model has no document {new.document_id[:64]!r}")
            continue
        document_id = same.document_id if same else new_id(DOCUMENT)
        staged.document_ids.append(document_id)
        if same is None:
            added.append((document_id, new))
            index.add(_describe(document_id, new))
        else:
            await _renew(transaction, model_id, job, same, new, staged)
    violations.raise_if_any()
    await transaction.documents.insert(model_id, added, job.job_id)
    staged.needs_job = staged.needs_job or bool(added)
    return staged


async def _renew(transaction: Transaction, model_id: str, job: Job, same: KnownDocument, new: NewDocument, staged: Staged) -> None:
    """Stage changed content, and one that failed; describe anew what is described in another way; leave alone what is as it was."""
    whole = replace(
        new,
        title=new.title or (same.title if same.sha256 == new.sha256 or not new.file else ""),
        source_uri=new.source_uri or same.source_uri,
        metadata=new.metadata or same.metadata,
    )
    described = (whole.title, whole.source_uri, dict(whole.metadata)) == (same.title, same.source_uri, dict(same.metadata))
    if same.sha256 == new.sha256 and same.state is not DocumentState.FAILED:
        staged.dropped_paths += [new.file.path] if new.file and (described or not same.is_waiting) else []
        if described:
            return
        if not same.is_waiting:
            await transaction.staged.describe(model_id, same.document_id, whole)
            return
    dropped = await transaction.staged.stage(model_id, same.document_id, whole, job.job_id)
    staged.dropped_paths += [dropped] if dropped else []
    staged.needs_job = True


def _describe(document_id: str, new: NewDocument) -> KnownDocument:
    return KnownDocument(document_id, DocumentState.PENDING, new.title, new.source_uri, new.metadata, new.sha256, is_waiting=True)


class _Index:
    """Known documents by id, by source, and by content."""

    def __init__(self, known: Sequence[KnownDocument]) -> None:
        self._by_id: dict[str, KnownDocument] = {}
        self._by_source: dict[str, KnownDocument] = {}
        self._by_content: dict[str, list[KnownDocument]] = {}
        for document in known:
            self.add(document)

    def add(self, document: KnownDocument) -> None:
        """Add one; of two with one source the older one counts."""
        self._by_id[document.document_id] = document
        if document.source_uri:
            self._by_source.setdefault(document.source_uri, document)
        self._by_content.setdefault(document.sha256, []).append(document)

    def find(self, new: NewDocument) -> KnownDocument | None:
        """Find the document that a given one is: by its id, else its source, else its content and title."""
        if new.document_id:
            return self._by_id.get(new.document_id)
        if new.source_uri:
            return self._by_source.get(new.source_uri)
        same = self._by_content.get(new.sha256, [])
        return next((document for document in same if document.title == new.title or (new.file and not new.title)), None)
