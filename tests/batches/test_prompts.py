"""From records to what a model is asked: the answer never goes along."""

import json
from typing import Any

import pytest

from server.batches.prompts import make_request
from server.datafiles.reading import NumberedRecord
from server.domain.datasets import DatasetFormat, RecordKind
from server.domain.generation import GenerationParameters, ModelReference, Priority, Role
from server.domain.orders import BatchOrder, DatasetFile
from server.domain.record_forms import parse_record
from server.domain.records import RecordInvalid
from server.domain.specs import BatchSpec

DATASET = DatasetFile("d", "", DatasetFormat.JSONL, RecordKind.MIXED, 1)
TOOL = {"type": "function", "function": {"name": "look"}}
ASKED = {"role": "user", "content": "q"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"id": "c", "function": {"name": "look", "arguments": {}}}]}
FOUND = {"role": "tool", "content": "found", "tool_call_id": "c", "name": "look"}
SAID = {"role": "assistant", "content": "a", "name": "Ann"}


def make_order(parameters: GenerationParameters) -> BatchOrder:
    """An order over a base model."""
    spec = BatchSpec("b", None, "ds_1", "", parameters)
    return BatchOrder("job_1", 1, spec, ModelReference("b", "b"), DATASET, "default/jobs/job_1", "default/jobs/job_1/job_1-1")


ORDER = make_order(GenerationParameters(seed=2**31 - 2, n=2, temperature=1))


def read(number: int = 1, kind: RecordKind = RecordKind.MIXED, **value: Any) -> NumberedRecord:
    """A record of a file."""
    return NumberedRecord(number, number, parse_record(json.dumps(value).encode(), kind))


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        (read(prompt="Once upon", completion=" a time"), "Once upon"),
        (read(text="Once upon"), "Once upon"),
        (read(kind=RecordKind.PROMPT, prompt="Once upon"), "Once upon"),
    ],
)
def test_plain_records_are_continued_as_they_are(record: NumberedRecord, prompt: str) -> None:
    request = make_request(ORDER, record)
    assert (request.prompt, request.messages, request.priority) == (prompt, (), Priority.LOW)


@pytest.mark.parametrize(
    ("messages", "contents"),
    [
        ([ASKED, SAID], ["q"]),
        ([{"role": "system", "content": "s"}, ASKED, SAID, ASKED, SAID], ["s", "q", "a", "q"]),
        ([ASKED, CALL, FOUND, SAID], ["q", "", "found"]),
    ],
)
def test_of_a_conversation_the_last_answer_is_left_out(messages: list[dict[str, Any]], contents: list[str]) -> None:
    request = make_request(ORDER, read(messages=messages, tools=[TOOL]))
    assert (request.prompt, [message.content for message in request.messages]) == (None, contents)
    assert [json.loads(tool) for tool in request.tools] == [TOOL]
    assert all(message.role is Role.TOOL for message in request.messages if message.name or message.call_id)


def test_an_instruction_is_the_users_turn() -> None:
    (message,) = make_request(ORDER, read(instruction="Name it.", input="The house.", output="Blue.")).messages
    assert (message.role, message.content) == (Role.USER, "Name it.\n\nThe house.")


def test_each_record_has_seeds_of_its_own_that_only_its_number_tells() -> None:
    seeds = [make_request(ORDER, read(number, text="x")).parameters.seed for number in (1, 2, 3)]
    assert seeds == [2**31 - 2, 0, 2]


def test_a_record_that_is_none_says_so() -> None:
    bad = NumberedRecord(1, 1, RecordInvalid("BROKEN_JSON", "The line is not JSON."))
    with pytest.raises(RecordInvalid, match="not JSON"):
        make_request(ORDER, bad)


@pytest.mark.parametrize("value", [{"prompt": "p", "chosen": "good", "rejected": "bad"}, {"query": "q", "relevant": [{"quote": "x"}]}])
def test_a_pair_or_a_query_in_a_mixed_file_is_no_prompt(value: dict[str, Any]) -> None:
    with pytest.raises(RecordInvalid) as refusal:
        make_request(ORDER, read(**value))
    assert refusal.value.code == "WRONG_RECORD_KIND"
