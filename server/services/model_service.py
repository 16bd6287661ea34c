"""ModelService: models, their documents and the catalogue."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

from server.domain.base_models import BASE_MODELS, BaseModel
from server.domain.catalogue import EMBEDDING_MODELS, EmbeddingModel
from server.domain.errors import FailedPrecondition, Unavailable
from server.domain.estimates import Estimate
from server.domain.models import Model, RagConfiguration
from server.services.documents import Documents
from server.services.fine_tuning import FineTuning
from server.services.model_ports import BaseModels, Engine
from server.services.paging import close_page, open_page
from server.services.ports import Database, Files
from server.services.rag_models import RagModels, check_prompt_template, merge_retrieval
from server.services.reindexing import Reindexed, Reindexing
from server.services.requests import (
    Created,
    CreateFineTunedModel,
    CreateRagModel,
    Listed,
    ListModels,
    PageRequest,
    ReindexModel,
    UpdateModel,
)
from server.services.reranking import check_cross_encoder
from server.services.validation import MAX_DESCRIPTION_CHARACTERS, MAX_NAME_CHARACTERS, Violations, check_retrieval, check_settings

CatalogueEntry = TypeVar("CatalogueEntry", BaseModel, EmbeddingModel)


class ModelService:
    """Use cases of models."""

    def __init__(
        self,
        database: Database,
        files: Files,
        engine: Engine,
        base_models: BaseModels,
        fine_tuning: FineTuning,
        rag_models: RagModels,
        documents: Documents,
    ) -> None:
        self._database = database
        self._files = files
        self._engine = engine
        self._base_models = base_models
        self._fine_tuning = fine_tuning
        self._rag_models = rag_models
        self.documents = documents
        self._reindexing = Reindexing(database, base_models)

    async def list_models(self, organization: str, request: ListModels) -> Listed[Model]:
        """List models, newest first."""
        page = open_page(request.page, request.where)
        async with self._database.transaction(organization) as transaction:
            items = await transaction.models.list(request.where, page)
        return close_page(items, page, request.where, lambda model: model.model_id)

    async def get_model(self, organization: str, model_id: str) -> Model:
        """Read a model. Raises NotFound."""
        async with self._database.transaction(organization) as transaction:
            return await transaction.models.get(model_id)

    async def update_model(self, organization: str, request: UpdateModel) -> Model:
        """Change names, labels and retrieval defaults. Raises NotFound, InvalidInput."""
        found = Violations()
        await check_cross_encoder(self._base_models, found, request.retrieval)
        async with self._database.transaction(organization) as transaction:
            model = await transaction.models.get(request.model_id, lock=True)
            changed = _apply(found, model, request)
            await transaction.models.save(changed)
            return await transaction.models.get(request.model_id)

    async def delete_model(self, organization: str, model_id: str) -> None:
        """Remove a model with everything of it. Raises FailedPrecondition while a job or a RAG model uses it."""
        async with self._database.transaction(organization) as transaction:
            await transaction.models.get(model_id, lock=True)
            if jobs := await transaction.jobs.list_active(model_id=model_id):
                raise _in_use("job", jobs[0], "Cancel it or wait for its end.")
            if users := await transaction.models.list_users(model_id):
                raise _in_use("RAG model", users[0], "Delete that one first.")
            results = await transaction.jobs.list_result_paths(model_id)
            await transaction.models.delete(model_id)
        # The rows are gone, so nobody finds the files any more; what a crash leaves here the worker's sweep removes.
        with suppress(Unavailable):  # an engine that is down holds nothing
            await self._engine.forget(model_id)
        for path in (*(f"{organization}/{room}/{model_id}" for room in ("models", "documents")), *results):
            await self._files.delete_tree(path)

    async def create_fine_tuned_model(self, organization: str, request: CreateFineTunedModel) -> Created:
        """Start a fine-tuning."""
        return await self._fine_tuning.create(organization, request)

    async def estimate_fine_tune(self, organization: str, request: CreateFineTunedModel) -> Estimate:
        """Say what a fine-tuning would need, without starting it."""
        return await self._fine_tuning.estimate(organization, request)

    async def create_rag_model(self, organization: str, request: CreateRagModel) -> Created:
        """Start building a RAG model."""
        return await self._rag_models.create(organization, request)

    async def reindex_model(self, organization: str, request: ReindexModel) -> Reindexed:
        """Start building another index of a RAG model."""
        return await self._reindexing.reindex(organization, request)

    def list_base_models(self, request: PageRequest) -> Listed[tuple[BaseModel, bool]]:
        """List the catalogue, each with whether it can be loaded here now."""
        items, token = _slice(BASE_MODELS, request)
        return Listed([(item, self._base_models.is_present(item.base_model_id)) for item in items], token)

    def list_embedding_models(self, request: PageRequest) -> Listed[tuple[EmbeddingModel, bool]]:
        """List the embedding models that are promised, each with whether it can be loaded here now."""
        items, token = _slice(EMBEDDING_MODELS, request)
        return Listed([(item, self._base_models.is_present(item.embedding_model_id)) for item in items], token)


def _slice(items: Sequence[CatalogueEntry], request: PageRequest) -> tuple[Sequence[CatalogueEntry], str]:
    """Cut a page out of a catalogue, in its own order."""
    page = open_page(request, "catalogue")
    names = [_name(item) for item in items]
    start = names.index(page.before_id) + 1 if page.before_id in names else 0
    listed = close_page(items[start : start + page.size], page, "catalogue", _name)
    return listed.items, listed.next_page_token


def _name(item: BaseModel | EmbeddingModel) -> str:
    return item.base_model_id if isinstance(item, BaseModel) else item.embedding_model_id


def _apply(found: Violations, model: Model, request: UpdateModel) -> Model:
    """Check and apply the changes; what was left out stays."""
    if request.display_name is not None:
        found.text("display_name", request.display_name, MAX_NAME_CHARACTERS, least=1)
    if request.description is not None:
        found.text("description", request.description, MAX_DESCRIPTION_CHARACTERS)
    labels = {key: value for key, value in {**model.labels, **request.labels}.items() if value}
    found.labels(labels)
    if request.retrieval is not None:
        check_retrieval(found, request.retrieval)
        if model.rag is None:
            found.add("retrieval", "can be set on RAG models only")
    if request.prompt_template is not None:
        check_prompt_template(found, request.prompt_template)
        if model.rag is None:
            found.add("prompt_template", "can be set on RAG models only")
    found.raise_if_any()
    rag = _apply_to_rag(model.rag, request) if model.rag else None
    if rag is not None:
        check_settings(found, rag.retrieval)
    found.raise_if_any()
    return replace(
        model,
        display_name=model.display_name if request.display_name is None else request.display_name,
        description=model.description if request.description is None else request.description,
        labels=labels,
        rag=rag,
    )


def _apply_to_rag(rag: RagConfiguration, request: UpdateModel) -> RagConfiguration:
    template = rag.prompt_template if request.prompt_template is None else request.prompt_template
    return replace(rag, retrieval=merge_retrieval(rag.retrieval, request.retrieval), prompt_template=template)


def _in_use(kind: str, name: str, advice: str) -> FailedPrecondition:
    return FailedPrecondition(f"The model is in use by the {kind} {name}. {advice}", reason="MODEL_IN_USE", metadata={"used_by": name})
