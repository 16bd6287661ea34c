"""From token ids to text while they come: whole characters only, and never a piece of a stop string."""

from collections.abc import Sequence

import regex
from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"
# A UTF-8 character has at most 4 bytes, so at most 4 byte tokens. What still does not decode after twice that never will.
MAX_PENDING_TOKENS = 8
# The last grapheme where more may join it: pictures (joined by zero-width joiners, tinted by modifiers), flags, and open joiners.
OPEN_GRAPHEME = regex.compile(r"(?:\p{Extended_Pictographic}|\p{Regional_Indicator}|\u200d)")
LAST_GRAPHEME = regex.compile(r"\X\Z")
# No grapheme that people write is longer; a model that prints joiners for ever must not hold back its text for ever.
MAX_GRAPHEME_CHARACTERS = 32


class Detokenizer:
    """Turns a growing list of token ids into text. Decodes a short window each time, so that the cost per token stays constant."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []  # ids from the last emitted piece on: they decide about spaces and bytes of what follows
        self._emitted = 0  # how many ids of the window are emitted already

    @property
    def holds_back(self) -> bool:
        """True while a character is incomplete."""
        return len(self._window) > self._emitted

    def push(self, token_id: int) -> str:
        """Take one more token; give the text that is now certain, perhaps none."""
        self._window.append(token_id)
        known, text = self._decode(self._window[: self._emitted]), self._decode(self._window)
        if text.endswith(REPLACEMENT) and len(self._window) - self._emitted < MAX_PENDING_TOKENS:
            return ""
        self._window = self._window[self._emitted :]
        self._emitted = len(self._window)
        return text[len(known) :]

    def finish(self) -> str:
        """Give what is left at the end; the first bytes of a character that never was completed are dropped."""
        known, text = self._decode(self._window[: self._emitted]), self._decode(self._window)
        self._window, self._emitted = [], 0
        return text[len(known) :].rstrip(REPLACEMENT)

    def _decode(self, token_ids: list[int]) -> str:
        text = self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text if isinstance(text, str) else "".join(text)


class TextStream:
    """Releases text piece by piece and ends it before the first stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = [text for text in stop if text]
        self._pending = ""
        self.is_stopped = False

    @property
    def holds_back(self) -> bool:
        """True while some text is not certain yet."""
        return bool(self._pending) or self._detokenizer.holds_back

    def push(self, token_id: int) -> str:
        """Take a token; give the text that may be shown now. Sets `is_stopped` when a stop string was found."""
        self._pending += self._detokenizer.push(token_id)
        return self._release(self._count_held())

    def finish(self) -> str:
        """Give all that is left; to be called once, when no token follows."""
        if self.is_stopped:
            return ""
        self._pending += self._detokenizer.finish()
        return self._release(0)

    def _release(self, held: int) -> str:
        if self.is_stopped:
            return ""
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
