"""From a file's bytes to the parsed document, in this very process: finds the format, calls its parser, checks the result.

Only the confined child calls this. Parsers are imported when they are needed: each starts in a fraction of the time of all.
"""

import re

from server.domain.documents import DocumentFormat
from server.rag.parsing.arabic import is_reversed
from server.rag.parsing.decoding import decode_text
from server.rag.parsing.document import DocumentInvalid, Fault, Limits, ParsedDocument, Parser, ParseWarning, Source
from server.rag.parsing.formats import find_binary_format, find_text_format

# Scripts that are written without spaces have no words of this kind: Thai, Lao, Burmese, Khmer, Chinese, Japanese, Korean.
_SPACED = r"[^\s\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3000-\ua4cf\uac00-\ud7af\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]"
_NO_CHARACTER = re.compile("[\x00\ud800-\udfff]")
_LONG_WORD = 2_000


def read_document(data: bytes, limits: Limits) -> ParsedDocument:
    """Parse a file. Raises DocumentInvalid; whatever else goes wrong inside a parser is damage of the file."""
    if not data.strip():
        raise DocumentInvalid(Fault.EMPTY, "The file is empty.")
    found = find_binary_format(data)
    source = Source(data)
    if found is None:
        text, warnings = decode_text(data)
        source, found = Source(data, text, warnings), find_text_format(text)
    try:
        document = _import_parser(found)(source, limits)
    except (DocumentInvalid, MemoryError):
        raise
    except Exception as error:
        message = f"The file says that it is {found}, and cannot be read as that: it is damaged ({type(error).__name__})."
        raise DocumentInvalid(Fault.DAMAGED, message) from error
    return _check(document, found, limits)


def _import_parser(found: DocumentFormat) -> Parser:
    match found:
        case DocumentFormat.PDF:
            from server.rag.parsing.pdf import parse_pdf as parser
        case DocumentFormat.DOCX:
            from server.rag.parsing.docx import parse_docx as parser
        case DocumentFormat.PPTX:
            from server.rag.parsing.pptx import parse_pptx as parser
        case DocumentFormat.HTML:
            from server.rag.parsing.html import parse_html as parser
        case DocumentFormat.MARKDOWN:
            from server.rag.parsing.markdown import parse_markdown as parser
        case DocumentFormat.CSV:
            from server.rag.parsing.csv import parse_csv as parser
        case DocumentFormat.JSONL:
            from server.rag.parsing.jsonl import parse_jsonl as parser
        case DocumentFormat.PLAIN_TEXT:
            from server.rag.parsing.plain_text import parse_plain_text as parser
    return parser


def _check(document: ParsedDocument, found: DocumentFormat, limits: Limits) -> ParsedDocument:
    """Refuse what no index can use; warn of what it can use badly."""
    text = document.text
    if not text.strip():
        raise DocumentInvalid(Fault.EMPTY, "The document has no text.")
    if _NO_CHARACTER.search(text) or _NO_CHARACTER.search(document.title):
        raise DocumentInvalid(Fault.BAD_CHARACTERS, "The text has NULs or halves of surrogate pairs, which are no characters.")
    if len(text) > limits.text_characters:
        raise DocumentInvalid(Fault.TOO_LONG, f"The document has more than {limits.text_characters:,} characters of text.")
    longest = max((len(word) for word in re.findall(f"{_SPACED}{{{min(_LONG_WORD, limits.word_characters)},}}", text)), default=0)
    if longest >= limits.word_characters:
        raise DocumentInvalid(Fault.WORD_TOO_LONG, f"The text has a word of {longest:,} characters: it is no prose, perhaps encoded data.")
    warnings = list(document.warnings)
    if longest:
        warnings.append(ParseWarning("LONG_WORDS", f"The text has a word of {longest:,} characters, which no search will find by meaning."))
    if is_reversed(text):
        warnings.append(
            ParseWarning("REVERSED_ARABIC", "The Arabic seems to stand backwards, as drawn, not as read: searches will not find it.")
        )
    return ParsedDocument(document.title, text, document.pages, document.headings, tuple(warnings), found)
