"""Artefacts in a bucket: whole or not there, every byte checked, copies kept within bounds. Against a real S3 protocol (moto's server)."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from server.domain.errors import InvalidInput
from server.storage.artefacts import MANIFEST_NAME, ArtefactInvalid, DiskFull
from server.storage.mirror import Mirror
from server.storage.objects import RemoteObjects, StorageUnavailable
from server.storage.remote import RemoteArtefactStore
from tests.remote_storage import overwrite

PATH = "default/models/mdl_1/job_1-1"
MANY = 1 << 30


def make_store(root: Path, objects: RemoteObjects, max_bytes: int = MANY) -> RemoteArtefactStore:
    root.mkdir(exist_ok=True)
    return RemoteArtefactStore(Mirror(root, objects, max_bytes))


@pytest.fixture
def store(tmp_path: Path, objects: RemoteObjects) -> RemoteArtefactStore:
    return make_store(tmp_path / "here", objects)


@pytest.fixture
def elsewhere(tmp_path: Path, objects: RemoteObjects) -> RemoteArtefactStore:
    """The same storage as another machine sees it, which has no copies yet."""
    return make_store(tmp_path / "elsewhere", objects)


def fill(directory: Path) -> Mapping[str, str]:
    (directory / "weights").write_bytes(b"0123456789")
    (directory / "nested").mkdir()
    (directory / "nested" / "config").write_text("{}")
    (directory / "empty").touch()
    return {"base_model": "some/model"}


def keys(objects: RemoteObjects) -> list[str]:
    return sorted(entry.key for entry in objects.list())


def test_what_one_machine_wrote_another_opens_whole(
    store: RemoteArtefactStore, elsewhere: RemoteArtefactStore, objects: RemoteObjects
) -> None:
    written = store.write(PATH, fill)
    assert keys(objects) == sorted(f"{PATH}/{name}" for name in ("weights", "nested/config", "empty", MANIFEST_NAME))
    opened = elsewhere.open(PATH, written.manifest_sha256)
    assert (opened.files, opened.description, opened.size_bytes) == (written.files, written.description, written.size_bytes)
    assert (opened.directory / "weights").read_bytes() == b"0123456789"
    assert opened.directory != written.directory
    assert elsewhere.read_manifest(PATH, written.manifest_sha256).description == {"base_model": "some/model"}


def test_a_copy_answers_when_the_storage_is_away(
    store: RemoteArtefactStore, elsewhere: RemoteArtefactStore, objects: RemoteObjects
) -> None:
    written = store.write(PATH, fill)
    elsewhere.open(PATH, written.manifest_sha256)
    objects.delete_tree(PATH)
    for machine in (store, elsewhere):
        assert machine.open(PATH, written.manifest_sha256).manifest_sha256 == written.manifest_sha256


def test_a_flipped_byte_in_the_bucket_is_found_and_named(
    store: RemoteArtefactStore, elsewhere: RemoteArtefactStore, objects: RemoteObjects
) -> None:
    written = store.write(PATH, fill)
    overwrite(objects, f"{PATH}/weights", b"0123456798")
    for _ in range(2):
        with pytest.raises(ArtefactInvalid, match="file weights is not the one"):
            elsewhere.open(PATH, written.manifest_sha256)
    with pytest.raises(ArtefactInvalid, match="file weights is not the one"):
        elsewhere.open_file(PATH, "weights", written.manifest_sha256)


def test_a_flipped_byte_in_the_copy_is_mended_from_the_bucket(store: RemoteArtefactStore) -> None:
    written = store.write(PATH, fill)
    (written.directory / "weights").write_bytes(b"0123456798")
    assert (store.open(PATH, written.manifest_sha256).directory / "weights").read_bytes() == b"0123456789"


@pytest.mark.parametrize("name", ["weights", MANIFEST_NAME])
def test_a_missing_object_is_found_and_named(
    store: RemoteArtefactStore, elsewhere: RemoteArtefactStore, objects: RemoteObjects, name: str
) -> None:
    written = store.write(PATH, fill)
    objects.delete([f"{PATH}/{name}"])
    with pytest.raises(ArtefactInvalid, match="weights is missing" if name == "weights" else "no readable manifest"):
        elsewhere.open(PATH, written.manifest_sha256)


def test_another_manifest_than_the_recorded_one_is_refused(
    store: RemoteArtefactStore, elsewhere: RemoteArtefactStore, objects: RemoteObjects
) -> None:
    written = store.write(PATH, fill)
    store.write("default/other", lambda directory: {})
    overwrite(objects, f"{PATH}/{MANIFEST_NAME}", objects.read(f"default/other/{MANIFEST_NAME}"))
    with pytest.raises(ArtefactInvalid, match="not the one that was recorded"):
        elsewhere.open(PATH, written.manifest_sha256)


def test_a_manifest_that_names_files_elsewhere_is_refused(elsewhere: RemoteArtefactStore, objects: RemoteObjects, tmp_path: Path) -> None:
    manifest = b'{"files": {"../../victim": {"sha256": "", "size_bytes": 1}}, "description": {}}'
    overwrite(objects, f"{PATH}/{MANIFEST_NAME}", manifest)
    overwrite(objects, f"{PATH}/../../victim", b"x")
    with pytest.raises(ArtefactInvalid, match="no readable manifest"):
        elsewhere.open(PATH)
    assert not list(tmp_path.rglob("victim"))


def test_one_file_is_fetched_without_the_others(store: RemoteArtefactStore, elsewhere: RemoteArtefactStore) -> None:
    written = store.write(PATH, fill)
    file = elsewhere.open_file(PATH, "nested/config", written.manifest_sha256)
    assert file.read_text() == "{}"
    assert not (file.parents[1] / "weights").exists()
    assert len(elsewhere.open(PATH, written.manifest_sha256).files) == 3
    with pytest.raises(ArtefactInvalid, match="no file other"):
        elsewhere.open_file(PATH, "other", written.manifest_sha256)


def test_a_second_write_leaves_nothing_of_the_first(store: RemoteArtefactStore, objects: RemoteObjects) -> None:
    store.write(PATH, fill)
    again = store.write(PATH, lambda directory: {"empty": True})
    assert keys(objects) == [f"{PATH}/{MANIFEST_NAME}"]
    assert store.open(PATH, again.manifest_sha256).files == {}


def test_an_upload_that_fails_leaves_no_artefact(
    store: RemoteArtefactStore, objects: RemoteObjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = RemoteObjects.upload

    def fail_at_weights(self: RemoteObjects, source: Path, key: str) -> None:
        if key.endswith("weights"):
            raise StorageUnavailable("gone")
        upload(self, source, key)

    monkeypatch.setattr(RemoteObjects, "upload", fail_at_weights)
    with pytest.raises(StorageUnavailable):
        store.write(PATH, fill)
    assert keys(objects) == []
    with pytest.raises(ArtefactInvalid):
        store.open(PATH)


KILLED = """
import os, sys
from pathlib import Path
from server.storage.mirror import Mirror
from server.storage.objects import RemoteObjects
from tests.storage.test_remote import PATH, fill, make_store
upload = RemoteObjects.upload
def upload_one(self, source, key):
    if key.endswith("manifest.json"):
        os.kill(os.getpid(), 9)
    upload(self, source, key)
