"""The sample data: what the demo teaches, holds out and asks must fit together, or the demo shows nothing."""

import json
from pathlib import Path
from typing import Any

import pytest

from server.domain.record_forms import parse_record
from server.domain.records import Record
from server.domain.retrieval_evaluation import parse_query
from tests.deployment.dockerfile import REPOSITORY

EXAMPLES = REPOSITORY / "examples"
ARABIC = range(0x0600, 0x0700)


def read_records(name: str) -> list[Record]:
    """Read a file of records as the service does; a bad line raises."""
    return [parse_record(line) for line in (EXAMPLES / "records" / name).read_bytes().splitlines()]


def has_arabic(text: str) -> bool:
    return any(ord(character) in ARABIC for character in text)


@pytest.fixture(scope="module")
def questions() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((EXAMPLES / "questions.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def documents() -> dict[str, str]:
    texts = [path.read_text(encoding="utf-8") for path in (EXAMPLES / "documents").iterdir()]
    assert all(text.startswith("# ") for text in texts)
    return {text.partition("\n")[0].removeprefix("# "): text for text in texts}


def test_there_are_a_few_hundred_records_in_both_languages() -> None:
    records = read_records("training.jsonl")
    arabic = sum(has_arabic(record.turns[-1].content) for record in records)
    assert 250 <= len(records) <= 400
    assert arabic >= 50
    assert len(records) - arabic >= 200
    assert not any(record.is_plain for record in records)


def test_both_forms_of_records_are_shown() -> None:
    assert all(record.is_plain for record in read_records("announcements.jsonl"))


def test_every_query_quotes_what_stands_in_one_document(documents: dict[str, str]) -> None:
    lines = (EXAMPLES / "records" / "queries.jsonl").read_bytes().splitlines()
    queries = [parse_query(json.loads(line)) for line in lines]
    for query in queries:
        (relevant,) = query.relevant
        assert sum(relevant.quote in " ".join(text.split()) for text in documents.values()) == 1, relevant.quote
    assert sum(has_arabic(query.query) for query in queries) == 3


def test_no_question_is_trained_twice_or_held_out_and_trained() -> None:
    trained = [record.turns[0].content for record in read_records("training.jsonl") if len(record.turns) == 2]
    held_out = [record.turns[0].content for record in read_records("held_out.jsonl")]
    assert len(set(trained)) == len(trained)
    assert not set(trained) & set(held_out)


def test_every_held_out_answer_is_taught_in_at_least_seven_wordings() -> None:
    taught = [record.turns[-1].content for record in read_records("training.jsonl")]
    for record in read_records("held_out.jsonl"):
        assert taught.count(record.turns[-1].content) >= 7, record.turns[-1].content


def test_the_demo_asks_held_out_questions_whose_answers_hold_the_key(questions: dict[str, Any]) -> None:
    answers = {record.turns[0].content: record.turns[-1].content for record in read_records("held_out.jsonl")}
    assert any(has_arabic(item["question"]) for item in questions["taught"])
    for item in questions["taught"]:
        assert item["key"] in answers[item["question"]]
        # A model that parrots the question must not pass.
        assert item["key"].casefold() not in item["question"].casefold()


def test_the_documents_answer_what_the_demo_asks_and_the_records_do_not(questions: dict[str, Any], documents: dict[str, str]) -> None:
    taught = (EXAMPLES / "records" / "training.jsonl").read_text(encoding="utf-8")
    assert 8 <= len(documents) <= 12
    assert sum(has_arabic(text) for text in documents.values()) in (2, 3)
    for item in questions["documented"]:
        assert item["key"] in documents[item["document"]]
        assert item["key"] not in taught
        assert sum(item["key"] in text for text in documents.values()) == 1


def test_the_list_of_files_names_them_all() -> None:
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    files: list[Path] = [*(EXAMPLES / "records").iterdir(), EXAMPLES / "questions.json", EXAMPLES / "demo.py"]
    for file in files:
        assert f"`{file.relative_to(EXAMPLES)}`" in listed
