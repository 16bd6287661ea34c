"""Bad searches and questions to documents, through REST: each field is named, whatever the way in, and nothing is asked of an engine."""

from typing import Any

import httpx
import pytest

from server.db.database import PostgresDatabase
from server.domain.documents import NewDocument
from tests.api.test_rest import read_bad_fields
from tests.db.samples import add_model, make_rag_model
from tests.services.libraries import index_documents

WAYS_IN = ("/rag/retrieve", "/rag/inference")
LEXICAL = {"search_mode": "SEARCH_MODE_LEXICAL"}
TURNS: list[dict[str, str]] = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


# One Envoy for all: it takes longer to start than all of them.
CASES: list[tuple[dict[str, Any], list[str]]] = [
    ({"query": ""}, ["query"]),
    ({"query": " \n\u2003"}, ["query"]),
    ({"query": "x" * 20_001}, ["query"]),
    ({"query": "a\u0000b"}, ["query"]),
    ({"retrieval": {"similarity_threshold": 2}}, ["retrieval.similarity_threshold"]),
    ({"retrieval": {"similarity_threshold": "NaN", "top_k": 10**6}}, ["retrieval.similarity_threshold", "retrieval.top_k"]),
    ({"retrieval": {"top_k": 0, "max_context_tokens": -1}}, ["retrieval.max_context_tokens", "retrieval.top_k"]),
    ({"retrieval": {**LEXICAL, "filter": {"conditions": [{"key": "yaer", "equals": 1}]}}}, ["retrieval.filter.conditions[0].key"]),
    ({"retrieval": {**LEXICAL, "filter": {"conditions": []}}}, ["retrieval.filter.conditions"]),
    ({"messages": TURNS * 500}, ["messages"]),
    ({"messages": TURNS[:1]}, ["messages[1].role"]),
    ({"messages": [{"role": "user", "content": "x" * 2_000_001}, TURNS[1]]}, ["messages[0].content"]),
    ({"messages": [{"role": "robot", "content": "x"}, TURNS[1]]}, ["messages[0].role"]),
    ({"query": "", "messages": [TURNS[0], {"role": "assistant", "content": ""}], "retrieval": {"top_k": -1}},
     ["messages[1].content", "query", "retrieval.top_k"]),
]  # fmt: skip


@pytest.fixture
async def model_id(database: PostgresDatabase) -> str:
    model = await add_model(database, make_rag_model())
    await index_documents(database, model, [NewDocument("alpha beta.", metadata={"year": 2026})])
    return model.model_id


@pytest.mark.parametrize("path", WAYS_IN)
async def test_each_bad_field_is_named(rest: httpx.AsyncClient, model_id: str, path: str) -> None:
    for change, fields in CASES:
        refused = await rest.post(path, json={"model_id": model_id, "query": "omega", **change})
        assert refused.status_code == 400, (fields, refused.text)
        assert read_bad_fields(refused) == fields


async def test_nothing_found_is_said_without_an_engine_in_the_language_of_the_question(rest: httpx.AsyncClient, model_id: str) -> None:
    said = {"omega": "Nothing in the documents", "أوميغا؟": "لا يوجد في الوثائق", "Où est l'oméga ?": "Rien dans les documents"}
    for query, sentence in said.items():
        answer = await rest.post("/rag/inference", json={"model_id": model_id, "query": query, "retrieval": LEXICAL})
        assert answer.status_code == 200, answer.text
        assert answer.json()["text"].startswith(sentence)
        assert (answer.json()["grounded"], answer.json()["chunks"], answer.json()["searched_query"]) == (False, [], query)
