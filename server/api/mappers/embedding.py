"""Texts and their vectors."""

from modeltraining.v1 import embedding_model_pb2, inference_service_pb2

from server.api.mappers.values import enum_from_proto, enum_to_proto
from server.domain.embeddings import EmbeddingBackend
from server.domain.generation import EmbedRole
from server.services.embedding import Embedded
from server.services.requests import Embed
from server.services.validation import Violations

Backend = embedding_model_pb2.EmbeddingModel.Backend


def embed_from_proto(message: inference_service_pb2.EmbedRequest, found: Violations) -> Embed:
    """Read texts to embed."""
    role = enum_from_proto(inference_service_pb2.EmbedRequest.Role, "ROLE", message.role, EmbedRole, found, "role")
    return Embed(message.embedding_model, tuple(message.texts), role, backend_from_proto(message.backend, found, "backend"))


def backend_from_proto(number: Backend.ValueType, found: Violations, field: str) -> EmbeddingBackend | None:
    """Read in which numbers a model computes; None: the default."""
    return enum_from_proto(Backend, "BACKEND", number, EmbeddingBackend, found, field)


def backend_to_proto(backend: EmbeddingBackend) -> Backend.ValueType:
    """Write in which numbers a model computes."""
    return enum_to_proto(Backend, "BACKEND", backend)


def embedded_to_proto(embedded: Embedded) -> inference_service_pb2.EmbedResponse:
    """Write vectors in the order of the texts."""
    given = embedded.embeddings
    rows = [
        inference_service_pb2.EmbedResponse.Embedding(values=vector, token_count=count, truncated=count > given.max_tokens)
        for vector, count in zip(given.vectors, given.token_counts, strict=True)
    ]
    return inference_service_pb2.EmbedResponse(
        embedding_model=embedded.embedding_model,
        dimension=given.dimension,
        max_tokens=given.max_tokens,
        embeddings=rows,
        total_tokens=sum(min(count, given.max_tokens) for count in given.token_counts),
    )
