"""The numbers by which an answer names its sources: [1], [1, 3], [1-3], [Source 2], 【٢】. One reading for prompts and for citations."""

import re

_WORD = r"(?:sources?|passages?|documents?|docs?|المصدر|المصادر|المقطع|المقاطع|الوثيقة|الوثائق)"
_JOINT = r"(?:[,،;؛&+\-‐‑‒–—−~]|and|to|و|إلى)"
# Digits of any script. Without the lazy parts that would make a long run of them costly.
MARKER = re.compile(rf"[\[【［]\s*\^?(?:{_WORD}\s*)?(\d{{1,4}}(?:\s*{_JOINT}\s*\d{{1,4}}){{0,50}})\s*[\]】］]", re.IGNORECASE)
_ITEM = re.compile(r"(\d+)(?:\s*(?:[\-‐‑‒–—−~]|to|إلى)\s*(\d+))?", re.IGNORECASE)


def read_markers(text: str, count: int) -> tuple[int, ...]:
    """Give the numbers that a text names, each once, in order. Of a range, those from 1 to `count` and an end that lies outside."""
    numbers: list[int] = []
    for marker in MARKER.finditer(text):
        for item in _ITEM.finditer(marker[1]):
            first, last = int(item[1]), int(item[2] or item[1])
            within = range(max(1, first), min(count, last) + 1) if first <= last else ()
            numbers += [first, *within, last]
    return tuple(dict.fromkeys(numbers))


def break_markers(text: str) -> str:
    """Write markers in round brackets: what a source quotes shall not name another."""
    return MARKER.sub(lambda marker: f"({marker[0][1:-1].strip()})", text)