RemoteObjects.upload = upload_one
make_store(Path(sys.argv[1]), RemoteObjects(sys.argv[2])).write(PATH, fill)
"""


def test_a_writer_killed_before_its_manifest_leaves_no_artefact_and_the_next_one_is_whole(
    store: RemoteArtefactStore, elsewhere: RemoteArtefactStore, objects: RemoteObjects, tmp_path: Path
) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "killed"), objects.url], timeout=60, check=False)
    assert killed.returncode == -9
    assert f"{PATH}/weights" in keys(objects)
    with pytest.raises(ArtefactInvalid, match="no readable manifest"):
        store.open(PATH)
    written = store.write(PATH, fill)
    assert elsewhere.open(PATH, written.manifest_sha256).files == written.files


def test_a_deleted_artefact_is_gone_everywhere_and_deleting_twice_is_harmless(store: RemoteArtefactStore, objects: RemoteObjects) -> None:
    store.write(PATH, fill)
    store.write(PATH + "0", fill)
    store.delete(PATH)
    store.delete(PATH)
    assert all(key.startswith(f"{PATH}0/") for key in keys(objects))
    with pytest.raises(ArtefactInvalid):
        store.open(PATH)


def test_copies_used_longest_ago_make_room_and_those_in_use_stay(
    store: RemoteArtefactStore, objects: RemoteObjects, tmp_path: Path
) -> None:
    paths = [f"default/models/mdl_1/job_{number}-1" for number in range(4)]
    seals = [store.write(path, fill).manifest_sha256 for path in paths]
    small = make_store(tmp_path / "small", objects, max_bytes=1)
    directories = [small.open(path, seal).directory for path, seal in zip(paths[:3], seals, strict=False)]
    log = tmp_path / "small" / "default/jobs/job_1/attempt-1.log"
    log.parent.mkdir(parents=True)
    log.touch()
    for age, directory in ((9_000, directories[0]), (5_000, directories[1])):
        os.utime(directory, (time.time() - age,) * 2)
    small.open(paths[3], seals[3])
    assert [directory.exists() for directory in directories] == [False, False, True]
    assert log.exists()


def test_a_full_disk_is_said_before_anything_is_fetched(
    store: RemoteArtefactStore, elsewhere: RemoteArtefactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = store.write(PATH, fill)
    monkeypatch.setattr("server.storage.artefacts.RESERVE_BYTES", 1 << 60)
    with pytest.raises(DiskFull):
        elsewhere.open(PATH, written.manifest_sha256)


def test_a_plain_file_is_copied_once(elsewhere: RemoteArtefactStore, objects: RemoteObjects) -> None:
    overwrite(objects, "default/datasets/ds_1/records.jsonl", b"{}\n")
    assert elsewhere.locate("default/datasets/ds_1/records.jsonl").read_bytes() == b"{}\n"
    objects.delete(["default/datasets/ds_1/records.jsonl"])
    assert elsewhere.locate("default/datasets/ds_1/records.jsonl").read_bytes() == b"{}\n"
    with pytest.raises(ArtefactInvalid, match=r"other\.jsonl is missing"):
        elsewhere.locate("default/datasets/ds_1/other.jsonl")
    with pytest.raises(InvalidInput):
        elsewhere.locate("../x")


def test_a_bucket_that_is_not_there_and_credentials_that_are_missing_are_told_apart(s3: pytest.MonkeyPatch, objects: RemoteObjects) -> None:
    objects.check()
    assert keys(objects) == []
    with pytest.raises(StorageUnavailable, match="does not exist"):
        RemoteObjects("s3://no-such-bucket/x").check()
    with s3.context() as patch:
        patch.delenv("AWS_ACCESS_KEY_ID")
        patch.delenv("AWS_SECRET_ACCESS_KEY")
        with pytest.raises(StorageUnavailable, match=r"no credentials for it .*AWS_ACCESS_KEY_ID"):
            RemoteObjects(objects.url).check()
