"""What a request has said so far: tokens become deltas, with their log probabilities, and stop strings end it."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from server.domain.generation import Delta, PositionLogprobs, TokenLogprob
from server.inference.detokenizer import TextStream
from server.inference.sampling import Choice


class Transcript:
    """Makes deltas of one request's tokens. Log probabilities are held back as long as their text is, so that they leak no stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._text = TextStream(tokenizer, stop)
        self._held: list[PositionLogprobs] = []

    @property
    def is_stopped(self) -> bool:
        """True once a stop string was found."""
        return self._text.is_stopped

    def add(self, choice: Choice, *, is_end: bool, is_last: bool) -> list[Delta]:
        """Take the next token: an end token is not shown; the last one lets go of all that was held back."""
        if choice.logprob is not None:
            self._held.append(self._name_logprobs(choice))
        text = "" if is_end else self._text.push(choice.token_id)
        if is_end or is_last:
            text += self._text.finish()
        released: Sequence[PositionLogprobs] = ()
        if self._held and not self.is_stopped and (is_end or is_last or not self._text.holds_back):
            released, self._held = tuple(self._held), []
        return [Delta(text, released)] if text or released else []

    def _name_logprobs(self, choice: Choice) -> PositionLogprobs:
        top = [TokenLogprob(self._name(token_id), logprob) for token_id, logprob in choice.top]
        return PositionLogprobs(TokenLogprob(self._name(choice.token_id), choice.logprob or 0.0), tuple(top))

    def _name(self, token_id: int) -> str:
        text = self._tokenizer.decode([token_id])
        return text if isinstance(text, str) else "".join(text)
