"""Requests and their whole answers, for tests on either side of the engine's socket; imports no torch."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from server.domain.generation import (
    ChatMessage,
    Delta,
    GenerationFinished,
    GenerationParameters,
    GenerationRequest,
    ModelReference,
    Role,
    TokenEvent,
)


def ask(prompt: str, *, name: str = "r", model: str = "llama", adapter: str | None = None, **parameters: object) -> GenerationRequest:
    """Make a request that is greedy unless told otherwise."""
    chosen = GenerationParameters(**{"temperature": 0.0, "max_tokens": 16, **parameters})  # type: ignore[arg-type]
    reference = ModelReference("mdl_tiny" if adapter else model, model, version=1 if adapter else None, adapter_path=adapter)
    return GenerationRequest(name, reference, chosen, prompt=prompt)


def ask_chat(content: str, **parameters: object) -> GenerationRequest:
    """Make a chat request."""
    chosen = GenerationParameters(**{"temperature": 0.0, "max_tokens": 16, **parameters})  # type: ignore[arg-type]
    return GenerationRequest("r", ModelReference("llama", "llama"), chosen, messages=(ChatMessage(Role.USER, content),))


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    text: str
    deltas: Sequence[Delta]
    end: GenerationFinished


async def collect(events: AsyncIterator[TokenEvent]) -> Answer:
    """Read a stream to its end."""
    deltas: list[Delta] = []
    async for event in events:
        if isinstance(event, GenerationFinished):
            return Answer("".join(d.text for d in deltas), deltas, event)
        deltas.append(event)
    raise AssertionError("the stream ended without GenerationFinished")


async def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        await asyncio.sleep(0.01)
