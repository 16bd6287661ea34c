"""Files of jobs in a bucket: removed at the end, and by the sweep where a crash left them, with the copies on this machine."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.jobs.files import JobFiles
from server.storage.objects import RemoteObjects
from tests.jobs.test_files import DAY, LIVE, _make_claim, _put
from tests.remote_storage import make_bucket, overwrite, run_s3


@pytest.fixture(scope="module")
def s3() -> Iterator[pytest.MonkeyPatch]:
    with run_s3() as environment:
        yield environment


@pytest.fixture
def objects(s3: pytest.MonkeyPatch) -> RemoteObjects:
    return RemoteObjects(make_bucket())


def keys(objects: RemoteObjects) -> list[str]:
    return sorted(entry.key for entry in objects.list())


def test_results_and_checkpoints_go_from_the_bucket_and_from_here(tmp_path: Path, objects: RemoteObjects) -> None:
    claim, files = _make_claim(epoch=2), JobFiles(tmp_path, objects)
    model, job = f"default/models/{claim.job.model_id}", claim.job.job_id
    for path in (f"{model}/{job}-1/w", f"{model}/{job}-2/w", f"{model}/{job}-3/w", f"default/jobs/{job}/checkpoint-5-2/state"):
        overwrite(objects, path, b"x")
        _put(tmp_path, path)
    files.delete_results(claim, keep=f"{model}/{job}-2")
    files.delete_job(claim, for_retry=False)
    assert keys(objects) == [f"{model}/{job}-2/w", f"{model}/{job}-3/w"]
    assert sorted(path.name for path in (tmp_path / model).iterdir()) == [f"{job}-2", f"{job}-3"]
    files.delete(f"{model}/{job}-2")
    assert keys(objects) == [f"{model}/{job}-3/w"]


def test_a_sweep_takes_old_orphans_from_the_bucket_and_spares_the_rest(objects: RemoteObjects, tmp_path: Path) -> None:
    orphans = [
        "default/jobs/job_gone/checkpoint-5-1/state",
        "default/jobs/job_waiting/checkpoint-5-1/state",
        "default/models/mdl_a/job_b-1/w",
    ]
    spared = [
        "default/jobs/job_waiting/checkpoint-10-1/state",
        "default/jobs/job_held/checkpoint-1-1/state",
        "default/models/mdl_a/job_a-1/w",
        "default/models/mdl_unknown/job_z-1/w",
        "default/datasets/ds_unknown/records.jsonl",
    ]
    for key in (*orphans, *spared):
        overwrite(objects, key, b"x")
    files = JobFiles(tmp_path, objects)
    assert files.sweep(LIVE, now=time.time() + 0.9 * DAY) == []
    assert len(files.sweep(LIVE, now=time.time() + 1.1 * DAY)) == len(orphans)
    assert keys(objects) == sorted(spared)


def test_a_bucket_that_is_away_keeps_nobody_from_clearing_up_here(tmp_path: Path, s3: pytest.MonkeyPatch) -> None:
    claim, files = _make_claim(), JobFiles(tmp_path, RemoteObjects("s3://no-such-bucket/x"))
    with s3.context() as patch:
        patch.delenv("AWS_ACCESS_KEY_ID")
        patch.delenv("AWS_SECRET_ACCESS_KEY")
        left = _put(tmp_path, f"{files.artifact_path(claim)}/w")
        files.delete_results(claim, keep=None)
        files.delete_job(claim, for_retry=False)
        files.delete("default/x")
    assert not left.exists()
