"""Making RAG models: check everything at once, store the model, its first documents and the job that indexes them."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

from server.domain.catalogue import NOT_TUNED_NOTE, find_embedding_model
from server.domain.embeddings import EmbeddingBackend
from server.domain.errors import InvalidInput, NotFound
from server.domain.findings import Finding, Severity
from server.domain.ids import MODEL, new_id
from server.domain.models import Model, ModelState, ModelType, RagConfiguration
from server.domain.retrieval import Chunking, RetrievalOverrides, RetrievalSettings, SearchMode
from server.services.fine_tuning import check_base_model
from server.services.idempotency import find_issued, hash_body, remember
from server.services.model_ports import BaseModels
from server.services.ports import Database, Transaction
from server.services.prompt_templates import check_template
from server.services.requests import Created, CreateRagModel
from server.services.reranking import check_cross_encoder
from server.services.staging import check_documents, new_index_job, stage_documents
from server.services.validation import Violations, check_retrieval, check_settings

MAX_TEMPLATE_CHARACTERS = 20_000
MIN_CHUNK_TOKENS = 16
MAX_CHUNK_TOKENS = 8_192  # the longest that a promised embedding model reads
DEFAULT_OVERLAP_TOKENS = 32


class RagModels:
    """The use case CreateRagModel."""

    def __init__(self, database: Database, base_models: BaseModels, embedding_backend: EmbeddingBackend = EmbeddingBackend.FLOAT32) -> None:
        """`embedding_backend` is that of models that name none."""
        self._database = database
        self._base_models = base_models
        self._embedding_backend = embedding_backend

    async def create(self, organization: str, request: CreateRagModel) -> Created:
        """Store a RAG model with its first documents and the job that indexes them. Raises InvalidInput naming every bad field."""
        body = hash_body(request)
        found = Violations()
        _check_plain(found, request)
        embedding_model = self._base_models.canonical_name(request.embedding_model)
        await check_embedding_model(self._base_models, found, embedding_model)
        await check_cross_encoder(self._base_models, found, request.retrieval)
        check_chunking(found, request.max_chunk_tokens, request.overlap_tokens, embedding_model)
        generator = self._base_models.canonical_name(request.generator_model_id)
        if not generator.startswith(f"{MODEL}_"):
            await check_base_model(self._base_models, found, "generator_model_id", generator)
        async with self._database.transaction(organization) as transaction:
            if issued := await find_issued(transaction, "CreateRagModel", request.request_id, body):
                stored = await transaction.models.get(issued["model_id"])
                return Created(stored, await transaction.jobs.get(issued["job_id"]), find_warnings(embedding_model))
            base_model = await _find_generator_base(transaction, found, generator)
            found.raise_if_any()
            model = _new_model(request, generator, base_model, embedding_model, request.embedding_backend or self._embedding_backend)
            job = new_index_job(model)
            if request.validate_only:
                return Created(replace(model, model_id=""), replace(job, job_id="", model_id=""), find_warnings(embedding_model))
            await transaction.models.insert(model)
            await transaction.jobs.insert(job)
            await stage_documents(transaction, model.model_id, job, request.documents)
            made = {"model_id": model.model_id, "job_id": job.job_id}
            await remember(transaction, "CreateRagModel", request.request_id, body, made)
            stored = await transaction.models.get(model.model_id)
            return Created(stored, await transaction.jobs.get(job.job_id), find_warnings(embedding_model))


def merge_retrieval(settings: RetrievalSettings, asked: RetrievalOverrides | None) -> RetrievalSettings:
    """Apply what a request sets over a model's defaults."""
    if asked is None:
        return settings
    percentile = settings.similarity_percentile if asked.similarity_threshold is None else None
    return RetrievalSettings(
        top_k=settings.top_k if asked.top_k is None else asked.top_k,
        similarity_threshold=settings.similarity_threshold if asked.similarity_threshold is None else asked.similarity_threshold,
        search_mode=asked.search_mode or settings.search_mode,
        max_context_tokens=settings.max_context_tokens if asked.max_context_tokens is None else asked.max_context_tokens,
        dense_weight=settings.dense_weight if asked.dense_weight is None else asked.dense_weight,
        lexical_weight=settings.lexical_weight if asked.lexical_weight is None else asked.lexical_weight,
        filter=settings.filter if asked.filter is None else asked.filter,
        similarity_percentile=percentile if asked.similarity_percentile is None else asked.similarity_percentile,
        rerank=settings.rerank if asked.rerank is None else (asked.rerank if asked.rerank.model else None),
        max_chunks_per_document=(
            settings.max_chunks_per_document if asked.max_chunks_per_document is None else asked.max_chunks_per_document
        ),
        mmr_lambda=settings.mmr_lambda if asked.mmr_lambda is None else asked.mmr_lambda,
    )


