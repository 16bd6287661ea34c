"""From a `model_id` to the weights that answer: a base model by name, or a fine-tuned model's version."""

import asyncio

from server.domain.errors import FailedPrecondition, InvalidInput
from server.domain.generation import ModelReference
from server.domain.ids import MODEL
from server.domain.models import Model, ModelState, ModelType
from server.services.model_ports import BaseModels
from server.services.ports import Database


class References:
    """Resolves model ids for the engine."""

    def __init__(self, database: Database, base_models: BaseModels) -> None:
        self._database = database
        self._base_models = base_models

    async def resolve(self, organization: str, model_id: str, version: int | None = None) -> ModelReference:
        """Give the weights of a base model or of a fine-tuned version (None: the one that serves).

        Raises NotFound, and FailedPrecondition for a model that is not READY or that does not generate by itself.
        """
        if not model_id:
            raise InvalidInput.field("model_id", "is required")
        if not model_id.startswith(f"{MODEL}_"):
            return await self._resolve_base(model_id, version)
        async with self._database.transaction(organization) as transaction:
            model = await transaction.models.get(model_id)
            _check_serves(model)
            found = await transaction.models.get_version(model_id, version or model.serving_version or 0)
        return ModelReference(model_id, found.base_model, found.version, found.artifact_path, found.manifest_sha256)

    async def _resolve_base(self, model_id: str, version: int | None) -> ModelReference:
        if version is not None:
            raise InvalidInput.field("version", "must be left out: base models have no versions")
        name = self._base_models.canonical_name(model_id)
        await asyncio.to_thread(self._base_models.check, name)
        return ModelReference(name, name)


def _check_serves(model: Model) -> None:
    metadata = {"model_id": model.model_id, "state": model.state.value}
    if model.type is ModelType.RAG:
        raise FailedPrecondition(
            "A RAG model answers at /rag/inference (RagGenerate), not here.", reason="IS_A_RAG_MODEL", metadata=metadata
        )
    if model.state is not ModelState.READY or model.serving_version is None:
        advice = "Wait for its training job to end." if model.state is ModelState.CREATING else "It has no finished version."
        raise FailedPrecondition(f"The model is {model.state.value}. {advice}", reason="MODEL_NOT_READY", metadata=metadata)
