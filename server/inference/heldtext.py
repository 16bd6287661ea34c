"""Text on its way to its reader: held back while it may belong to a stop string, or to a character that still grows."""

from collections.abc import Sequence

import regex

# The last grapheme where more may join it: pictures (joined by zero-width joiners, tinted by modifiers), flags, and open joiners.
OPEN_GRAPHEME = regex.compile(r"(?:\p{Extended_Pictographic}|\p{Regional_Indicator}|\u200d)")
LAST_GRAPHEME = regex.compile(r"\X\Z")
# No grapheme that people write is longer; a model that prints joiners for ever must not hold back its text for ever.
MAX_GRAPHEME_CHARACTERS = 32


class HeldText:
    """Releases text piece by piece and ends it before the first stop string."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = [text for text in stop if text]
        self._pending = ""
        self.is_stopped = False

    @property
    def holds_back(self) -> bool:
        """True while some text is not certain yet."""
        return bool(self._pending)

    def push(self, text: str, *, is_last: bool = False) -> str:
        """Take more text; give what may be shown now, all where it is the last. Sets `is_stopped` when a stop string was found."""
        if self.is_stopped:
            return ""
        self._pending += text
        return self._release(0 if is_last else self._count_held())

    def _release(self, held: int) -> str:
        found = [place for place in (self._pending.find(text) for text in self._stop) if place >= 0]
        if found:
            self.is_stopped = True
            text, self._pending = self._pending[: min(found)], ""
            return text
        cut = len(self._pending) - held
        text, self._pending = self._pending[:cut], self._pending[cut:]
        return text

    def _count_held(self) -> int:
        """Count the characters at the end that may begin a stop string, or that belong to a grapheme which may still grow."""
        held = 0
        for text in self._stop:
            for length in range(min(len(text) - 1, len(self._pending)), held, -1):
                if self._pending.endswith(text[:length]):
                    held = length
                    break
        return max(held, _count_open_grapheme(self._pending))


def _count_open_grapheme(text: str) -> int:
    tail = text[-MAX_GRAPHEME_CHARACTERS:]
    last = LAST_GRAPHEME.search(tail)
    if last is None or len(last.group()) >= MAX_GRAPHEME_CHARACTERS or not OPEN_GRAPHEME.search(last.group()):
        return 0
    return len(last.group())
