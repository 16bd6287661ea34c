"""Quoting for one model: a text that others wrote, with nothing left in it that tokenizer or chat template take for more than text.

Found by the tokenizer itself (which ids come out) and by what the template writes around turns, so that any model's are known.
"""

import re
from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from server.basemodels.errors import RenderingRefused
from server.basemodels.rendering import Renderer
from server.domain.generation import ChatMessage, QuotedText, Role

MAX_ROUNDS = 8  # of breaking what still acts; each leaves less
MAX_FRAME_CHARACTERS = 40  # a longer line that a template writes is advice to the model, not a mark
_INSIDE = "\ue000"  # stands for a turn's content in the template's writing
_PROBES = (
    (ChatMessage(Role.SYSTEM, _INSIDE), ChatMessage(Role.USER, _INSIDE)),
    (ChatMessage(Role.USER, _INSIDE), ChatMessage(Role.ASSISTANT, _INSIDE), ChatMessage(Role.USER, _INSIDE)),
)


class Quoter:
    """Quotes texts for one tokenizer and its template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._tokens = _find_acting_tokens(tokenizer)
        words, headers = _find_marks(tokenizer, self._tokens.values())
        self._words = _compile(words, "{}")
        self._headers = _compile(headers, r"(?m:^)[ \t]*{}")

    def quote(self, text: str) -> QuotedText:
        """Break what acts: a space inside a token or mark, a ">" before a turn's header at the beginning of a line. Counts tokens too."""
        if self._headers:
            text = self._headers.sub(lambda match: f"> {match[0]}", text)
        if self._words:
            text = self._words.sub(lambda match: _break(match[0]), text)
        for _ in range(MAX_ROUNDS):
            count, places = self._look(text)
            if not places:
                return QuotedText(text, count)
            for start, end in reversed(places):
                text = text[:start] + _break(text[start:end]) + text[end:]
        return self._strip(text)

    def _look(self, text: str) -> tuple[int, list[tuple[int, int]]]:
        """Count the tokens of a text, and find where those that act stand."""
        if not self._tokenizer.is_fast:
            pattern = _compile(self._tokens.values(), "{}")
            places = [match.span() for match in pattern.finditer(text)] if pattern else []
            return len(self._tokenizer(text, add_special_tokens=False).input_ids), places
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        pairs = zip(encoded.input_ids, encoded["offset_mapping"], strict=True)
        acting = [(start, end) for token_id, (start, end) in pairs if token_id in self._tokens and self._acts(token_id, text[start:end])]
        return len(encoded.input_ids), [place for place in dict.fromkeys(acting) if place[0] < place[1]]

    def _acts(self, token_id: int, piece: str) -> bool:
        """Say whether it is the token; that for unknown characters comes out for harmless ones."""
        return token_id != self._tokenizer.unk_token_id or piece.strip() == self._tokens[token_id]

    def _strip(self, text: str) -> QuotedText:
        """Take out what would not be broken."""
        while True:
            count, places = self._look(text)
            if not places:
                return QuotedText(text, count)
            for start, end in reversed(places):
                text = text[:start] + text[end:]


def _find_acting_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Give the tokens that are matched as a whole and mean something: not white space, nor words that were added to a vocabulary."""
    tokens = tokenizer.added_tokens_decoder.items()
    added = {token_id: token.content for token_id, token in tokens if token.special or not token.content.isalnum()}
    named = {int(token_id): str(tokenizer.convert_ids_to_tokens(token_id)) for token_id in tokenizer.all_special_ids}
    return {token_id: content for token_id, content in {**added, **named}.items() if content.strip()}


def _find_marks(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[str]) -> tuple[set[str], set[str]]:
    """Give what the template writes around turns without being a token: words such as [INST], and headers such as "### Assistant:"."""
    renderer, words, headers = Renderer(tokenizer), set[str](), set[str]()
    split = _compile(tokens, "{}")
    for probe in _PROBES:
        try:
            written = renderer.apply_template(probe, add_generation_prompt=probe[-1].role is Role.USER)
        except RenderingRefused:
            continue  # a template without system turns
        for piece in written.split(_INSIDE):
            for line in (split.sub("\n", piece) if split else piece).splitlines():
                line = line.strip()
                if line.endswith(":") and len(line) <= MAX_FRAME_CHARACTERS:
                    headers.add(line)
                words |= {word for word in line.split() if _is_mark(word)}
    return words, headers


def _is_mark(word: str) -> bool:
    """Say whether a word is letters between signs, such as [INST] or <<SYS>>."""
    return not word[0].isalnum() and not word[-1].isalnum() and any(map(str.isalnum, word))


def _compile(texts: Iterable[str], form: str) -> re.Pattern[str] | None:
    """Make one pattern of texts, the longest first."""
    known = sorted(set(texts), key=len, reverse=True)
    return re.compile(form.format(f"(?:{'|'.join(map(re.escape, known))})")) if known else None


def _break(token: str) -> str:
    """Put a space behind the first character that is not white space."""
    first = len(token) - len(token.lstrip()) + 1
    return f"{token[:first]} {token[first:]}"
