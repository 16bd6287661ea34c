"""Formats of text: told apart by content, decoded with care, structure kept, offsets exact."""

import json

import pytest

from server.domain.documents import DocumentFormat
from server.domain.retrieval import Chunking
from server.rag.chunking import cut_text
from server.rag.parsing.document import DocumentInvalid, Fault, Limits, ParsedDocument
from server.rag.parsing.formats import find_text_format
from server.rag.parsing.reading import read_document
from tests.rag.test_chunking import WordTokenizer

ARABIC = "تأسست المكتبة في عام ١٩٢٠، وهي من أقدم المكتبات في المدينة. هل زرتها؟"
FRENCH = "Le café où nous étions était fermé cet été à cause du réaménagement."
RUSSIAN = "Библиотека была основана в тысяча восемьсот семьдесят четвёртом году."


def read(content: str | bytes) -> ParsedDocument:
    return read_document(content if isinstance(content, bytes) else content.encode(), Limits())


def find_fault(content: str | bytes) -> Fault:
    with pytest.raises(DocumentInvalid) as refused:
        read(content)
    return refused.value.fault


def get_codes(document: ParsedDocument) -> list[str]:
    return [warning.code for warning in document.warnings]


def check_headings(document: ParsedDocument) -> None:
    for heading in document.headings:
        line = document.text[heading.char_start :].split("\n")[0]
        assert heading.path[-1] in line


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("text", [ARABIC, FRENCH, RUSSIAN, "مرحبا", "Hi"])
def test_unicode_texts_are_read_in_each_encoding_without_a_warning(text: str, encoding: str) -> None:
    document = read(text.encode(encoding))
    assert document.text == text
    assert document.warnings == ()


@pytest.mark.parametrize(("text", "encoding"), [(ARABIC.replace("١٩٢٠", "1920"), "cp1256"), (FRENCH, "cp1252")])
def test_windows_texts_are_read_with_a_warning(text: str, encoding: str) -> None:
    document = read(text.encode(encoding))
    assert document.text == text
    assert get_codes(document) == ["ENCODING_GUESSED"]
    assert encoding in document.warnings[0].message


def test_arabic_of_the_iso_code_page_is_not_taken_for_the_windows_one() -> None:
    text = ARABIC.replace("١٩٢٠", "1920")
    assert read(text.encode("iso8859_6")).text == text


@pytest.mark.parametrize(
    "content", [RUSSIAN.encode("cp1251"), "図書館は駅の近くにあります。".encode("euc_jp"), "ظغصض ثجحخ ذرزس".encode("cp1256")]
)
def test_an_encoding_that_nothing_speaks_for_is_refused_not_guessed(content: bytes) -> None:
    assert find_fault(content) is Fault.UNKNOWN_ENCODING


def test_html_is_read_in_the_encoding_that_it_declares() -> None:
    page = f'<html><head><meta charset="windows-1251"><title>Т</title></head><body><p>{RUSSIAN}</p></body></html>'
    document = read(page.encode("cp1251"))
    assert document.text == RUSSIAN
    assert document.title == "Т"


@pytest.mark.parametrize(
    "content",
    [b"words \x00 and words", b"words \xed\xa0\x80", b"\xff\xfe" + b"a\x00\x00\xd8b\x00", b'{"a": "x\\ud800"}', b'{"a": "x\\u0000"}'],
)
def test_nul_and_lone_surrogates_are_refused(content: bytes) -> None:
    assert find_fault(content) is Fault.BAD_CHARACTERS


