"""Markdown: its source stays the text, its headings give the paths. Knows nothing of other formats."""

import re
from collections.abc import Iterator
from itertools import pairwise

from markdown_it import MarkdownIt
from markdown_it.token import Token

from server.rag.parsing.builder import DocumentBuilder
from server.rag.parsing.document import Limits, ParsedDocument, Source

_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n(?:---|\.\.\.)(?:\n|\Z)", re.DOTALL)
_TITLE = re.compile(r"^title:[ \t]*(['\"]?)(.+?)\1[ \t]*$", re.MULTILINE | re.IGNORECASE)
# Pictures in the text itself: megabytes of letters that say nothing.
_EMBEDDED_DATA = re.compile(r"data:[\w/+.;=-]{1,100};base64,[A-Za-z0-9+/=]{200,}")


def parse_markdown(source: Source, limits: Limits) -> ParsedDocument:
    """Read Markdown: front matter goes (but for its title), embedded pictures too."""
    builder = DocumentBuilder(limits, source.warnings)
    front_matter = _FRONT_MATTER.match(source.text)
    body = source.text[front_matter.end() :] if front_matter else source.text
    text, pictures = _EMBEDDED_DATA.subn("data:", body.replace("\f", "\n"))
    if pictures:
        builder.warn("EMBEDDED_DATA_REMOVED", f"{pictures:,} pictures that were written into the text were left out.")
    builder.add_block(text)
    for level, words, start in _find_headings(text):
        builder.mark_heading(level, words, start)
    title = _TITLE.search(front_matter[1]) if front_matter else None
    return builder.build(title[2] if title else "")


def _find_headings(text: str) -> Iterator[tuple[int, str, int]]:
    """Give each heading's level, its words without marks, and where its line begins."""
    reader = MarkdownIt("commonmark").enable("table")
    inline = MarkdownIt("commonmark")
    reader.core.ruler.disable(["inline"])
    line_starts = [0, *(match.end() for match in re.finditer("\n", text))]
    tokens = reader.parse(text)
    for opening, content in pairwise(tokens):
        if opening.type == "heading_open" and opening.map:
            words = " ".join(_give_words(inline.parseInline(content.content)).split())
            if words:
                yield int(opening.tag[1]), words, line_starts[opening.map[0]]


def _give_words(tokens: list[Token]) -> str:
    children = (child for token in tokens for child in token.children or ())
    return "".join(
        child.content if child.type in ("text", "code_inline", "image") else " " * (child.type == "softbreak") for child in children
    )
