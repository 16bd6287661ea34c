"""Imports: only files below the roots are opened, whatever a URI, a link or a swap says."""

import json
import os
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from server.datafiles.importing import ImportRoot, ImportRoots
from server.domain.errors import FailedPrecondition, InvalidInput, NotFound, Unavailable
from server.storage.objects import open_filesystem
from tests.remote_storage import make_bucket, run_gs, run_s3


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
    roots = ImportRoots([ImportRoot.parse(bucket)], {"s3": {"config_kwargs": {"retries": {"max_attempts": 1}}}})
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


async def test_an_object_of_google_cloud_storage_is_read() -> None:
    with run_gs() as place:
        open_filesystem("gs").pipe_file(f"{place}/data/x.jsonl", b"remote" * 2_000_000)
        roots = ImportRoots([ImportRoot.parse(place)])
        assert await fetch(roots, f"{place}/data/x.jsonl") == (b"remote" * 2_000_000, 12_000_000)
        for uri, error in ((f"{place}/data/missing", NotFound), (f"{place}/data", InvalidInput), (f"{place}-other/x", InvalidInput)):
            with pytest.raises(error):
                await fetch(roots, uri)


class Hub(BaseHTTPRequestHandler):
    """A hub with one public and one gated dataset, each of one file, as the real one answers to readers."""

    data = b""

    def do_GET(self) -> None:
        known = "/somebody/data" in self.path
        if known and "/resolve/main/data/x.jsonl" in self.path:
            found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            first, last = (int(found[1]), int(found[2])) if found else (0, len(self.data) - 1)
            self.answer(206 if found else 200, self.data[first : last + 1])
        elif known and "/tree/main/data?" in self.path:
            self.answer(200, json.dumps([{"type": "file", "path": "data/x.jsonl", "size": len(self.data), "oid": "1" * 40}]).encode())
        elif known and "/tree/" in self.path:
            self.answer(200, json.dumps([{"type": "directory", "path": "data", "size": 0, "oid": "2" * 40}]).encode())
        elif known:
            self.answer(200, json.dumps({"id": "somebody/data", "sha": "1" * 40, "siblings": []}).encode())
        else:
            self.answer(403 if "/gated" in self.path else 404, b"{}", "GatedRepo" if "/gated" in self.path else "RepoNotFound")

    do_HEAD = do_GET  # noqa: N815 -- the base class looks for this name

    def answer(self, code: int, body: bytes, error: str = "") -> None:
        self.send_response(code)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), "ETag": '"1"', "X-Repo-Commit": "1" * 40}
        for name, value in {**headers, **({"X-Error-Code": error} if error else {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


async def test_a_dataset_of_the_hub_is_read_as_it_is_now(hub: str) -> None:
    owners = ("somebody/data", "somebody/gated", "nobody/none")
    roots = ImportRoots([ImportRoot.parse(f"hf://datasets/{name}") for name in owners], {"hf": {"token": None, "endpoint": hub}})
    for data in (b"first" * 3_000_000, b"second"):
        Hub.data = data
        assert await fetch(roots, "hf://datasets/somebody/data/data/x.jsonl") == (data, len(data))
    with pytest.raises(InvalidInput):
        await fetch(roots, "hf://datasets/somebody/data/data")
    with pytest.raises(InvalidInput):
        await fetch(roots, "hf://datasets/somebody/other/x.jsonl")
    with pytest.raises(NotFound):
        await fetch(roots, "hf://datasets/somebody/data/data/missing.jsonl")
    with pytest.raises(NotFound):
        await fetch(roots, "hf://datasets/nobody/none/x.jsonl")
    with pytest.raises(FailedPrecondition) as refusal:
        await fetch(roots, "hf://datasets/somebody/gated/x.jsonl")
    assert refusal.value.reason == "IMPORT_FORBIDDEN"


@pytest.mark.parametrize("text", ["s3://", "http://x/y", "relative", "s3:///x", "/a/../b", "memory://x/y"])
def test_a_senseless_root_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must"):
        ImportRoot.parse(text)
