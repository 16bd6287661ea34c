"""Uploads in a bucket: whole or not there, read by another machine, removed everywhere."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from server.domain.errors import NotFound, ResourceExhausted
from server.storage.mirror import Mirror
from server.storage.objects import RemoteObjects, StorageUnavailable
from server.storage.remote_files import RemoteFiles

PATH = "default/datasets/ds_1/records.jsonl"


def make_files(root: Path, objects: RemoteObjects) -> RemoteFiles:
    root.mkdir(exist_ok=True)
    return RemoteFiles(Mirror(root, objects, 1 << 30))


async def pieces(*data: bytes) -> AsyncIterator[bytes]:
    for piece in data:
        yield piece


async def read_all(files: RemoteFiles, path: str) -> bytes:
    return (await files.fetch(path)).read_bytes()


async def test_what_one_machine_took_another_reads_until_it_is_deleted(tmp_path: Path, objects: RemoteObjects) -> None:
    here, elsewhere = make_files(tmp_path / "here", objects), make_files(tmp_path / "elsewhere", objects)
    stored = await here.write(PATH, pieces(b"on", b"e\ntwo"), 100)
    assert [(entry.key, entry.size_bytes) for entry in objects.list()] == [(PATH, stored.size_bytes)]
    assert await read_all(elsewhere, PATH) == await read_all(here, PATH) == b"one\ntwo"
    await elsewhere.delete_tree("default/datasets/ds_1")
    assert objects.list() == []
    with pytest.raises(NotFound):
        await read_all(elsewhere, PATH)


async def test_an_upload_that_is_refused_or_cannot_be_stored_leaves_nothing(
    tmp_path: Path, objects: RemoteObjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = make_files(tmp_path / "here", objects)
    with pytest.raises(ResourceExhausted, match="larger than 3 bytes"):
        await files.write(PATH, pieces(b"1234"), 3)

    def fail(self: RemoteObjects, source: Path, key: str) -> None:
        raise StorageUnavailable("gone")

    monkeypatch.setattr(RemoteObjects, "upload", fail)
    with pytest.raises(StorageUnavailable):
        await files.write(PATH, pieces(b"1234"), 100)
    assert objects.list() == []
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


async def test_a_path_out_of_the_storage_is_refused(tmp_path: Path, objects: RemoteObjects) -> None:
    with pytest.raises(ValueError, match="storage root"):
        await make_files(tmp_path / "here", objects).delete_tree("../x")
