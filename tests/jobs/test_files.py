"""Files of jobs: what is deleted at the end, what a sweep takes, and what neither may touch."""

import os
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from server.domain.ids import JOB, MODEL, new_id
from server.domain.jobs import Checkpoint, Job, JobKind, JobState
from server.domain.specs import IndexSpec
from server.jobs.files import JobFiles
from server.services.job_queue import Claim, Lease

DAY = 24 * 3600.0


def _make_claim(epoch: int = 2) -> Claim:
    now = datetime.now(UTC)
    job = Job(new_id(JOB), JobKind.FINE_TUNE, new_id(MODEL), JobState.STARTING, IndexSpec("e"), now, now, attempt=epoch)
    return Claim(Lease("default", job.job_id, epoch), job, None)


def _put(root: Path, path: str, age_days: float = 0.0) -> Path:
    """Make a file, and it and its directories so old."""
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"x")
    moment = time.time() - age_days * DAY
    for place in (file, *file.parents):
        if root not in place.parents:
            break
        os.utime(place, (moment, moment))
    return file


@pytest.mark.parametrize("path", ["..", "../x", "a/../../x", "/etc/passwd", ""])
def test_nothing_outside_the_storage_is_deleted(tmp_path: Path, path: str) -> None:
    outside = _put(tmp_path, "x")
    root = tmp_path / "storage"
    root.mkdir()
    with pytest.raises(ValueError, match="does not lie"):
        JobFiles(root).delete(path)
    assert outside.exists()
    assert root.exists()


def test_results_of_this_and_earlier_attempts_go_those_of_later_ones_stay(tmp_path: Path) -> None:
    claim = _make_claim(epoch=2)
    model, job = f"default/models/{claim.job.model_id}", claim.job.job_id
    for name in (f"{job}-1", f"{job}-2", f"{job}-2.partial", f"{job}-3", f"{job}-10", f"{job}0-1", "job_other-1"):
        _put(tmp_path, f"{model}/{name}/weights")
    JobFiles(tmp_path).delete_results(claim, keep=None)
    assert sorted(p.name for p in (tmp_path / model).iterdir()) == sorted([f"{job}-3", f"{job}-10", f"{job}0-1", "job_other-1"])


def test_the_result_that_was_stored_is_kept(tmp_path: Path) -> None:
    claim = _make_claim(epoch=2)
    files = JobFiles(tmp_path)
    kept = _put(tmp_path, f"{files.artifact_path(claim)}/weights")
    _put(tmp_path, f"default/models/{claim.job.model_id}/{claim.job.job_id}-1/weights")
    files.delete_results(claim, keep=files.artifact_path(claim))
    assert [p.name for p in kept.parent.parent.iterdir()] == [f"{claim.job.job_id}-2"]


def test_a_finished_job_leaves_nothing_a_failed_one_its_logs_and_checkpoints(tmp_path: Path) -> None:
    claim, files = _make_claim(), JobFiles(tmp_path)
    for name in ("attempt-1.log", "attempt-1.log.old", "checkpoint-5-1/state", "documents-1.jsonl", "checkpoint-9-1.partial/state"):
        _put(tmp_path, f"{files.job_path(claim)}/{name}")
    files.delete_job(claim, for_retry=True)
    assert sorted(p.name for p in (tmp_path / files.job_path(claim)).iterdir()) == [
        "attempt-1.log",
        "attempt-1.log.old",
        "checkpoint-5-1",
    ]
    files.delete_job(claim, for_retry=False)
    assert not (tmp_path / files.job_path(claim)).exists()


def test_what_a_retry_has_gone_on_from_goes_with_it(tmp_path: Path) -> None:
    inherited = Checkpoint(5, "default/jobs/job_failed/checkpoint-5-1", 1, datetime.now(UTC))
    claim, files = replace(_make_claim(), checkpoint=inherited, checkpoints=[inherited]), JobFiles(tmp_path)
    kept = _put(tmp_path, "default/jobs/job_failed/attempt-1.log")
    saved = _put(tmp_path, f"{inherited.path}/state")
    files.delete_job(claim, for_retry=True)
    assert saved.exists()
    files.delete_job(claim, for_retry=False)
    assert not saved.parent.exists()
    assert kept.exists()


LIVE = {
    "default/jobs/job_held",
    "default/jobs/job_waiting/checkpoint-10-1",
    "default/models/mdl_a/job_a-1",
    "default/datasets/ds_a/records.jsonl",
    "default/documents/mdl_a/doc_a",
}


@pytest.mark.parametrize(
    "path",
    [
        "default/jobs/job_gone/checkpoint-5-1/state",
        "default/jobs/job_waiting/checkpoint-5-1/state",
        "default/documents/mdl_a/doc_gone",
        "default/documents/mdl_a/doc_a.partial",
        "default/models/mdl_a/job_b-1/weights",
        "default/models/mdl_x.partial/weights",
        "default/datasets/ds_x.partial",
    ],
)
def test_a_sweep_takes_what_is_old_and_belongs_to_nothing(tmp_path: Path, path: str) -> None:
    young = _put(tmp_path, path, age_days=0.9)
    assert JobFiles(tmp_path).sweep(LIVE) == []
    assert young.exists()
    _put(tmp_path, path, age_days=1.1)
    assert len(JobFiles(tmp_path).sweep(LIVE)) == 1
    assert not young.exists()


@pytest.mark.parametrize(
    "path",
    [
        "default/jobs/job_held/checkpoint-5-1/state",
        "default/jobs/job_held/documents-1.jsonl",
        "default/jobs/job_waiting/checkpoint-10-1/state",
        "default/models/mdl_a/job_a-1/weights",
        "default/datasets/ds_a/records.jsonl",
        "default/documents/mdl_a/doc_a",
        "default/documents/mdl_unknown/doc_z",
        # Of another database, perhaps.
        "default/models/mdl_unknown/job_z-1/weights",
        "default/datasets/ds_unknown/records.jsonl",
        "something/else",
        "file",
    ],
)
def test_a_sweep_spares_what_is_in_use_or_not_known(tmp_path: Path, path: str) -> None:
    kept = _put(tmp_path, path, age_days=100)
    assert JobFiles(tmp_path).sweep(LIVE) == []
    assert kept.exists()


def test_a_sweep_keeps_logs_of_failed_jobs_for_a_week(tmp_path: Path) -> None:
    _put(tmp_path, "default/jobs/job_failed/attempt-1.log", age_days=6.9)
    assert JobFiles(tmp_path).sweep(LIVE) == []
    _put(tmp_path, "default/jobs/job_failed/attempt-1.log", age_days=7.1)
    assert JobFiles(tmp_path).sweep(LIVE) == ["default/jobs/job_failed"]
