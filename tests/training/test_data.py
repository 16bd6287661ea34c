"""What a job trains on: read, refused with counts and lines, split, kept, and told of in events."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from server.basemodels.loading import load_tokenizer
from server.datafiles.tokencache import TokenCache
from server.datafiles.tokens import TokenizedRecords
from server.diskfiles import hash_file
from server.domain.datasets import DatasetFormat, RecordKind
from server.domain.events import ChildEvent, DataChecked, Preparing
from server.domain.jobs import FailureReason, JobFailure
from server.domain.orders import DatasetFile, FineTuneOrder
from server.domain.specs import FineTuneSpec, LossOn, Objective, OverlongPolicy
from server.domain.techniques import LoraTechnique
from server.training.data import TrainingData, read_training_data, split_held_out, start_reading
from tests.tiny_models import build_tiny_causal_model
from tests.training.building import make_parameters, make_records, write_records

Read = Callable[..., tuple[TrainingData, list[ChildEvent]]]
LONG = {"prompt": "map " * 100, "completion": "x"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return load_tokenizer(build_tiny_causal_model(tmp_path_factory.mktemp("model")))


def describe(path: Path, count: int) -> DatasetFile:
    return DatasetFile(path.name, hash_file(path), DatasetFormat.JSONL, RecordKind.MIXED, count)


def make_order(path: Path, count: int, eval_path: Path | None = None, eval_fraction: float = 0.0, **parameters: object) -> FineTuneOrder:
    settings = replace(make_parameters(), max_sequence_tokens=100, **parameters)  # type: ignore[arg-type]  # checked by replace
    spec = FineTuneSpec("base", "ds_1", "0" * 64, LoraTechnique(), settings, eval_fraction=eval_fraction)
    evaluation = describe(eval_path, 1) if eval_path else None
    return FineTuneOrder("job_1", 1, spec, describe(path, count), "jobs", "models", eval_dataset=evaluation)


@pytest.fixture
def read(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Read:
    def read(
        records: list[object],
        *,
        cache: TokenCache | None = None,
        max_tokens: int = 512,
        evaluation: list[object] | None = None,
        **more: object,
    ) -> tuple[TrainingData, list[ChildEvent]]:
        path = write_records(tmp_path / "data.jsonl", records)
        eval_path = write_records(tmp_path / "eval.jsonl", evaluation) if evaluation else None
        order = make_order(path, len(records), eval_path, **more)  # type: ignore[arg-type]  # of parameters
        events: list[ChildEvent] = []
        data = read_training_data(order, lambda name: tmp_path / name, cache, tokenizer, max_tokens, events.append, lambda: None)
        return data, events

    return read


def checked(events: list[ChildEvent]) -> DataChecked:
    (found,) = [event for event in events if isinstance(event, DataChecked)]
    return found


def test_records_of_every_form_are_trained_and_counted(read: Read) -> None:
    data, events = read([*make_records(2), {"prompt": "a", "completion": "b"}, {"text": "The river."}, {"instruction": "q", "output": "r"}])
    assert len(data.train) == 5
    found = checked(events)
    assert (found.train_sequences, found.eval_sequences, found.tokens) == (5, 0, data.train.token_count)
    assert found.trained_tokens == sum(int(data.train.trained_mask(index).sum()) for index in range(5))
    assert sum(bucket.count for bucket in found.lengths) == 5
    assert not any(data.train.trained_mask(index)[0] for index in range(5))
    progress = [event for event in events if isinstance(event, Preparing)]
    assert (progress[0].records, progress[-1].records, progress[-1].tokens) == (0, 5, data.train.token_count)


def test_values_that_are_no_records_are_left_out_counted_and_never_stop_a_job(read: Read) -> None:
    data, events = read([*make_records(1), {"prompt": 1}, [], []])
    assert len(data.train) == 1
    found = checked(events)
    assert found.dropped_records == 3
    assert [(finding.code, finding.count, finding.line) for finding in found.findings] == [("NOT_AN_OBJECT", 2, 3), ("MISSING_FIELD", 1, 2)]


def test_overlong_records_are_refused_with_their_lines_unless_dropping_is_chosen(read: Read) -> None:
    with pytest.raises(JobFailure, match=r"1 records have more than 100 tokens \(lines 3; the longest has (\d+)\)") as failure:
        read([*make_records(2), LONG])
    assert failure.value.reason is FailureReason.DATASET_INVALID
    assert "Raise max_sequence_tokens to " in failure.value.suggestion
    data, events = read([*make_records(2), LONG], overlong_policy=OverlongPolicy.DROP)
    assert (len(data.train), checked(events).dropped_records) == (2, 1)
    assert max(bucket.up_to_tokens for bucket in checked(events).lengths) >= 128


def test_the_context_of_the_model_is_a_limit_too(read: Read) -> None:
    with pytest.raises(JobFailure, match="more than 20 tokens"):
        read(list(make_records(2)), max_tokens=20)


def test_a_dataset_without_a_trainable_record_is_refused(read: Read) -> None:
    with pytest.raises(JobFailure, match="No record is left"):
        read([{"prompt": 1}])
    with pytest.raises(JobFailure, match="No record is left to train on: all have more than 100 tokens"):
        read([LONG], overlong_policy=OverlongPolicy.DROP)
    silent = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]}
    with pytest.raises(JobFailure, match=r"2 records cannot be trained \(lines 2, 3\): NO_TRAINABLE_TOKEN"):
        read([*make_records(1), silent, silent])


def test_a_conversation_that_the_template_cannot_express_is_refused_by_line(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(build_tiny_causal_model(tmp_path / "mistral", "mistral"))
    path = write_records(tmp_path / "x.jsonl", [{"messages": [{"role": role, "content": "x"} for role in ("system", "user", "assistant")]}])
    with pytest.raises(JobFailure, match=r"lines 1\).*System role not supported"):
        read_training_data(make_order(path, 1), lambda name: tmp_path / name, None, tokenizer, 512, lambda _: None, lambda: None)


def test_pairs_give_two_sequences_and_are_for_preference_objectives_only(read: Read) -> None:
    pair = {"prompt": "Who?", "chosen": " The keeper.", "rejected": " Nobody."}
    data, _ = read([pair, pair], objective=Objective.DPO)
    assert (len(data.train), data.train.sequences_per_record, data.train.sequence_count) == (2, 2, 4)
    assert data.train.token_ids(0)[: data.train.trained_mask(0).argmax()].tolist() == (
        data.train.token_ids(1)[: data.train.trained_mask(1).argmax()].tolist()
    )
    for records, objective in (([pair], Objective.SUPERVISED), (make_records(1), Objective.ORPO)):
        with pytest.raises(JobFailure, match="WRONG_RECORD_KIND"):
            read(list(records), objective=objective)


def test_records_that_are_trained_and_evaluated_are_counted_and_the_first_is_named(read: Read, tmp_path: Path) -> None:
    cache = TokenCache(tmp_path / "cache", 1 << 30)
    for is_cached in (False, True):
        _, events = read(list(make_records(4)), evaluation=[{"prompt": "new", "completion": "one"}, *make_records(1)], cache=cache)
        (found,) = [finding for finding in checked(events).findings if finding.code == "TRAIN_EVAL_OVERLAP"]
        assert (found.line, found.count, checked(events).cached) == (2, 1, is_cached)
    _, events = read(list(make_records(1)) * 8, eval_fraction=0.25)
    assert [finding.count for finding in checked(events).findings if finding.code == "TRAIN_EVAL_OVERLAP"] == [2]


def test_tokens_are_kept_by_content_and_computed_again_when_anything_changes(read: Read, tmp_path: Path) -> None:
    cache = TokenCache(tmp_path / "cache", 1 << 30)
    first, events = read([*make_records(3), LONG], cache=cache, overlong_policy=OverlongPolicy.DROP)
    assert not checked(events).cached
    again, events = read([*make_records(3), LONG], cache=cache, overlong_policy=OverlongPolicy.DROP)
    assert checked(events).cached
    assert checked(events).findings[0].code == "OVERLONG"
    for index in range(3):
        assert again.train.token_ids(index).tolist() == first.train.token_ids(index).tolist()
        assert again.train.weights(index).tolist() == first.train.weights(index).tolist()
    for change in (
        {"overlong_policy": OverlongPolicy.TRUNCATE_PROMPT_LEFT},
        {"loss_on": LossOn.ALL, "overlong_policy": OverlongPolicy.DROP},
    ):
        assert not checked(read([*make_records(3), LONG], cache=cache, **change)[1]).cached
    assert not checked(read(list(make_records(3)), cache=cache)[1]).cached


def test_a_damaged_entry_is_not_believed_and_the_oldest_goes_first(read: Read, tmp_path: Path) -> None:
    cache = TokenCache(tmp_path / "cache", 1 << 30)
    first, _ = read(list(make_records(3)), cache=cache)
    (entry,) = (tmp_path / "cache").iterdir()
    data = bytearray(entry.read_bytes())
    data[-5] ^= 1
    entry.write_bytes(data)
    again, events = read(list(make_records(3)), cache=cache)
    assert not checked(events).cached
    assert again.train.weights(2).tolist() == first.train.weights(2).tolist()
    small = TokenCache(tmp_path / "cache", entry.stat().st_size + 10)
    read(list(make_records(2)), cache=small)
    assert [path.name for path in (tmp_path / "cache").iterdir()] != [entry.name]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_file_that_is_not_the_one_that_was_uploaded_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    order = make_order(write_records(tmp_path / "x.jsonl", make_records(2)), 2)
    write_records(tmp_path / "x.jsonl", make_records(3))
    with pytest.raises(JobFailure, match="not those that were uploaded"):
        read_training_data(order, lambda name: tmp_path / name, None, tokenizer, 512, lambda _: None, lambda: None)


def test_a_reading_runs_ahead_and_gives_what_it_raised_where_it_is_asked(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    order = make_order(write_records(tmp_path / "x.jsonl", make_records(2)), 2)

    def stop() -> None:
        raise KeyboardInterrupt

    arguments = (order, lambda name: tmp_path / name, None, tokenizer, 512, lambda _: None)
    assert len(start_reading(*arguments, lambda: None).result().train) == 2
    with pytest.raises(KeyboardInterrupt):
        start_reading(*arguments, stop).result()


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
