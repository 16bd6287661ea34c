"""Many follow one job: each sees the whole log in order, from wherever it begins, and the end."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.integration.jobs import TrainingJobs

# Several starts of a child, each of which imports torch; much slower beside other work.
pytestmark = pytest.mark.timeout(900)

WATCHERS = 20
STEPS = 80


def _assert_in_order(events: Sequence[dict[str, Any]], after: int) -> None:
    sequences = [event["sequence"] for event in events if event["sequence"]]
    logged = [event for event in events if not event.keys() & {"snapshot", "heartbeat", "finished"}]
    assert sequences == sorted(sequences)
    assert all(event["sequence"] > after for event in logged)
    seen = [event["step"] for event in logged if "step" in event]
    assert seen
    # Steps may come coalesced, each telling how many it stands for; together they are all.
    assert seen[-1]["step"] == STEPS
    assert "finished" in events[-1]
    assert events[-1]["finished"]["job"]["state"] == "STATE_SUCCEEDED"


def test_many_watchers_each_see_all_of_it(jobs: TrainingJobs) -> None:
    job_id = jobs.create_job(STEPS)
    with ThreadPoolExecutor(WATCHERS) as pool:
        streams = list(pool.map(lambda _: list(jobs.watch(job_id)), range(WATCHERS)))
    for events in streams:
        _assert_in_order(events, after=0)
        states = [event["state_changed"]["to_state"] for event in events if "state_changed" in event]
        assert states[-4:] == ["STATE_STARTING", "STATE_RUNNING", "STATE_FINALIZING", "STATE_SUCCEEDED"]


def test_a_watcher_takes_up_where_it_left_off(jobs: TrainingJobs) -> None:
    job_id = jobs.create_job(STEPS)
    before: list[dict[str, Any]] = []
    for event in jobs.watch(job_id):
        before.append(event)
        if event.get("step", {}).get("step", 0) >= 20:
            break
    last = before[-1]["sequence"]
    _assert_in_order(list(jobs.watch(job_id, last)), after=last)


def test_a_finished_job_is_replayed(jobs: TrainingJobs) -> None:
    job_id = jobs.create_job(STEPS)
    jobs.wait_for_end(job_id)
    _assert_in_order(list(jobs.watch(job_id)), after=0)
