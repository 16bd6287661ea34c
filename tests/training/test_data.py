"""Reading datasets: what was accepted is trained, what cannot be is named by line."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from server.basemodels.loading import load_tokenizer
from server.basemodels.rendering import render_record
from server.domain.jobs import FailureReason, JobFailure
from server.domain.records import parse_record
from server.domain.specs import OverlongPolicy
from server.training.data import TokenizedRecords, check_records, read_records, split_held_out
from tests.tiny_models import build_tiny_causal_model
from tests.training.building import make_records, write_records


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return load_tokenizer(build_tiny_causal_model(tmp_path_factory.mktemp("model")))


def test_records_are_tokenised_as_they_are_rendered(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = write_records(tmp_path / "data.jsonl", [*make_records(3), {"prompt": "The river", "completion": " town"}])
    result = read_records(path, tokenizer, max_tokens=200)
    rendered = [render_record(tokenizer, parse_record(line)) for line in path.read_bytes().splitlines()]
    assert [result.records.token_ids(index).tolist() for index in range(4)] == [record.token_ids for record in rendered]
    assert [tuple(result.records.trained_mask(index)) for index in range(4)] == [record.trained_mask for record in rendered]


def test_bad_lines_are_left_out_and_named(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = write_records(tmp_path / "data.jsonl", make_records(1))
    path.write_bytes(path.read_bytes() + b'\n{"prompt": 1}\nnot json\n' + b'{"text": "' + b"x" * (5 << 20) + b'"}\n' + path.read_bytes())
    result = read_records(path, tokenizer, max_tokens=200)
    assert [(finding.line, finding.code) for finding in result.invalid] == [
        (3, "MISSING_FIELD"),
        (4, "BROKEN_JSON"),
        (5, "RECORD_TOO_LONG"),
    ]
    assert len(result.records) == 2


def test_overlong_records_are_refused_with_their_lines_unless_dropping_is_chosen(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = write_records(tmp_path / "data.jsonl", [*make_records(2), {"prompt": "map " * 100, "completion": "x"}])
    result = read_records(path, tokenizer, max_tokens=100)
    with pytest.raises(JobFailure, match=r"1 records have more than 100 tokens \(lines 3;") as failure:
        check_records(result, policy=OverlongPolicy.REJECT, max_tokens=100)
    assert failure.value.reason is FailureReason.DATASET_INVALID
    assert str(result.longest_tokens) in failure.value.suggestion
    check_records(result, policy=OverlongPolicy.DROP, max_tokens=100)
    assert len(result.records) == 2


def test_a_dataset_without_a_trainable_record_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    result = read_records(write_records(tmp_path / "data.jsonl", [{"prompt": 1}]), tokenizer, max_tokens=100)
    with pytest.raises(JobFailure, match="No record is left"):
        check_records(result, policy=OverlongPolicy.DROP, max_tokens=100)


def test_a_conversation_that_the_template_cannot_express_is_refused_by_line(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(build_tiny_causal_model(tmp_path / "mistral", "mistral"))
    records = [{"messages": [{"role": role, "content": "x"} for role in ("system", "user", "assistant")]}]
    result = read_records(write_records(tmp_path / "data.jsonl", records), tokenizer, max_tokens=100)
    with pytest.raises(JobFailure, match=r"lines 1\).*System role not supported"):
        check_records(result, policy=OverlongPolicy.REJECT, max_tokens=100)


def test_the_held_out_records_are_the_same_for_the_same_seed_and_never_trained() -> None:
    records = TokenizedRecords()
    for number in range(10):
        records.append([number, number], (False, True))

    def ids(part: TokenizedRecords) -> list[int]:
        return [int(part.token_ids(index)[0]) for index in range(len(part))]

    train, held_out = split_held_out(records, 0.25, seed=3)
    assert len(held_out) == 2
    assert sorted(ids(train) + ids(held_out)) == list(range(10))
    assert ids(split_held_out(records, 0.25, seed=3)[1]) == ids(held_out)
    assert {tuple(ids(split_held_out(records, 0.25, seed=seed)[1])) for seed in range(5)} != {tuple(ids(held_out))}
