"""Files: streamed, bounded, whole or not at all, never outside the root."""

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from server.domain.errors import ResourceExhausted
from server.domain.records import MAX_RECORD_BYTES
from server.storage.files import LocalFiles


async def pieces(*data: bytes) -> AsyncIterator[bytes]:
    for piece in data:
        yield piece


async def read_all(files: LocalFiles, path: str) -> list[bytes]:
    return [line async for lines in files.read_lines(path) for line in lines]


async def test_what_is_written_is_read_back_line_by_line_over_piece_borders(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    stored = await files.write("a/b.jsonl", pieces(b"one\r\ntw", b"o\n\nth", b"ree"), 100)
    content = b"one\r\ntwo\n\nthree"
    assert (stored.size_bytes, stored.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert await read_all(files, "a/b.jsonl") == [b"one", b"two", b"", b"three"]


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


async def test_an_endless_line_is_cut_but_still_seen_to_be_too_long(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"a" * (3 * MAX_RECORD_BYTES) + b"\nb")
    lines = await read_all(LocalFiles(tmp_path), "x")
    assert [len(line) for line in lines] == [MAX_RECORD_BYTES + 1, 1]


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", "", "."])
async def test_a_path_out_of_the_root_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(ValueError, match="storage root"):
        await LocalFiles(tmp_path / "root").delete_tree(path)
