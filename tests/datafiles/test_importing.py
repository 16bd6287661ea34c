"""Imports: only files below the roots are opened, whatever a URI, a link or a swap says."""

import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from server.datafiles.importing import ImportRoot, ImportRoots
from server.domain.errors import FailedPrecondition, InvalidInput, NotFound, Unavailable
from tests.remote_storage import make_bucket, run_s3


async def fetch(roots: ImportRoots, uri: str) -> tuple[bytes, int | None]:
    async with roots.open(uri) as source:
        return b"".join([piece async for piece in source.pieces]), source.size_bytes


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root" / "deep").mkdir(parents=True)
    (tmp_path / "root" / "deep" / "x.jsonl").write_bytes(b"inside")
    (tmp_path / "secret").write_bytes(b"outside")
    return tmp_path / "root"


@pytest.fixture
def roots(root: Path) -> ImportRoots:
    return ImportRoots([ImportRoot.parse(str(root))])


async def test_a_file_below_a_root_is_read(roots: ImportRoots, root: Path) -> None:
    assert await fetch(roots, f"file://{root}/deep/x.jsonl") == (b"inside", 6)


@pytest.mark.parametrize(
    "uri",
    [
        "file://{root}/../secret", "file://{root}/deep/../../secret", "file://{root}/./deep/x.jsonl", "file://{root}-other/x", "file://{root}",
        "file:///etc/passwd", "{root}/deep/x.jsonl", "file://host{root}/deep/x.jsonl", "http://127.0.0.1/x", "https://169.254.169.254/latest",
        "simplecache::file://{root}/deep/x.jsonl", "file://{root}/deep/x.jsonl::http://127.0.0.1/", "s3://bucket/x", "file://{root}/deep/*",
        "FILE://{root}/deep/x.jsonl", "file://{root}//deep/x.jsonl", "file://{root}/deep/x.jsonl?versionId=1", "file://{root}/deep", "",
    ],
)  # fmt: skip
async def test_any_other_uri_is_refused(roots: ImportRoots, root: Path, uri: str) -> None:
    with pytest.raises(InvalidInput) as refusal:
        await fetch(roots, uri.format(root=root))
    assert refusal.value.data.violations[0].field == "uri"


async def test_links_lead_out_of_a_root_for_nobody(roots: ImportRoots, root: Path) -> None:
    (root / "link").symlink_to(root.parent / "secret")
    (root / "directory").symlink_to(root.parent)
    (root / "fine").symlink_to(root / "deep" / "x.jsonl")
    os.mkfifo(root / "pipe")
    for name in ("link", "directory/secret", "pipe"):
        with pytest.raises(InvalidInput):
            await fetch(roots, f"file://{root}/{name}")
    assert (await fetch(roots, f"file://{root}/fine"))[0] == b"inside"
    with pytest.raises(NotFound):
        await fetch(roots, f"file://{root}/missing")


async def test_nothing_is_imported_where_no_root_is_set(root: Path) -> None:
    with pytest.raises(FailedPrecondition) as refusal:
        await fetch(ImportRoots([]), f"file://{root}/deep/x.jsonl")
    assert refusal.value.reason == "IMPORT_DISABLED"


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with run_s3():
        fsspec.filesystem("s3", skip_instance_cache=True)
        url = make_bucket()
        files = fsspec.filesystem("s3")
        files.pipe_file(f"{url}/data/x.jsonl", b"remote" * 1_000_000)
        files.pipe_file(f"{url}-other/x.jsonl", b"other")
        yield url


async def test_an_object_below_a_root_is_read_and_others_are_not(bucket: str) -> None:
    roots = ImportRoots([ImportRoot.parse(f"{bucket}/")])
    assert await fetch(roots, f"{bucket}/data/x.jsonl") == (b"remote" * 1_000_000, 6_000_000)
    for uri in (f"{bucket}-other/x.jsonl", bucket.rsplit("/", 1)[0] + "/x", f"{bucket}/data/../../x", f"{bucket}/data"):
        with pytest.raises(InvalidInput):
            await fetch(roots, uri)
    with pytest.raises(NotFound):
        await fetch(roots, f"{bucket}/data/missing")


async def test_missing_rights_and_an_unreachable_store_are_told_apart(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    roots = ImportRoots(
        [ImportRoot.parse(bucket)], {"s3": {"skip_instance_cache": True, "config_kwargs": {"retries": {"max_attempts": 1}}}}
    )
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        with pytest.raises(Unavailable):
            await fetch(roots, f"{bucket}/data/x.jsonl")
    with monkeypatch.context() as patch:
        patch.delenv("AWS_ACCESS_KEY_ID")
        patch.delenv("AWS_SECRET_ACCESS_KEY")
        with pytest.raises(FailedPrecondition) as refusal:
            await fetch(roots, f"{bucket}/data/x.jsonl")
        assert refusal.value.reason == "IMPORT_FORBIDDEN"


@pytest.mark.parametrize("text", ["s3://", "http://x/y", "relative", "s3:///x", "/a/../b", "memory://x/y"])
def test_a_senseless_root_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must"):
        ImportRoot.parse(text)
