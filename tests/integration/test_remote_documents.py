"""Documents' files in a bucket: stored by one machine, read by the index job of another, gone from both when nobody names them."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

from server.domain.orders import StagedDocument
from server.domain.retrieval import Chunking
from server.jobs.files import JobFiles
from server.rag.cutting import DocumentCutter
from server.rag.embedding import Embedder
from server.rag.parsing.document import Limits
from server.storage.mirror import Mirror
from server.storage.objects import RemoteObjects
from server.storage.remote_files import RemoteFiles
from tests.rag.tiny_encoders import build_tiny_xlm_roberta
from tests.remote_storage import make_bucket, run_s3

PATH = "default/documents/mdl_a/doc_a"


async def _give() -> AsyncIterator[bytes]:
    yield b"# Guide\n\nDogs travel aft."


def test_a_document_that_another_machine_has_stored_is_read(tmp_path: Path) -> None:
    tokenizer = Embedder({"tiny": build_tiny_xlm_roberta(tmp_path / "tiny")}.__getitem__).load("tiny").tokenizer
    with run_s3():
        objects = RemoteObjects(make_bucket())
        here, there = (RemoteFiles(Mirror(tmp_path / name, objects, 1 << 30)) for name in ("here", "there"))
        asyncio.run(here.write(PATH, _give(), 1_000))
        cutter = DocumentCutter(Chunking(64, 0), tokenizer, lambda path: asyncio.run(there.fetch(path)), Limits(), 800, 10_000)
        staged = StagedDocument("doc_a", path=PATH)
        cut = cutter.cut(staged)
        assert ("Dogs travel aft." in cut.chunks[0].text, cut.error) == (True, "")
        JobFiles(tmp_path / "there", objects).delete(PATH)
        assert "gone" in cutter.cut(staged).error
        assert list(objects.list()) == []
