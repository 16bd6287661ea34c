"""Continuous batching: requests join and leave between steps, long prompts come in pieces, and the cache has a bound.

Synchronous and single-threaded; knows no asyncio and no wire. Decoding requests own the rows 0 … n-1, so that a step reads one
contiguous block; prompts being read lie behind them, and one spare row makes room for exchanging two.
"""

import logging
import time
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from server.childprocess import is_out_of_memory
from server.domain.errors import FailedPrecondition, ResourceExhausted, ServiceError, Unavailable
from server.domain.generation import FinishReason, TokenEvent
from server.inference.cache import RowCache, Step
from server.inference.decoder import Decoder
from server.inference.generations import Generation
from server.inference.reading import share_prompt_tokens
from server.inference.sampling import Choice, SamplingState, choose_tokens

# A full queue empties by whole answers; sooner than this a retry seldom finds a place.
RETRY_SECONDS = 2.0
# A row that held so many tokens gives its memory back when it is left; smaller ones keep it for the next request.
KEPT_ROW_TOKENS = 512

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BatchLimits:
    """What a batch may hold: rows that compute together, requests that wait, tokens of cache over all rows, prompt tokens read per step."""

    max_rows: int = 16
    max_waiting: int = 256
    cache_tokens: int = 32_768
    # A step must stay short for those who wait for their next token; 256 tokens already fill the processor.
    prompt_tokens_per_step: int = 256


@dataclass(frozen=True)
class Output:
    """What a step brought for one request: an event, or the error that ended it."""

    generation: Generation
    event: TokenEvent | ServiceError


