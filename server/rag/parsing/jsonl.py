"""JSON Lines: each record a paragraph that names its fields. Knows nothing of other formats."""

import json
import re
from collections.abc import Iterator

from server.rag.parsing.builder import DocumentBuilder
from server.rag.parsing.document import DocumentInvalid, Fault, Limits, ParsedDocument, Source

_MOST_DEPTH = 32
# A record with one of these and nothing else is that text.
_TEXT_FIELDS = frozenset({"text", "content", "body", "contents", "passage"})
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def parse_jsonl(source: Source, limits: Limits) -> ParsedDocument:
    """Read one JSON value per line. Raises DocumentInvalid with the line that is none, or that has characters that are none."""
    builder = DocumentBuilder(limits, source.warnings)
    for number, line in enumerate(source.text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DocumentInvalid(Fault.DAMAGED, f"Line {number:,} is no JSON value.") from error
        text = _write_record(record)
        if "\x00" in text or _LONE_SURROGATE.search(text):
            raise DocumentInvalid(Fault.BAD_CHARACTERS, f"Line {number:,} has a NUL or half of a surrogate pair, which are no characters.")
        builder.add_block(text.replace("\f", "\n"))
    return builder.build()


def _write_record(record: object) -> str:
    if isinstance(record, dict) and len(record) == 1 and _TEXT_FIELDS.issuperset(record):
        record = next(iter(record.values()))
    return "\n".join(_write_fields("", record, 0))


def _write_fields(name: str, value: object, depth: int) -> Iterator[str]:
    """Give `name: value` per leaf, with the names on the way joined by dots; what is empty is left out."""
    if depth > _MOST_DEPTH:
        yield f"{name}: {json.dumps(value, ensure_ascii=False)}"
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _write_fields(f"{name}.{key}" if name else str(key), item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            yield from _write_fields(name, item, depth + 1)
    elif value is not None and value != "":
        shown = value if isinstance(value, str) else json.dumps(value)
        yield f"{name}: {shown}" if name else shown
