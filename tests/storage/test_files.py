"""Files: streamed, bounded, whole or not at all, never outside the root."""

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from server.domain.errors import ResourceExhausted
from server.storage.files import LocalFiles


async def pieces(*data: bytes) -> AsyncIterator[bytes]:
    for piece in data:
        yield piece


async def read_all(files: LocalFiles, path: str) -> bytes:
    return (await files.fetch(path)).read_bytes()


async def test_what_is_written_is_read_back_whole(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    stored = await files.write("a/b.jsonl", pieces(b"one\r\ntw", b"o\n\nth", b"ree"), 100)
    content = b"one\r\ntwo\n\nthree"
    assert (stored.size_bytes, stored.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert await read_all(files, "a/b.jsonl") == content


async def test_an_upload_over_the_limit_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ResourceExhausted, match="larger than 10 bytes"):
        await LocalFiles(tmp_path).write("a/b", pieces(b"123456", b"789012"), 10)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


async def test_an_upload_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"some"
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        await LocalFiles(tmp_path).write("a/b", broken(), 100)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", "", "."])
async def test_a_path_out_of_the_root_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(ValueError, match="storage root"):
        await LocalFiles(tmp_path / "root").delete_tree(path)
