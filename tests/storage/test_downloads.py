"""Downloads: every byte of the right file and no other, checked before it goes out; a deterministic archive."""

import io
import tarfile
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path

import pytest

from server.diskfiles import hash_file
from server.domain.errors import NotFound
from server.storage.artefacts import MANIFEST_NAME, Artefact, ArtefactInvalid, ArtefactStore
from server.storage.downloads import PIECE_BYTES, ArtefactDownloads

PATH = "default/models/mdl_1/job_1-1"
WEIGHTS = bytes(range(256)) * (PIECE_BYTES // 100)  # two and a half pieces


def fill(directory: Path) -> Mapping[str, str]:
    (directory / "weights").write_bytes(WEIGHTS)
    (directory / "nested").mkdir()
    (directory / "nested" / "config.json").write_text("{}")
    (directory / "empty").touch()
    return {}


@pytest.fixture
def store(tmp_path: Path) -> ArtefactStore:
    return ArtefactStore(tmp_path / "storage")


@pytest.fixture
def written(store: ArtefactStore) -> Artefact:
    return store.write(PATH, fill)


async def read(stream: AsyncGenerator[bytes, None]) -> list[bytes]:
    return [piece async for piece in stream]


async def test_the_files_are_listed_with_their_hashes_and_the_manifest(store: ArtefactStore, written: Artefact) -> None:
    files = await ArtefactDownloads(store).list_files(PATH, written.manifest_sha256)
    assert [file.path for file in files] == ["empty", MANIFEST_NAME, "nested/config.json", "weights"]
    for file in files:
        place = written.directory / file.path
        assert (file.size_bytes, file.sha256) == (place.stat().st_size, hash_file(place))


@pytest.mark.parametrize("name", ["weights", "nested/config.json", "empty", MANIFEST_NAME])
async def test_a_file_comes_whole_in_bounded_pieces(store: ArtefactStore, written: Artefact, name: str) -> None:
    pieces = await read(ArtefactDownloads(store).read_file(PATH, written.manifest_sha256, name))
    assert b"".join(pieces) == (written.directory / name).read_bytes()
    assert 1 <= len(pieces) <= 3
    assert max(map(len, pieces)) <= PIECE_BYTES


@pytest.mark.parametrize("name", ["other", "../job_1-1/weights", "nested/../weights", "/etc/passwd", "nested", ".", "weights/"])
async def test_a_name_that_is_not_listed_is_not_found(store: ArtefactStore, written: Artefact, name: str) -> None:
    with pytest.raises(NotFound):
        await read(ArtefactDownloads(store).read_file(PATH, written.manifest_sha256, name))


async def test_a_flipped_byte_is_named_before_any_byte_goes_out(store: ArtefactStore, written: Artefact) -> None:
    damaged = bytearray(WEIGHTS)
    damaged[-1] ^= 1
    (written.directory / "weights").write_bytes(damaged)
    downloads = ArtefactDownloads(store)
    for stream in (
        downloads.read_file(PATH, written.manifest_sha256, "weights"),
        downloads.read_archive(PATH, written.manifest_sha256, "x"),
    ):
        with pytest.raises(ArtefactInvalid, match="file weights is not the one"):
            await anext(stream)
    assert await read(downloads.read_file(PATH, written.manifest_sha256, "nested/config.json")) == [b"{}"]


async def test_the_archive_unpacks_to_the_same_files_and_is_the_same_each_time(store: ArtefactStore, tmp_path: Path) -> None:
    other = ArtefactStore(tmp_path / "other")
    archives = []
    for each in (store, other):
        written = each.write(PATH, fill)
        archives.append(b"".join(await read(ArtefactDownloads(each).read_archive(PATH, written.manifest_sha256, "mdl_1-1"))))
    assert archives[0] == archives[1]
    with tarfile.open(fileobj=io.BytesIO(archives[0])) as archive:
        archive.extractall(tmp_path / "out", filter="data")
        assert {entry.mtime for entry in archive} == {0}
    unpacked = tmp_path / "out" / "mdl_1-1"
    names = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    assert names == {"weights", "nested/config.json", "empty", MANIFEST_NAME}
    assert all((unpacked / name).read_bytes() == (written.directory / name).read_bytes() for name in names)
