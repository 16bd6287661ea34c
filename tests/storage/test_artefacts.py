"""Artefacts: whole or not there, every byte checked, never outside the root."""

import errno
import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from server.domain.errors import InvalidInput
from server.storage.artefacts import MANIFEST_NAME, ArtefactInvalid, ArtefactStore, DiskFull

PATH = "default/models/mdl_1/job_1-1"


@pytest.fixture
def store(tmp_path: Path) -> ArtefactStore:
    return ArtefactStore(tmp_path / "storage")


def fill(directory: Path) -> Mapping[str, str]:
    (directory / "weights").write_bytes(b"0123456789")
    (directory / "nested").mkdir()
    (directory / "nested" / "config").write_text("{}")
    return {"base_model": "some/model"}


def test_what_was_written_opens_with_its_description_and_seal(store: ArtefactStore) -> None:
    written = store.write(PATH, fill)
    opened = store.open(PATH, written.manifest_sha256)
    assert opened == written
    assert opened.description == {"base_model": "some/model"}
    assert set(opened.files) == {"weights", "nested/config"}
    assert opened.size_bytes == 12 + (opened.directory / MANIFEST_NAME).stat().st_size


def test_a_flipped_byte_is_found_and_named(store: ArtefactStore) -> None:
    directory = store.write(PATH, fill).directory
    (directory / "weights").write_bytes(b"0123456798")
    with pytest.raises(ArtefactInvalid, match="file weights is not"):
        store.open(PATH)


def test_a_missing_a_foreign_and_a_linked_file_are_found_and_named(store: ArtefactStore, tmp_path: Path) -> None:
    directory = store.write(PATH, fill).directory
    (directory / "extra").touch()
    with pytest.raises(ArtefactInvalid, match="extra"):
        store.open(PATH)
    (directory / "extra").unlink()
    (directory / "weights").rename(tmp_path / "weights")
    with pytest.raises(ArtefactInvalid, match="weights is missing"):
        store.open(PATH)
    (directory / "weights").symlink_to(tmp_path / "weights")
    with pytest.raises(ArtefactInvalid, match="weights is missing"):
        store.open(PATH)


def test_a_manifest_written_anew_does_not_fit_its_recorded_seal(store: ArtefactStore) -> None:
    written = store.write(PATH, fill)
    manifest = written.directory / MANIFEST_NAME
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "description": {"base_model": "other/model"}}))
    with pytest.raises(ArtefactInvalid, match="not the one that was recorded"):
        store.open(PATH, written.manifest_sha256)


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"files": 1, "description": {}}'])
def test_a_manifest_that_is_none_is_refused(store: ArtefactStore, manifest: str) -> None:
    directory = store.write(PATH, fill).directory
    (directory / MANIFEST_NAME).write_text(manifest)
    with pytest.raises(ArtefactInvalid, match="no readable manifest"):
        store.open(PATH)


def test_a_write_that_breaks_off_leaves_nothing_and_keeps_what_was_there(store: ArtefactStore) -> None:
    written = store.write(PATH, fill)

    def break_off(directory: Path) -> Mapping[str, str]:
        (directory / "weights").write_bytes(b"half")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        store.write(PATH, break_off)
    assert store.open(PATH, written.manifest_sha256) == written
    assert [path.name for path in written.directory.parent.iterdir()] == [written.directory.name]


def test_a_full_disk_is_a_typed_failure(store: ArtefactStore) -> None:
    def run_out(directory: Path) -> Mapping[str, str]:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DiskFull):
        store.write(PATH, run_out)
    with pytest.raises(DiskFull, match="MiB are needed"):
        store.require_space(1 << 60)
    store.require_space(1)


def test_a_second_write_replaces_the_first(store: ArtefactStore) -> None:
    store.write(PATH, fill)

    def fill_otherwise(directory: Path) -> Mapping[str, str]:
        (directory / "other").touch()
        return {}

    assert set(store.write(PATH, fill_otherwise).files) == {"other"}


def test_a_deleted_artefact_is_gone_and_deleting_twice_is_harmless(store: ArtefactStore) -> None:
    directory = store.write(PATH, fill).directory
    store.delete(PATH)
    store.delete(PATH)
    assert list(directory.parent.iterdir()) == []
    with pytest.raises(ArtefactInvalid):
        store.open(PATH)


@pytest.mark.parametrize("path", ["", ".", "..", "/etc", "../x", "a/../../x", "a/.hidden", "a\0b"])
def test_a_path_out_of_the_root_is_refused(store: ArtefactStore, path: str) -> None:
    for act in (store.open, store.delete, store.locate):
        with pytest.raises(InvalidInput):
            act(path)


def test_a_link_out_of_the_root_is_not_followed(store: ArtefactStore, tmp_path: Path) -> None:
    (tmp_path / "storage").mkdir()
    (tmp_path / "storage" / "link").symlink_to(tmp_path)
    with pytest.raises(InvalidInput):
        store.delete("link/victim")
