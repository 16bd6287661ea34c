"""Records of retrieval queries: what is one, and what is said about what is none."""

import json

import pytest

from server.domain.datasets import RecordKind
from server.domain.record_forms import parse_record
from server.domain.records import RecordInvalid
from server.domain.retrieval_evaluation import Relevant, RetrievalQuery, check_query, parse_query


def test_documents_spans_and_quotes_are_read() -> None:
    relevant = [
        "doc_1",
        {"document_id": "doc_2", "char_start": 3, "char_end": 9},
        {"quote": "اقتباس"},
        {"document_id": "doc_3", "quote": "q"},
    ]
    read = parse_query({"query": "متى؟", "relevant": relevant, "answer": "ignored"})
    assert read.query == "متى؟"
    assert read.relevant == (Relevant("doc_1"), Relevant("doc_2", 3, 9), Relevant(quote="اقتباس"), Relevant("doc_3", quote="q"))


def test_a_query_is_a_record_of_its_own_kind() -> None:
    record = parse_record(b'{"query": "When?", "relevant": ["doc_1"]}')
    assert (record.kind, record.texts) == (RecordKind.RETRIEVAL, ("When?",))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"relevant": ["doc_1"]}, "`query` must be a text"),
        ({"query": "q", "relevant": "doc_1"}, "`relevant` a list"),
        ({"query": "q", "relevant": []}, "relevant must be 1 to 100, not 0"),
        ({"query": "q", "relevant": ["d"] * 101}, "not 101"),
        ({"query": " ", "relevant": ["d"]}, "query must not be empty"),
        ({"query": "q" * 20_001, "relevant": ["d"]}, "at most 20,000"),
        ({"query": "q", "relevant": [3]}, "relevant[0] must be a document's id or an object"),
        ({"query": "q", "relevant": ["d", {}]}, "relevant[1].document_id is required"),
        ({"query": "q", "relevant": [{"document_id": 1}]}, "must be texts"),
        ({"query": "q", "relevant": [{"document_id": "d", "char_start": True, "char_end": 2}]}, "whole numbers"),
        ({"query": "q", "relevant": [{"document_id": "d", "char_start": 1.5, "char_end": 2}]}, "whole numbers"),
        ({"query": "q", "relevant": [{"document_id": "d", "char_start": 1}]}, "relevant[0].char_end is required"),
        ({"query": "q", "relevant": [{"document_id": "d", "char_start": 5, "char_end": 5}]}, "below char_end"),
        ({"query": "q", "relevant": [{"document_id": "d", "char_start": -1, "char_end": 5}]}, "from 0"),
        ({"query": "q", "relevant": [{"document_id": "d", "char_start": 0, "char_end": 2**31}]}, "at most 2,147,483,647"),
        ({"query": "q", "relevant": [{"document_id": "d", "char_start": 0, "char_end": 5, "quote": "x"}]}, "beside offsets"),
        ({"query": "q", "relevant": [{"quote": "a\x00"}]}, "NUL"),
        ({"query": "\ud800", "relevant": ["d"]}, "surrogate"),
    ],
)
def test_what_is_no_query_is_refused_with_its_reason(value: dict[str, object], words: str) -> None:
    with pytest.raises(RecordInvalid) as refused:
        parse_record(json.dumps(value).encode())
    assert words in str(refused.value)


def test_every_bad_field_of_an_inline_query_is_named() -> None:
    found = check_query(RetrievalQuery("", [Relevant("d"), Relevant(), Relevant("d", 9, 3)]))
    assert [field for field, _ in found] == ["query", "relevant[1].document_id", "relevant[2].char_start"]
