"""Embedding texts for a caller's own use."""

from dataclasses import dataclass

from server.domain.catalogue import find_embedding_model
from server.domain.embeddings import EmbeddingBackend, Embeddings
from server.services.model_ports import Engine
from server.services.requests import Embed
from server.services.validation import MAX_MODEL_CHARACTERS, Violations

MAX_TEXTS = 256
MAX_TEXT_CHARACTERS = 100_000
MAX_CHARACTERS = 1_000_000  # of all texts together: minutes of work for a large model on a CPU


@dataclass(frozen=True, slots=True)
class Embedded:
    """Vectors, with the model's hub name or path."""

    embedding_model: str
    embeddings: Embeddings


class Embedding:
    """The use case Embed."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def embed(self, request: Embed) -> Embedded:
        """Embed texts. Raises InvalidInput, NotFound, FailedPrecondition, ResourceExhausted, Unavailable."""
        role = request.role
        found = Violations()
        found.text("embedding_model", request.embedding_model, MAX_MODEL_CHARACTERS, least=1)
        if role is None:
            found.add("role", "is required: QUERY for what is searched for, PASSAGE for what is searched")
        _check_texts(found, request)
        found.raise_if_any()
        assert role is not None
        known = find_embedding_model(request.embedding_model)
        name = known.embedding_model_id if known else request.embedding_model
        return Embedded(name, await self._engine.embed(name, request.texts, role, request.backend or EmbeddingBackend.FLOAT32))


def _check_texts(found: Violations, request: Embed) -> None:
    if not 1 <= len(request.texts) <= MAX_TEXTS:
        found.add("texts", f"must be 1 to {MAX_TEXTS}, not {len(request.texts):,}")
        return
    for place, text in enumerate(request.texts):
        found.text(f"texts[{place}]", text, MAX_TEXT_CHARACTERS, least=1)
    characters = sum(map(len, request.texts))
    if characters > MAX_CHARACTERS:
        found.add("texts", f"must have at most {MAX_CHARACTERS:,} characters together, not {characters:,}")