@pytest.mark.parametrize("content", [b"", b" \n\t ", b"\xef\xbb\xbf", b"\xff\xfe", "\ufeff \n".encode(), b"<html><body></body></html>"])
def test_files_without_text_are_empty(content: bytes) -> None:
    assert find_fault(content) is Fault.EMPTY


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<!DOCTYPE html><html><body>x</body></html>", DocumentFormat.HTML),
        ("<?xml version='1.0'?>\n<!-- a --><!-- b --><html xmlns='x'>", DocumentFormat.HTML),
        ("  <div class='a'>x</div>", DocumentFormat.HTML),
        ("<3 is a heart, and a < b", DocumentFormat.PLAIN_TEXT),
        ("# Heading\n\ntext", DocumentFormat.MARKDOWN),
        ("---\ntitle: T\n---\n# Heading", DocumentFormat.MARKDOWN),
        ("Heading\n=======\n\ntext", DocumentFormat.MARKDOWN),
        ("text\n\n```python\nx\n```\n", DocumentFormat.MARKDOWN),
        ("| a | b |\n|---|---|\n| 1 | 2 |", DocumentFormat.MARKDOWN),
        ("See [the site](https://example.org).", DocumentFormat.MARKDOWN),
        ("a,b,c\n1,2,3\n", DocumentFormat.CSV),
        ("الاسم;العمر\nأحمد;٣٠\nسعاد;٢٥", DocumentFormat.CSV),
        ("a\tb\n1\t2\n", DocumentFormat.CSV),
        ('name,quote\nx,"a, b\nc"\ny,"d"', DocumentFormat.CSV),
        ('{"a": 1}\n{"a": 2}\n', DocumentFormat.JSONL),
        ('{"a": 1}\nnot json\n', DocumentFormat.JSONL),
        ("{curly} words\nmore", DocumentFormat.PLAIN_TEXT),
        ("Dear Sir,\nI wrote to you, but you\nnever, ever answered", DocumentFormat.PLAIN_TEXT),
        ("One, two.\nThree, four.\n", DocumentFormat.PLAIN_TEXT),
        ("Just words", DocumentFormat.PLAIN_TEXT),
        ("A text that begins with %PDF-1.7 words.", DocumentFormat.PLAIN_TEXT),
    ],
)
def test_formats_of_text_are_told_apart(text: str, expected: DocumentFormat) -> None:
    assert find_text_format(text) is expected


def test_a_text_that_speaks_of_pdf_is_no_pdf() -> None:
    assert read("The first bytes are %PDF-1.7 in such files.").text == "The first bytes are %PDF-1.7 in such files."


def test_plain_text_stays_as_it_is_but_for_line_ends_and_form_feeds_begin_pages() -> None:
    assert read(" A  text.\r\n\r\nwith  blanks\t\u200b \r\n").text == " A  text.\n\nwith  blanks\t\u200b \n"
    document = read("one\n\ftwo\n\fthree")
    assert [document.text[page.char_start : page.char_end].strip() for page in document.pages] == ["one", "two", "three"]
    assert document.find_page(document.text.index("three")) == 3


def test_markdown_keeps_its_source_and_knows_its_headings() -> None:
    source = (
        "# Guide to *maps*\n\nIntro.\n\n## Old `maps`\n\n```\n# no heading\n```\n\nSee.\n\nNew maps\n--------\n\nMore.\n\n"
        "### Deep #\n\nx\n\n## الخرائط\n\nنص."
    )
    document = read(source)
    assert document.text == source
    assert document.title == "Guide to maps"
    top = "Guide to maps"
    assert [heading.path for heading in document.headings] == [
        (top,),
        (top, "Old maps"),
        (top, "New maps"),
        (top, "New maps", "Deep"),
        (top, "الخرائط"),
    ]
    assert [source[heading.char_start :].split("\n")[0] for heading in document.headings] == [
        "# Guide to *maps*",
        "## Old `maps`",
        "New maps",
        "### Deep #",
        "## الخرائط",
    ]
    assert document.find_heading_path(source.index("no heading")) == (top, "Old maps")


def test_front_matter_gives_the_title_and_is_no_heading() -> None:
    document = read('---\ntitle: "My page"\ndate: 2024\n---\n\n# First\n\ntext')
    assert document.title == "My page"
    assert document.text == "\n# First\n\ntext"
    assert [heading.char_start for heading in document.headings] == [1]


def test_pictures_written_into_markdown_are_left_out() -> None:
    document = read(f"# A\n\n![x](data:image/png;base64,{'QUJD' * 50_000})\n\nEnd.")
    assert document.text == "# A\n\n![x](data:)\n\nEnd."
    assert get_codes(document) == ["EMBEDDED_DATA_REMOVED"]


