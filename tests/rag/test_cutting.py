"""From a waiting document to its chunks: pages, headings, what was there before; a bad file is its document's own error."""

from pathlib import Path

import pytest

from server.domain.documents import DocumentFormat
from server.domain.errors import NotFound
from server.domain.orders import StagedDocument
from server.domain.retrieval import Chunk, Chunking
from server.rag.cutting import CutDocument, DocumentCutter, find_reused, parsed_from_content
from server.rag.embedding import Embedder
from server.rag.parsing.document import Limits
from server.rag.passages import write_passages
from tests.rag.conftest import MINILM
from tests.rag.parsing.drawn_pdfs import draw_pdf

CHUNKING = Chunking(20, 0)
GUIDE = (
    "# Guide\n\nWelcome to the ferry, dear guest, and stay.\n\n"
    "## Dogs\n\n### On deck\n\nThey travel aft, and pay nothing.\n\n## Bicycles\n\nTwo crowns."
)


def make_cutter(root: Path, embedder: Embedder, chunking: Chunking = CHUNKING, max_event_bytes: int = 10_000) -> DocumentCutter:
    return DocumentCutter(chunking, embedder.load(MINILM).tokenizer, root.joinpath, Limits(), 800, max_event_bytes)


def cut_file(root: Path, embedder: Embedder, data: bytes, known: tuple[str, ...] = ()) -> CutDocument:
    (root / "file").write_bytes(data)
    staged = StagedDocument("doc_1", path="file", revision=3, source_uri="https://example.org/a/Ferry%20guide.md", known_chunks=known)
    return make_cutter(root, embedder).cut(staged)


def test_a_chunk_says_under_which_headings_its_first_words_stand(tmp_path: Path, minilm: Embedder) -> None:
    cut = cut_file(tmp_path, minilm, GUIDE.encode())
    content = cut.reading.content
    assert content is not None
    assert (content.format, content.title, cut.reading.revision) == (DocumentFormat.MARKDOWN, "Guide", 3)
    assert all(content.text[chunk.char_start : chunk.char_end] == chunk.text for chunk in cut.chunks)
    paths = {chunk.text.split("\n")[0]: chunk.heading_path for chunk in cut.chunks}
    assert paths == {"# Guide": ("Guide",), "## Dogs": ("Guide", "Dogs", "On deck"), "## Bicycles": ("Guide", "Bicycles")}


def test_a_chunk_is_embedded_under_the_headings_that_it_does_not_begin_with(tmp_path: Path, minilm: Embedder) -> None:
    chunks = cut_file(tmp_path, minilm, GUIDE.encode()).chunks
    texts = write_passages(chunks, minilm.load(MINILM).tokenizer)
    assert [text.split("\n\n")[0] for text in texts] == ["# Guide", "Guide\n## Dogs", "Guide\n## Bicycles"]


def test_headings_never_push_a_text_out_of_what_the_model_reads(minilm: Embedder) -> None:
    tokenizer = minilm.load(MINILM).tokenizer
    text = "word " * (tokenizer.max_tokens - tokenizer.overhead_tokens - 4)
    chunks = [Chunk("c", 0, text, 0, 9, 9, None, ("far too long " * 10, "short")), Chunk("c", 1, "x", 0, 1, 1, None, ("y " * 200, "near"))]
    passages = write_passages(chunks, tokenizer)
    assert passages == [f"short\n{text}", "near\nx"]
    assert max(tokenizer.count_tokens(passages)) <= tokenizer.max_tokens


def test_pages_of_chunks_are_those_on_which_they_begin(tmp_path: Path, minilm: Embedder) -> None:
    lines = ["The ferry Halda leaves at seven, and comes back at nine.", "A ticket for bicycles costs two crowns on all of the boats."]
    cut = cut_file(tmp_path, minilm, draw_pdf([list(lines[0])], [list(lines[1])]))
    assert [chunk.page for chunk in cut.chunks] == [1, 2]
    assert cut.reading.content is not None
    parsed = parsed_from_content(cut.reading.content)
    assert [(page.number, parsed.text[page.char_start : page.char_end].strip()) for page in parsed.pages] == [(1, lines[0]), (2, lines[1])]


def test_chunks_that_were_there_are_known_again_once_each(tmp_path: Path, minilm: Embedder) -> None:
    first = cut_file(tmp_path, minilm, GUIDE.encode())
    known = tuple(chunk.content_hash for chunk in first.chunks)
    second = cut_file(tmp_path, minilm, GUIDE.replace("Two", "Three").encode(), known)
    assert list(second.reading.reused) == [0, 1]
    assert [chunk.text for chunk in second.new_chunks] == ["## Bicycles\n\nThree crowns."]
    moved = cut_file(tmp_path, minilm, GUIDE.replace("## Dogs", "## Cats").encode(), known)
    assert list(moved.reading.reused) == [0, 2]
    assert find_reused([*first.chunks, first.chunks[0]], known) == [0, 1, 2]


def test_a_bad_file_and_one_that_is_gone_are_errors_of_their_documents(tmp_path: Path, minilm: Embedder) -> None:
    cut = cut_file(tmp_path, minilm, b"\x89PNG\r\n\x1a\n")
    assert (cut.chunks, cut.reading.error_reason, cut.reading.revision) == ((), "DOCUMENT_UNSUPPORTED_FORMAT", 3)
    assert "PNG" in cut.error

    def fetch(path: str) -> Path:
        raise NotFound.of("file", path)

    cutter = DocumentCutter(Chunking(), minilm.load(MINILM).tokenizer, fetch, Limits(), 800, 10_000)
    assert "gone" in cutter.cut(StagedDocument("doc_1", path="x")).error


def test_a_text_stays_as_it_was_given(tmp_path: Path, minilm: Embedder) -> None:
    cut = make_cutter(tmp_path, minilm).cut(StagedDocument("doc_1", "T", "# No heading\n\nText."))
    assert (cut.reading.content, cut.chunks[0].heading_path) == (None, ())


@pytest.mark.parametrize("name", ["https://example.org/a/guide.txt", "guide.txt"])
def test_a_file_without_a_title_is_called_as_its_source(tmp_path: Path, minilm: Embedder, name: str) -> None:
    (tmp_path / "file").write_bytes(b"Plain words, and no title.")
    cut = make_cutter(tmp_path, minilm).cut(StagedDocument("doc_1", path="file", source_uri=name))
    assert cut.reading.content is not None
    assert cut.reading.content.title == "guide.txt"
