"""From token ids to text while they come: whole characters only, and never a piece of a stop string."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from server.inference.heldtext import HeldText

REPLACEMENT = "\ufffd"
# A UTF-8 character has at most 4 bytes, so at most 4 byte tokens. What still does not decode after twice that never will.
MAX_PENDING_TOKENS = 8


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
    """Turns tokens to text that is released piece by piece and ends before the first stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._held = HeldText(stop)

    @property
    def is_stopped(self) -> bool:
        """True once a stop string was found."""
        return self._held.is_stopped

    @property
    def holds_back(self) -> bool:
        """True while some text is not certain yet."""
        return self._held.holds_back or self._detokenizer.holds_back

    def push(self, token_id: int) -> str:
        """Take a token; give the text that may be shown now."""
        return self._held.push(self._detokenizer.push(token_id))

    def finish(self) -> str:
        """Give all that is left; to be called once, when no token follows."""
        return self._held.push(self._detokenizer.finish(), is_last=True)
