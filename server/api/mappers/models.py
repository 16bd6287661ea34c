"""Models: what was made here, and requests to make or change one."""

import json

from modeltraining.v1 import message_pb2, model_pb2, model_service_pb2

from server.api.errors import status_from_data
from server.api.mappers.documents import new_document_from_proto
from server.api.mappers.embedding import backend_from_proto, backend_to_proto
from server.api.mappers.findings import finding_to_proto
from server.api.mappers.fine_tuning import parameters_from_proto, version_from_proto
from server.api.mappers.jobs import job_to_proto
from server.api.mappers.rag_indexes import index_to_proto
from server.api.mappers.retrieval import chunking_to_proto, overrides_from_proto, settings_to_proto
from server.api.mappers.techniques import technique_from_proto
from server.api.mappers.values import enum_from_proto, enum_to_proto, time_to_proto
from server.domain.models import Model, ModelState, ModelType, RagConfiguration
from server.services.ports import ModelFilter
from server.services.requests import Created, CreateFineTunedModel, CreateRagModel, ListModels, PageRequest, UpdateModel
from server.services.validation import Violations


def model_to_proto(model: Model) -> model_pb2.Model:
    """Write a model."""
    return model_pb2.Model(
        model_id=model.model_id,
        type=enum_to_proto(model_pb2.Model.Type, "TYPE", model.type),
        display_name=model.display_name,
        description=model.description,
        labels=model.labels,
        state=enum_to_proto(model_pb2.Model.State, "STATE", model.state),
        base_model=model.base_model,
        technique=enum_to_proto(model_pb2.Model.Technique, "TECHNIQUE", model.technique),
        serving_version=model.serving_version,
        version_count=model.version_count,
        rag=rag_to_proto(model.rag, model.document_count, model.chunk_count) if model.rag else None,
        error=status_from_data(model.error) if model.error else None,
        create_time=time_to_proto(model.create_time),
        update_time=time_to_proto(model.update_time),
    )


def rag_to_proto(rag: RagConfiguration, document_count: int, chunk_count: int) -> model_pb2.Model.Rag:
    """Write what a RAG model is made of. A threshold that a percentile rules in place of stays unset."""
    retrieval = settings_to_proto(rag.retrieval)
    if rag.retrieval.similarity_percentile is not None:
        retrieval.ClearField("similarity_threshold")
    return model_pb2.Model.Rag(
        generator_model_id=rag.generator_model_id,
        embedding_model=rag.embedding_model,
        embedding_dimension=rag.index.dimension if rag.index else None,
        retrieval=retrieval,
        chunking=chunking_to_proto(rag.chunking),
        prompt_template=rag.prompt_template,
        document_count=document_count,
        chunk_count=chunk_count,
        embedding_backend=backend_to_proto(rag.embedding_backend),
        index=index_to_proto(rag.index) if rag.index else None,
    )


def list_models_from_proto(message: model_service_pb2.ListModelsRequest, found: Violations) -> ListModels:
    """Read which models are wanted."""
    where = ModelFilter(
        type=enum_from_proto(model_pb2.Model.Type, "TYPE", message.type, ModelType, found, "type"),
        state=enum_from_proto(model_pb2.Model.State, "STATE", message.state, ModelState, found, "state"),
        base_model=message.base_model or None,
    )
    return ListModels(where, PageRequest(message.page_size if message.HasField("page_size") else None, message.page_token))


def update_model_from_proto(message: model_service_pb2.UpdateModelRequest, found: Violations) -> UpdateModel:
    """Read what is to be changed."""
    return UpdateModel(
        model_id=message.model_id,
        display_name=message.display_name if message.HasField("display_name") else None,
        description=message.description if message.HasField("description") else None,
        labels=dict(message.labels),
        retrieval=overrides_from_proto(message.retrieval, found) if message.HasField("retrieval") else None,
        prompt_template=message.prompt_template if message.HasField("prompt_template") else None,
    )


def create_fine_tuned_from_proto(message: model_service_pb2.CreateFineTunedModelRequest, found: Violations) -> CreateFineTunedModel:
    """Read a fine-tuning to start."""
    return CreateFineTunedModel(
        display_name=message.display_name,
        description=message.description,
        model_id=message.model_id,
        base_model=message.base_model,
        dataset_id=message.dataset_id,
        inline_records=[record_to_line(record) for record in message.inline_records],
        eval_dataset_id=message.eval_dataset_id,
        eval_fraction=message.eval_fraction if message.HasField("eval_fraction") else None,
        technique=technique_from_proto(message, found),
        warm_start_from=version_from_proto(message.warm_start_from) if message.HasField("warm_start_from") else None,
        parameters=parameters_from_proto(message.parameters, found),
        labels=dict(message.labels),
        request_id=message.request_id,
        validate_only=message.validate_only,
    )


def record_to_line(record: message_pb2.TrainingRecord) -> bytes:
    """Write an inline record as the line of JSON that a dataset file would have."""
    content: dict[str, object] = {}
    if record.messages:
        content["messages"] = [_message_to_json(message) for message in record.messages]
    if record.tools:
        content["tools"] = f"[{','.join(record.tools)}]"  # a JSON text, checked with the rest of the record
    content |= {field.name: value for field, value in record.ListFields() if field.name not in ("messages", "tools")}
    return json.dumps(content, ensure_ascii=False).encode()


def _message_to_json(message: message_pb2.Message) -> dict[str, object]:
    plain: dict[str, object] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        calls = [{"id": call.id, "function": {"name": call.name, "arguments": call.arguments}} for call in message.tool_calls]
        plain["tool_calls"] = [{"type": "function", **call} for call in calls]
    return plain | {key: value for key, value in (("name", message.name), ("tool_call_id", message.tool_call_id)) if value}


def create_rag_from_proto(message: model_service_pb2.CreateRagModelRequest, found: Violations) -> CreateRagModel:
    """Read a RAG model to make."""
    chunking = message.chunking
    return CreateRagModel(
        display_name=message.display_name,
        description=message.description,
        generator_model_id=message.generator_model_id,
        embedding_model=message.embedding_model,
        retrieval=overrides_from_proto(message.retrieval, found),
        max_chunk_tokens=chunking.max_tokens if chunking.HasField("max_tokens") else None,
        overlap_tokens=chunking.overlap_tokens if chunking.HasField("overlap_tokens") else None,
        documents=[new_document_from_proto(item, found, f"documents[{place}]") for place, item in enumerate(message.documents)],
        prompt_template=message.prompt_template,
        embedding_backend=backend_from_proto(message.embedding_backend, found, "embedding_backend"),
        labels=dict(message.labels),
        request_id=message.request_id,
        validate_only=message.validate_only,
    )


def fine_tuned_to_proto(created: Created) -> model_service_pb2.CreateFineTunedModelResponse:
    """Write a fine-tuning that was started."""
    return model_service_pb2.CreateFineTunedModelResponse(
        model=model_to_proto(created.model), training_job=job_to_proto(created.job) if created.job else None
    )


def rag_created_to_proto(created: Created) -> model_service_pb2.CreateRagModelResponse:
    """Write a RAG model that is being built."""
    return model_service_pb2.CreateRagModelResponse(
        model=model_to_proto(created.model),
        training_job=job_to_proto(created.job) if created.job else None,
        findings=[finding_to_proto(finding) for finding in created.findings],
    )