class Batch:
    """All requests to one base model, with whatever adapters. Call `step` until it has nothing to do."""

    def __init__(self, decoder: Decoder, limits: BatchLimits) -> None:
        self._decoder, self._limits, self._adapters = decoder, limits, decoder.adapters
        self._cache = RowCache(decoder.cache_shape, limits.max_rows + 1)
        self._device = decoder.cache_shape.device
        self._waiting: list[Generation] = []  # by their turn
        self._reading: list[Generation] = []
        self._decoding: list[Generation] = []
        self._free_rows = set(range(limits.max_rows + 1))
        self._reserved_tokens = 0

    @property
    def has_work(self) -> bool:
        """True while any request waits or runs."""
        return bool(self._waiting or self._reading or self._decoding)

    @property
    def running_count(self) -> int:
        """Requests that hold a row."""
        return len(self._reading) + len(self._decoding)

    @property
    def waiting_count(self) -> int:
        """Requests that wait for one."""
        return len(self._waiting)

    @property
    def reserved_tokens(self) -> int:
        """Cache tokens that are promised to running requests."""
        return self._reserved_tokens

    def submit(self, generation: Generation) -> None:
        """Queue a request. Raises ResourceExhausted where the queue is full or the request alone is over the cache's bound."""
        if generation.reserved_tokens > self._limits.cache_tokens:
            raise ResourceExhausted(
                f"The request needs room for {generation.reserved_tokens} tokens; this engine has {self._limits.cache_tokens} for all.",
                reason="REQUEST_TOO_LARGE",
            )
        # Those for whom rows are free are only on their way to them.
        if len(self._waiting) >= self._limits.max_waiting + self._limits.max_rows - self.running_count:
            raise ResourceExhausted(
                f"{len(self._waiting)} requests already wait for this model.", reason="QUEUE_FULL", retry_after_seconds=RETRY_SECONDS
            )
        insort(self._waiting, generation, key=lambda waiting: waiting.turn_seconds)

    def cancel(self, request_id: str) -> bool:
        """Forget a request and free its place at once; False where it is not here (any more)."""
        for generation in (*self._waiting, *self._reading, *self._decoding):
            if generation.request_id == request_id:
                self._remove(generation)
                return True
        return False

    def fail_all(self, error: ServiceError) -> list[Output]:
        """End every request with an error."""
        everyone = [*self._waiting, *self._reading, *self._decoding]
        for generation in everyone:
            self._remove(generation)
        return [Output(generation, error) for generation in everyone]

    def step(self) -> list[Output]:
        """Admit who has a place, read a bounded piece of prompts, and make one token for each decoding request."""
        outputs = self._admit()
        # Those who decode already are served first: a prompt that ends in this step has its first token from reading.
        decoding = list(self._decoding)
        if decoding:
            outputs += self._decode(decoding)
        outputs += self._read_prompts()
        return outputs

    def _admit(self) -> list[Output]:
        """Give rows in order of their turns. Nobody overtakes: a large request would wait for ever."""
        outputs: list[Output] = []
        while self._waiting and self.running_count < self._limits.max_rows:
            generation = self._waiting[0]
            if self._reserved_tokens + generation.reserved_tokens > self._limits.cache_tokens:
                break
            try:
                if generation.adapter is not None and not self._adapters.acquire(generation.adapter.name, generation.adapter.adapter):
                    break
            except (ServiceError, RuntimeError, MemoryError) as error:
                outputs.append(self._fail(generation, error))
                continue
            self._waiting.pop(0)
            generation.row = max(self._free_rows)
            self._free_rows.remove(generation.row)
            self._reserved_tokens += generation.reserved_tokens
            generation.started_seconds = time.monotonic()
            if generation.prefix is not None:
                self._cache.put_prefix(generation.row, generation.prefix)
                generation.cached_tokens = generation.prefix_tokens
            self._reading.append(generation)
        return outputs

    def _read_prompts(self) -> list[Output]:
        outputs: list[Output] = []
        started = self._start_choices()
        for generation, tokens in share_prompt_tokens(self._reading, self._limits.prompt_tokens_per_step):
            try:
                logits = self._read_piece(generation, tokens)
                if logits is not None:
                    self._start_decoding(generation, logits)
                    started.append(generation)
            except (RuntimeError, MemoryError, ValueError, IndexError) as error:
                outputs.append(self._fail(generation, error))
        # Before the first tokens, with which the one that has read may be at its end.
        started += self._start_choices()
        for generation in started:
            outputs += self._deliver_first(generation)
        return outputs

    def _start_choices(self) -> list[Generation]:
        """Let those start whose prompt a decoding choice of the same answer has read, from a copy of its row."""
        started: list[Generation] = []
        for generation in list(self._reading):
            source = next((other for other in self._decoding if other.shares_prompt(generation)), None)
            if source is not None and source.prompt_logits is not None:
                self._start_decoding(generation, source.prompt_logits)
                generation.cached_tokens += generation.unread_tokens
                self._cache.move_row(source.row, generation.row, generation.cached_tokens)
                started.append(generation)
        return started

    def _deliver_first(self, generation: Generation) -> list[Output]:
        """Make the first token, of the logits after the prompt."""
        logits = generation.prompt_logits
        assert logits is not None
        if not generation.choice_of:
            generation.prompt_logits = None
        try:
            return self._deliver([generation], logits)
        except (RuntimeError, MemoryError, ValueError, IndexError) as error:
            return [self._fail(generation, error)]

    def _read_piece(self, generation: Generation, tokens: int) -> torch.Tensor | None:
        """Read so many more prompt tokens; give the logits [1, vocabulary] after the last one."""
        start, end = generation.cached_tokens, generation.cached_tokens + tokens
        is_last = tokens == generation.unread_tokens
        positions = torch.arange(start, end, device=self._device).unsqueeze(0)
        step = Step(generation.row, positions, end, self._decoder.cache_shape.dtype)
        first = start - generation.prefix_tokens
        token_ids = torch.tensor([list(generation.prompt_ids[first : first + tokens])], device=self._device)
        self._adapters.select([generation.adapter_name])
        logits = self._decoder.forward(token_ids, step, self._cache, wants_logits=is_last)
        generation.cached_tokens = end
        return logits

    def _start_decoding(self, generation: Generation, logits: torch.Tensor) -> None:
        """Move what is read to the first row behind the decoding ones; whoever reads there goes to the spare row."""
        target = len(self._decoding)
        if generation.row != target:
            occupant = next((other for other in self._reading if other.row == target), None)
            if occupant is not None:
                self._move(occupant, next(iter(self._free_rows)))
            self._move(generation, target)
        self._reading.remove(generation)
        self._decoding.append(generation)
        generation.prompt_logits = logits

    def _move(self, generation: Generation, target: int) -> None:
        self._cache.move_row(generation.row, target, generation.cached_tokens)
        self._free_rows.add(generation.row)
        self._free_rows.remove(target)
        generation.row = target

    def _decode(self, generations: list[Generation]) -> list[Output]:
        try:
            return self._deliver(generations, self._run(generations))
        except (RuntimeError, MemoryError, ValueError, IndexError) as error:
            if len(generations) == 1:
                return [self._fail(generations[0], error)]
        # One of them breaks the pass (or memory does): one by one, only the culprit fails. Their order keeps rows contiguous.
        outputs: list[Output] = []
        for generation in generations:
            outputs += self._decode([generation])
        return outputs

    def _run(self, generations: Sequence[Generation]) -> torch.Tensor:
        positions = torch.tensor([[g.cached_tokens] for g in generations], device=self._device)
        longest = max(g.cached_tokens for g in generations) + 1
        step = Step(generations[0].row, positions, longest, self._decoder.cache_shape.dtype)
        token_ids = torch.tensor([[g.last_token] for g in generations], device=self._device)
        self._adapters.select([g.adapter_name for g in generations])
        logits = self._decoder.forward(token_ids, step, self._cache, wants_logits=True)
        assert logits is not None
        for generation in generations:
            generation.cached_tokens += 1
        return logits

    @torch.inference_mode()
    def _deliver(self, generations: Sequence[Generation], logits: torch.Tensor) -> list[Output]:
        """Choose each request's next token, turn it to events, and let the finished ones go."""
        outputs: list[Output] = []
        choices = choose_tokens(logits, [g.sampling for g in generations])
        for generation, choice in zip(list(generations), choices, strict=True):
            if choice.token_id < 0:
                self._cache.clear_row(generation.row)
                self._remove(generation)
                outputs.append(Output(generation, _explain_loss(generation.sampling)))
                continue
            outputs += [Output(generation, event) for event in self._accept(generation, choice)]
        return outputs

    def _accept(self, generation: Generation, choice: Choice) -> list[TokenEvent]:
        if generation.generated_tokens == 0:
            generation.first_token_seconds = time.monotonic()
        generation.generated_tokens += 1
        generation.last_token = choice.token_id
        generation.sampling.record(choice.token_id)
        is_stop_token = choice.token_id in generation.sampling.parameters.stop_token_ids
        is_end = is_stop_token or choice.token_id in generation.stop_ids
        is_last = generation.generated_tokens >= generation.max_new_tokens
        events: list[TokenEvent] = [*generation.transcript.add(choice, is_end=is_end, is_last=is_last)]
        if generation.transcript.is_stopped:
            events.append(generation.finish(FinishReason.STOP_STRING))
        elif is_end or is_last:
            end = FinishReason.STOP if is_end else FinishReason.LENGTH
            events.append(generation.finish(FinishReason.STOP_TOKEN if is_stop_token else end))
        else:
            return events
        self._remove(generation)
        return events

    def _fail(self, generation: Generation, error: Exception) -> Output:
        self._remove(generation)
        return Output(generation, _translate(error))

    def _remove(self, generation: Generation) -> None:
        """Take a request out, and close the gap that it leaves among the decoding rows."""
        generation.prompt_logits = None  # its reader may keep the request itself for longer
        if generation in self._waiting:
            self._waiting.remove(generation)
            return
        row, longest = generation.row, generation.cached_tokens
        if generation in self._reading:
            self._reading.remove(generation)
        else:
            last = self._decoding[-1]
            self._decoding[row] = last
            self._decoding.pop()
            if last is not generation:
                self._cache.move_row(last.row, row, last.cached_tokens)
                last.row, row = row, last.row
                longest = max(longest, last.cached_tokens)
        self._free_rows.add(row)
        self._reserved_tokens -= generation.reserved_tokens
        if generation.adapter is not None:
            self._adapters.release(generation.adapter.name)
        if not self._reading and not self._decoding:
            self._cache.clear_all()
        elif longest >= KEPT_ROW_TOKENS:
            self._cache.clear_row(row)


def _explain_loss(sampling: SamplingState) -> ServiceError:
    """Say why no token could be chosen."""
    if sampling.form is not None and sampling.form.has_failed:
        return FailedPrecondition("The constraint grew too complex to be followed.", reason="CONSTRAINT_FAILED")
    return FailedPrecondition("The model computed numbers that are not finite.", reason="MODEL_NOT_FINITE")


def _translate(error: Exception) -> ServiceError:
    """Tell memory that ran out from everything else; the text stays in this process' log."""
    if isinstance(error, ServiceError):
        return error
    logger.error("a generation failed", exc_info=error)
    if is_out_of_memory(error):
        return ResourceExhausted("The engine ran out of memory.", reason="ENGINE_OUT_OF_MEMORY", retry_after_seconds=RETRY_SECONDS)
    return Unavailable("The model failed on this request.", reason="GENERATION_FAILED")
