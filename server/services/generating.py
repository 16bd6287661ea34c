"""From an engine's streams to one answer: several choices side by side, a limit of time, and the whole read to its end."""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from server.domain.errors import DeadlineExceeded
from server.domain.generation import (
    Delta,
    GenerationFinished,
    GenerationParameters,
    GenerationRequest,
    ModelReference,
    PositionLogprobs,
    Timings,
    TokenEvent,
    TokenUsage,
)
from server.services.model_ports import Engine
from server.services.validation import MAX_SEED


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """A piece of one of the answers."""

    choice: int
    delta: Delta


@dataclass(frozen=True, slots=True)
class AnswerFinished:
    """The end of all answers to one request, in their order, at least one; `parameters` are those that counted."""

    choices: Sequence[GenerationFinished]
    parameters: GenerationParameters

    @property
    def usage(self) -> TokenUsage:
        """The prompt counted once, the answers together."""
        completion_tokens = sum(choice.usage.completion_tokens for choice in self.choices)
        return TokenUsage(self.choices[0].usage.prompt_tokens, completion_tokens)

    @property
    def timings(self) -> Timings:
        """The longest waits, the first token of any answer, and the end of the last."""
        all_timings = [choice.timings for choice in self.choices]
        return Timings(
            queue_seconds=max(timings.queue_seconds for timings in all_timings),
            first_token_seconds=min(timings.first_token_seconds for timings in all_timings),
            total_seconds=max(timings.total_seconds for timings in all_timings),
            load_seconds=max(timings.load_seconds for timings in all_timings),
            adapter_load_seconds=max(timings.adapter_load_seconds for timings in all_timings),
        )


AnswerEvent = ChoiceDelta | AnswerFinished


@dataclass(frozen=True, slots=True)
class Choice:
    """One whole answer."""

    text: str
    logprobs: Sequence[PositionLogprobs]
    finished: GenerationFinished


@dataclass(frozen=True, slots=True)
class Generation:
    """All answers to one request, with the weights that gave them."""

    model: ModelReference
    choices: Sequence[Choice]
    finished: AnswerFinished


def draw_seed() -> int:
    """Give a seed for a request that has none."""
    return secrets.randbelow(MAX_SEED + 1)


async def generate_choices(engine: Engine, request: GenerationRequest) -> AsyncGenerator[AnswerEvent]:
    """Generate the `n` answers of a request side by side; the first that fails ends all. Closing stops them."""
    ends: dict[int, GenerationFinished] = {}
    streams = [engine.generate(part) for part in split_choices(request)]
    async with aclosing(_merge(streams)) as events:
        async for choice, event in events:
            if isinstance(event, GenerationFinished):
                ends[choice] = event
            else:
                yield ChoiceDelta(choice, event)
    yield AnswerFinished([ends[choice] for choice in sorted(ends)], ends[0].fill_in(request.parameters))


def split_choices(request: GenerationRequest) -> Sequence[GenerationRequest]:
    """Give a request per answer; those after the first have seeds of their own, counted up from the caller's or from a drawn one."""
    parameters = request.parameters
    if parameters.n == 1:
        return [request]
    answer = secrets.token_hex(8)  # the caller's own id may come twice, with other prompts
    first_seed = draw_seed() if parameters.seed is None else parameters.seed
    seeds = [(first_seed + choice) % (MAX_SEED + 1) for choice in range(parameters.n)]
    return [
        replace(request, request_id=f"{request.request_id}.{choice}", parameters=replace(parameters, n=1, seed=seed), choice_of=answer)
        for choice, seed in enumerate(seeds)
    ]


async def _merge(streams: Sequence[AsyncGenerator[TokenEvent]]) -> AsyncGenerator[tuple[int, TokenEvent]]:
    """Give the events of all streams as they come. Raises what one of them raises, and closes the others."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for piece in only:
                yield 0, piece
        return
    # Of size one: a slow reader makes the streams wait, and what waits there the engine keeps as one text each.
    queue: asyncio.Queue[tuple[int, TokenEvent | Exception | None]] = asyncio.Queue(1)
    pumps = [asyncio.create_task(_pump(choice, stream, queue)) for choice, stream in enumerate(streams)]
    try:
        open_count = len(pumps)
        while open_count:
            choice, event = await queue.get()
            if isinstance(event, Exception):
                raise event
            if event is None:
                open_count -= 1
            else:
                yield choice, event
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(choice: int, stream: AsyncGenerator[TokenEvent], queue: "asyncio.Queue[tuple[int, TokenEvent | Exception | None]]") -> None:
    try:
        async with aclosing(stream) as events:
            async for event in events:
                await queue.put((choice, event))
        await queue.put((choice, None))
    except Exception as error:  # raised again where the answers come together
        await queue.put((choice, error))


async def limit_time(events: AsyncGenerator[AnswerEvent], seconds: float) -> AsyncGenerator[AnswerEvent]:
    """Pass events on; raises DeadlineExceeded, and closes them, where the last one has not come within so many seconds."""
    end = time.monotonic() + seconds
    async with aclosing(events):
        while True:
            try:
                async with asyncio.timeout(end - time.monotonic()):
                    event = await anext(events)
            except TimeoutError:
                raise DeadlineExceeded(
                    f"The generation took longer than the {seconds:g} s of `timeout_seconds`.", reason="GENERATION_TIMED_OUT"
                ) from None
            except StopAsyncIteration:
                return
            yield event


async def collect(model: ModelReference, events: AsyncGenerator[AnswerEvent]) -> Generation:
    """Read all answers to their ends."""
    texts: dict[int, list[str]] = {}
    logprobs: dict[int, list[PositionLogprobs]] = {}
    async with aclosing(events):
        async for event in events:
            if isinstance(event, AnswerFinished):
                choices = [
                    Choice("".join(texts.get(place, ())), logprobs.get(place, ()), finished) for place, finished in enumerate(event.choices)
                ]
                return Generation(model, choices, event)
            texts.setdefault(event.choice, []).append(event.delta.text)
            logprobs.setdefault(event.choice, []).extend(event.delta.logprobs)
    raise RuntimeError("the engine's stream ended without its last event")
