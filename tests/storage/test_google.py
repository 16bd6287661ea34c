"""Artefacts in Google Cloud Storage: the same code as for S3, against a server that answers as Google's JSON API does."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from server.storage.artefacts import MANIFEST_NAME, ArtefactInvalid
from server.storage.mirror import Mirror
from server.storage.objects import RemoteObjects, StorageUnavailable
from server.storage.remote import RemoteArtefactStore
from tests.remote_storage import overwrite, run_gs

PATH = "default/models/mdl_1/job_1-1"
WEIGHTS = bytes(range(256)) * 50_000  # over the size from which an upload goes in parts


@pytest.fixture(scope="module")
def place() -> Iterator[str]:
    with run_gs() as url:
        yield url


@pytest.fixture
def objects(place: str, request: pytest.FixtureRequest) -> RemoteObjects:
    return RemoteObjects(f"{place}/{request.node.name}")


def make_store(root: Path, objects: RemoteObjects) -> RemoteArtefactStore:
    root.mkdir(exist_ok=True)
    return RemoteArtefactStore(Mirror(root, objects, 1 << 30))


def fill(directory: Path) -> Mapping[str, str]:
    (directory / "weights").write_bytes(WEIGHTS)
    (directory / "nested").mkdir()
    (directory / "nested" / "config").write_text("{}")
    (directory / "empty").touch()
    return {"base_model": "some/model"}


def test_what_one_machine_wrote_another_opens_whole_and_deletes(objects: RemoteObjects, tmp_path: Path) -> None:
    objects.check()
    written = make_store(tmp_path / "here", objects).write(PATH, fill)
    listed = {entry.key: entry.size_bytes for entry in objects.list()}
    assert listed.keys() == {f"{PATH}/{name}" for name in ("weights", "nested/config", "empty", MANIFEST_NAME)}
    assert listed[f"{PATH}/weights"] == len(WEIGHTS)
    assert all(entry.modified > 0 for entry in objects.list(PATH))
    elsewhere = make_store(tmp_path / "elsewhere", objects)
    opened = elsewhere.open(PATH, written.manifest_sha256)
    assert (opened.files, opened.description) == (written.files, written.description)
    assert (opened.directory / "weights").read_bytes() == WEIGHTS
    objects.delete_tree(PATH)
    assert objects.list() == []
    with pytest.raises(ArtefactInvalid):
        make_store(tmp_path / "third", objects).open(PATH, written.manifest_sha256)


def test_a_changed_object_is_found_and_named(objects: RemoteObjects, tmp_path: Path) -> None:
    written = make_store(tmp_path / "here", objects).write(PATH, fill)
    overwrite(objects, f"{PATH}/weights", WEIGHTS[:-1] + b"\x00")
    with pytest.raises(ArtefactInvalid, match="weights"):
        make_store(tmp_path / "elsewhere", objects).open(PATH, written.manifest_sha256)


def test_missing_objects_buckets_and_servers_are_told_apart(objects: RemoteObjects, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError):
        objects.read("missing")
    assert objects.list("missing") == []
    objects.delete(["missing"])
    with pytest.raises(StorageUnavailable, match="does not exist"):
        RemoteObjects("gs://no-such-bucket/x").check()
