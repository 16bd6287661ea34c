"""The catalogue of base and embedding models."""

from modeltraining.v1 import base_model_pb2, embedding_model_pb2

from server.api.mappers.values import enum_to_proto
from server.domain.base_models import BaseModel
from server.domain.catalogue import EmbeddingModel

Availability = base_model_pb2.BaseModel


def base_model_to_proto(model: BaseModel, is_present: bool) -> base_model_pb2.BaseModel:
    """Write a base model; `is_present` tells that it loads without a download."""
    return base_model_pb2.BaseModel(
        base_model_id=model.base_model_id,
        aliases=model.aliases,
        display_name=model.display_name,
        family=model.family,
        parameter_count=model.parameter_count,
        context_tokens=model.context_tokens,
        license=model.license,
        gated=model.gated,
        chat=model.chat,
        languages=model.languages,
        size_bytes=model.size_bytes,
        lora_target_modules=model.lora_targets,
        revision=model.revision,
        availability=_availability(is_present, model.gated),
        availability_reason="" if is_present else _say_what_is_missing(model.gated),
        note=model.note,
    )


def embedding_model_to_proto(model: EmbeddingModel, is_present: bool) -> embedding_model_pb2.EmbeddingModel:
    """Write an embedding model; `is_present` tells that it loads without a download."""
    availability = Availability.AVAILABILITY_UNAVAILABLE if model.refusal else _availability(is_present, gated=False)
    return embedding_model_pb2.EmbeddingModel(
        embedding_model_id=model.embedding_model_id,
        aliases=model.aliases,
        display_name=model.display_name,
        family=model.family,
        dimension=model.dimension,
        max_tokens=model.max_tokens,
        pooling=enum_to_proto(embedding_model_pb2.EmbeddingModel.Pooling, "POOLING", model.pooling),
        query_prefix=model.query_prefix,
        passage_prefix=model.passage_prefix,
        text_preparation=model.text_preparation,
        license=model.license,
        languages=model.languages,
        tuned_for_retrieval=model.tuned_for_retrieval,
        availability=availability,
        availability_reason=model.refusal or ("" if is_present else _say_what_is_missing(gated=False)),
        note=model.note,
    )


def _availability(is_present: bool, gated: bool) -> base_model_pb2.BaseModel.Availability.ValueType:
    if is_present:
        return Availability.AVAILABILITY_LOCAL
    return Availability.AVAILABILITY_TOKEN_NEEDED if gated else Availability.AVAILABILITY_DOWNLOAD


def _say_what_is_missing(gated: bool) -> str:
    if gated:
        return "Its files must be downloaded from the hub with a token (HF_TOKEN) of an account that accepted its licence."
    return "Its files are downloaded from the hub on first use."