def default_retrieval(embedding_model: str) -> RetrievalSettings:
    """Give the settings of a model that says nothing: one whose embeddings were never trained to retrieve also searches by words."""
    return RetrievalSettings(search_mode=SearchMode.HYBRID if find_warnings(embedding_model) else SearchMode.DENSE)


async def check_embedding_model(base_models: BaseModels, found: Violations, embedding_model: str) -> None:
    """Note a model that this service cannot use, whether or not it can be had, and one that cannot be had."""
    known = find_embedding_model(embedding_model)
    if known is not None and known.refusal:
        found.add("embedding_model", known.refusal)
    else:
        await check_base_model(base_models, found, "embedding_model", embedding_model)


def find_warnings(embedding_model: str) -> Sequence[Finding]:
    """Say what may disappoint of an embedding model."""
    known = find_embedding_model(embedding_model)
    if known is None or known.tuned_for_retrieval:
        return []
    return [Finding(None, "EMBEDDING_MODEL_NOT_TUNED", NOT_TUNED_NOTE, Severity.WARNING, "embedding_model")]


def check_prompt_template(found: Violations, template: str) -> None:
    """Check the template of a model's prompt; an empty one is the built-in one."""
    found.text("prompt_template", template, MAX_TEMPLATE_CHARACTERS)
    if template and len(template) <= MAX_TEMPLATE_CHARACTERS:
        try:
            check_template(template)
        except InvalidInput as error:
            found.extend(error, "")


def _check_plain(found: Violations, request: CreateRagModel) -> None:
    found.name(request.display_name, request.description, request.request_id)
    found.labels(request.labels)
    check_retrieval(found, request.retrieval)
    if not found.found:
        check_settings(found, merge_retrieval(default_retrieval(request.embedding_model), request.retrieval))
    check_documents(found, request.documents, is_new=True)
    check_prompt_template(found, request.prompt_template)


def check_chunking(
    found: Violations, max_tokens: int | None, overlap_tokens: int | None, embedding_model: str, own: Chunking | None = None
) -> None:
    """Check how documents are to be cut; what is left out is the model's `own`, if it is there already."""
    known = find_embedding_model(embedding_model)
    longest = known.max_tokens if known else MAX_CHUNK_TOKENS
    found.number("chunking.max_tokens", max_tokens, MIN_CHUNK_TOKENS, longest)
    whole = max_tokens or (own.max_tokens if own else 0) or min(longest, 256)
    overlap = own.overlap_tokens if own and overlap_tokens is None and max_tokens is not None else overlap_tokens
    found.number("chunking.overlap_tokens", overlap, 0, whole // 2)


async def _find_generator_base(transaction: Transaction, found: Violations, generator: str) -> str:
    """Give the base model that answers in the end."""
    if not generator.startswith(f"{MODEL}_"):
        return generator
    try:
        model = await transaction.models.get(generator, lock=True)
    except NotFound as error:
        found.add("generator_model_id", str(error))
        return ""
    if model.type is not ModelType.FINE_TUNED or model.state is not ModelState.READY:
        found.add("generator_model_id", "must be a base model or a fine-tuned model that is READY")
    return model.base_model


def _new_model(request: CreateRagModel, generator: str, base_model: str, embedding_model: str, backend: EmbeddingBackend) -> Model:
    now = datetime.now(UTC)
    overlap = request.overlap_tokens
    if overlap is None:
        overlap = min(DEFAULT_OVERLAP_TOKENS, (request.max_chunk_tokens or 256) // 2)
    return Model(
        model_id=new_id(MODEL),
        type=ModelType.RAG,
        display_name=request.display_name,
        description=request.description,
        labels=dict(request.labels),
        state=ModelState.CREATING,
        base_model=base_model,
        create_time=now,
        update_time=now,
        rag=RagConfiguration(
            generator_model_id=generator,
            embedding_model=embedding_model,
            retrieval=merge_retrieval(default_retrieval(embedding_model), request.retrieval),
            chunking=Chunking(request.max_chunk_tokens or 0, overlap),
            prompt_template=request.prompt_template,
            embedding_backend=backend,
        ),
    )
