"""From the events of a completion to deltas and an end. Text is held back here as for the embedded engine, whatever the server does."""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from server.domain.errors import Unavailable, Unimplemented
from server.domain.generation import (
    Delta,
    FinishReason,
    GenerationFinished,
    PositionLogprobs,
    Timings,
    TokenEvent,
    TokenLogprob,
    TokenUsage,
)
from server.inference.heldtext import HeldText
from server.inference.openai.connection import make_lost
from server.inference.openai.dialects import Order
from server.inference.openai.messages import Choice, Event, Logprobs, make_nonsense

TOKEN_ID = "token_id:"  # noqa: S105  # how vLLM names a token, no secret


@dataclass(frozen=True, slots=True)
class Waits:
    """When a request arrived (time.monotonic), and how long it waited for its model and for its adapter, in seconds."""

    received_seconds: float
    load_seconds: float
    adapter_load_seconds: float


class Answer:
    """One answer while it comes."""

    def __init__(self, order: Order, tokenizer: PreTrainedTokenizerBase, waits: Waits) -> None:
        self._order, self._tokenizer, self._waits = order, tokenizer, waits
        self._parameters = order.request.parameters
        self._text, self._held = HeldText(self._parameters.stop), list[PositionLogprobs]()
        self._first_token_seconds: float | None = None
        self._end: Choice | None = None
        self._completion_tokens: int | None = None

    async def read(self, events: AsyncIterator[Event]) -> AsyncGenerator[TokenEvent]:
        """Give deltas, then GenerationFinished. Raises Unavailable for a stream that ends without its end."""
        async for event in events:
            if event.usage is not None:
                self._completion_tokens = event.usage.completion_tokens
            for choice in event.choices:
                for delta in self._take(choice):
                    yield delta
            if self._text.is_stopped and self._completion_tokens is not None:
                break  # leaving the stream makes the server stop, too
        yield self._finish()

    def _take(self, choice: Choice) -> Sequence[Delta]:
        if self._first_token_seconds is None:
            self._first_token_seconds = time.monotonic()
        if choice.logprobs is not None:
            self._held += self._read_logprobs(choice.logprobs)
        elif choice.text and self._parameters.logprobs is not None:
            raise Unimplemented("The server of this model gives no log probabilities.", reason="NOT_SUPPORTED_BY_ENGINE")
        is_last = choice.finish_reason is not None
        text = self._text.push(choice.text, is_last=is_last)
        if is_last:
            self._end = choice
        released: Sequence[PositionLogprobs] = ()
        if self._held and not self._ends_by_stop_string and (is_last or not self._text.holds_back):
            released, self._held = tuple(self._held), []
        return [Delta(text, released)] if text or released else []

    @property
    def _ends_by_stop_string(self) -> bool:
        return self._text.is_stopped or (self._end is not None and isinstance(self._end.stop_reason, str))

    def _read_logprobs(self, logprobs: Logprobs) -> Sequence[PositionLogprobs]:
        count = len(logprobs.tokens)
        tops = logprobs.top_logprobs or [None] * count
        if not len(tops) == len(logprobs.token_logprobs) == count:
            raise make_nonsense()
        return [
            PositionLogprobs(self._name(token, chosen or 0.0), self._rank(top or {}))
            for token, chosen, top in zip(logprobs.tokens, logprobs.token_logprobs, tops, strict=True)
        ]

    def _rank(self, top: dict[str, float]) -> Sequence[TokenLogprob]:
        """Give as many as were asked for, likeliest first: servers add the chosen token to those."""
        ranked = sorted(top.items(), key=lambda entry: -entry[1])[: self._parameters.logprobs or 0]
        return tuple(self._name(token, logprob) for token, logprob in ranked)

    def _name(self, token: str, logprob: float) -> TokenLogprob:
        if not token.startswith(TOKEN_ID) or not token[len(TOKEN_ID) :].isdecimal():
            return TokenLogprob(token, logprob)
        text = self._tokenizer.decode([int(token[len(TOKEN_ID) :])])
        return TokenLogprob(text if isinstance(text, str) else "".join(text), logprob)

    def _finish(self) -> GenerationFinished:
        if self._completion_tokens is None or (self._end is None and not self._text.is_stopped):
            raise make_lost()
        prepared, request = self._order.prepared, self._order.request
        end, start = time.monotonic(), self._waits.received_seconds
        return GenerationFinished(
            self._find_reason(),
            TokenUsage(len(prepared.prompt.token_ids), self._completion_tokens),
            # How long it queued only the server knows; it is part of the time to the first token.
            Timings(
                0.0, (self._first_token_seconds or end) - start, end - start, self._waits.load_seconds, self._waits.adapter_load_seconds
            ),
            prepared.max_new_tokens,
            prepared.seed,
            prepared.prompt.dropped_messages,
            prepared.prompt.text if request.echo_prompt else None,
        )

    def _find_reason(self) -> FinishReason:
        end = self._end
        if end is None or self._ends_by_stop_string:
            return FinishReason.STOP_STRING
        if end.finish_reason == "length":
            return FinishReason.LENGTH
        if end.finish_reason != "stop":  # "abort", "error", …
            raise Unavailable("The server of this model gave up on this request.", reason="GENERATION_FAILED")
        is_callers = isinstance(end.stop_reason, int) and end.stop_reason in self._parameters.stop_token_ids
        return FinishReason.STOP_TOKEN if is_callers else FinishReason.STOP
