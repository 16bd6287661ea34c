"""Texts and their vectors."""

from modeltraining.v1 import inference_service_pb2

from server.api.mappers.values import enum_from_proto
from server.domain.generation import EmbedRole
from server.services.embedding import Embedded
from server.services.requests import Embed
from server.services.validation import Violations


def embed_from_proto(message: inference_service_pb2.EmbedRequest, found: Violations) -> Embed:
    """Read texts to embed."""
    role = enum_from_proto(inference_service_pb2.EmbedRequest.Role, "ROLE", message.role, EmbedRole, found, "role")
    return Embed(message.embedding_model, tuple(message.texts), role)


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