def test_html_gives_what_a_reader_sees_block_by_block() -> None:
    page = """<!doctype html><html lang=ar><head><title> The
      title </title><style>p{}</style></head><body><nav>Menu</nav><script>bad()</script><h1>Top <em>one</em></h1>
      <p>First <b>bold</b>
      line<br>second</p>loose<div>a<p>b</p></div><ul><li>i<li><p>j</p></ul>
      <h2>Sub</h2><table><tr><th>Name</th><th><p>Age</p></th></tr><tr><td>أحمد</td><td>٣٠</td></tr></table>
      <pre>x  y
  z</pre><p hidden>secret</p><!-- comment --><h3><div>Deep</div></h3>&amp; &#1605;</body></html>"""
    document = read(page)
    assert document.title == "The title"
    assert document.text.split("\n") == [
        *("Top one", "First bold line", "second", "loose", "a", "b", "- i", "- j"),
        *("", "Sub", "Name | Age", "أحمد | ٣٠", "x  y", "  z", "", "Deep", "& م"),
    ]
    assert [heading.path for heading in document.headings] == [("Top one",), ("Top one", "Sub"), ("Top one", "Sub", "Deep")]
    check_headings(document)


def test_html_nested_too_deeply_is_refused_not_cut() -> None:
    assert find_fault("<div>" * 100_000 + "text") is Fault.DAMAGED


@pytest.mark.parametrize("text", ["<?xml version='1.0'?><a>b</a>", "<!DOCTYPE note><note/>"])
def test_other_xml_is_refused(text: str) -> None:
    assert find_fault(text) is Fault.UNSUPPORTED_FORMAT


def test_csv_rows_name_their_columns() -> None:
    document = read('name,age,city\nأحمد,30,"الرياض, حي"\nSara,,Jeddah\n')
    assert document.text == "name: أحمد; age: 30; city: الرياض, حي\nname: Sara; city: Jeddah"


def test_csv_without_a_header_gives_its_values() -> None:
    assert read("1;2;a\n3;4;b\n").text == "1; 2; a\n3; 4; b"


def test_jsonl_records_name_their_fields() -> None:
    records = [{"text": "الأول\nسطر"}, {"id": 7, "tags": ["a", "b"], "author": {"name": "Sara", "note": None}, "ok": True}, {"b": ""}]
    document = read("\n".join(json.dumps(record) for record in records))
    assert document.text == "الأول\nسطر\nid: 7\ntags: a\ntags: b\nauthor.name: Sara\nok: true"


def test_a_bad_jsonl_line_is_named() -> None:
    with pytest.raises(DocumentInvalid, match="Line 2"):
        read('{"a": 1}\n{"a": \n')


def test_a_word_of_100_000_characters_is_refused_and_a_long_one_warned_of() -> None:
    assert find_fault("words " + "x" * 100_000) is Fault.WORD_TOO_LONG
    assert find_fault("ب" * 100_000) is Fault.WORD_TOO_LONG
    assert get_codes(read("words " + "x" * 99_999)) == ["LONG_WORDS"]
    assert read("図書館" * 40_000).warnings == ()


def test_chunks_of_a_parsed_document_know_their_page_and_headings() -> None:
    document = read("# A\n\n" + "Words of the first. " * 20 + "\n\n## B\n\n" + "Words of the second. " * 20)
    chunks = cut_text(document.text, Chunking(30, 5), WordTokenizer(), [heading.char_start for heading in document.headings])
    assert document.text.index("## B") in [chunk.char_start for chunk in chunks]
    paths = [document.find_heading_path(chunk.char_start) for chunk in chunks]
    assert set(paths) == {("A",), ("A", "B")}
    for chunk, path in zip(chunks, paths, strict=True):
        assert ("second" in document.text[chunk.char_start : chunk.char_end]) == (path == ("A", "B"))
    assert document.find_page(0) is None


def test_limits_of_pages_and_characters_hold() -> None:
    for content, limits, fault in [
        ("a\f" * 20, Limits(pages=10), Fault.TOO_MANY_PAGES),
        ("word " * 20, Limits(text_characters=50), Fault.TOO_LONG),
        ("# A\n\n" + "word " * 20, Limits(text_characters=50), Fault.TOO_LONG),
        ("a,b\n" * 20, Limits(text_characters=50), Fault.TOO_LONG),
    ]:
        with pytest.raises(DocumentInvalid) as refused:
            read_document(content.encode(), limits)
        assert refused.value.fault is fault
