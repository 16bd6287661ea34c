"""The order of records is a function of seed and step; every record is trained equally often."""

from collections import Counter

import pytest

from server.datafiles.tokens import TokenizedRecords
from server.domain.specs import Scheduler
from server.training.batches import BatchPlan, make_micro_batch, split_micro_batches
from server.training.schedule import learning_rate


def plan(epochs: float = 2.0, max_steps: int | None = None, seed: int = 0) -> BatchPlan:
    return BatchPlan.of(10, batch_size=4, epochs=epochs, max_steps=max_steps, seed=seed)


def test_every_record_is_trained_once_an_epoch_and_the_last_step_may_be_smaller() -> None:
    whole = plan(epochs=3.0)
    steps = [whole.records_of_step(step) for step in range(whole.total_steps)]
    assert [len(step) for step in steps] == [4] * 7 + [2]
    assert set(Counter(index for step in steps for index in step).values()) == {3}
    assert sorted(index for step in steps[:2] for index in step) + sorted(steps[2][:2]) != list(range(10))
    assert sorted([*steps[0], *steps[1], *steps[2][:2]]) == list(range(10))


def test_the_order_depends_on_seed_epoch_and_nothing_else() -> None:
    assert [plan().records_of_step(step) for step in (3, 1, 3)] == [plan().records_of_step(step) for step in (3, 1, 3)]
    assert plan(seed=1).records_of_step(0) != plan(seed=2).records_of_step(0)
    epochs = BatchPlan.of(10, batch_size=10, epochs=2.0, max_steps=None, seed=0)
    assert epochs.records_of_step(0) != epochs.records_of_step(1)


def test_max_steps_rules_over_epochs() -> None:
    limited = plan(epochs=100.0, max_steps=3)
    assert limited.total_steps == 3
    assert len(limited.records_of_step(2)) == 4
    assert limited.epoch_after_step(3) == pytest.approx(1.2)


def make_records(lengths: list[int]) -> TokenizedRecords:
    records = TokenizedRecords()
    for number, length in enumerate(lengths):
        records.append([number + 1] * length, tuple(place >= length - 2 for place in range(length)))
    return records


def test_micro_batches_hold_each_record_once_within_the_limit_longest_first() -> None:
    records = make_records([5, 30, 12, 7, 50, 11])
    groups = list(split_micro_batches(records, range(6), 32))
    assert groups == [[4], [1], [2, 5], [3, 0]]


def test_records_lie_end_to_end_with_their_own_positions_and_targets() -> None:
    batch = make_micro_batch(make_records([3, 4]), [0, 1])
    assert batch.token_ids.tolist() == [1, 1, 1, 2, 2, 2, 2]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert batch.lengths == (3, 4)
    assert batch.predictors.tolist() == [0, 1, 4, 5]
    assert batch.targets.tolist() == [1, 1, 2, 2]


def test_a_records_first_token_is_never_predicted_from_the_record_before() -> None:
    records = TokenizedRecords()
    records.append([1, 2], (True, True))
    records.append([3, 4], (True, True))
    assert make_micro_batch(records, [0, 1]).predictors.tolist() == [0, 2]


@pytest.mark.parametrize("scheduler", list(Scheduler))
def test_the_rate_warms_up_to_its_peak_and_then_follows_the_schedule(scheduler: Scheduler) -> None:
    rates = [learning_rate(step, total_steps=20, peak=1.0, warmup_steps=4, scheduler=scheduler) for step in range(20)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[12] == pytest.approx(1.0 if scheduler is Scheduler.CONSTANT else 0.5)
    assert rates[19] > 0.0
