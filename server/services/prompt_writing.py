"""Writes the prompt of a RAG answer for one generator: quotes what others wrote, and takes as many whole sources as its context holds."""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from server.domain.generation import ChatMessage, ModelReference
from server.domain.retrieval import MetadataValue, RetrievedChunk
from server.services.model_ports import Engine
from server.services.prompt_templates import PromptSource
from server.services.rag_prompt import (
    build_messages,
    count_fitting,
    format_source,
    neutralise_control_tokens,
    neutralise_metadata,
    neutralise_source,
    neutralise_title,
)
from server.services.requests import RagGenerate

DEFAULT_ANSWER_TOKENS = 256  # kept free in the context for the answer where the caller sets no max_tokens
# The chat template's own tokens around a prompt, and a tokenizer that joins texts otherwise than it counts them apart.
TEMPLATE_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Prompt:
    """The conversation to generate from, and the chunks that it holds: source n is the n-th."""

    messages: Sequence[ChatMessage]
    chunks: Sequence[RetrievedChunk]


class PromptWriter:
    """Writes prompts with an engine's help: only it knows the generator's tokens."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def write(
        self, generator: ModelReference, request: RagGenerate, template: str, found: Sequence[RetrievedChunk], max_context_tokens: int
    ) -> Prompt:
        """Take whole chunks, best first, while they fit into the generator's context; at least the best one. A limit of 0 is none.

        Raises InvalidInput where the template writes too much, Unavailable.
        """
        quoted, context_tokens = await asyncio.gather(self._quote(generator, request, found), self._engine.read_context_tokens(generator))
        question, earlier, sources = quoted
        frame = build_messages(question, [], template=template, earlier=earlier)
        texts = [_join(frame), *(format_source(source) + "\n\n" for source in sources)]
        frame_tokens, *source_tokens = await self._engine.count_tokens(generator, texts)
        room = context_tokens - frame_tokens - TEMPLATE_TOKENS - (request.parameters.max_tokens or DEFAULT_ANSWER_TOKENS)
        count = max(1, count_fitting(source_tokens, min(room, max_context_tokens) if max_context_tokens else room))
        messages = build_messages(question, sources[:count], template=template, earlier=earlier)
        while template and count > 1:  # it may write sources otherwise, or more than once
            (total,) = await self._engine.count_tokens(generator, [_join(messages)])
            if total <= room + frame_tokens:
                break
            count = max(1, min(count - 1, count * (room + frame_tokens) // total))
            messages = build_messages(question, sources[:count], template=template, earlier=earlier)
        return Prompt(messages, found[:count])

    async def _quote(
        self, generator: ModelReference, request: RagGenerate, found: Sequence[RetrievedChunk]
    ) -> tuple[str, list[ChatMessage], list[PromptSource]]:
        """Quote the question, the earlier turns, and all of the sources, in one call."""
        sources = [
            PromptSource(
                number,
                each.document_id,
                neutralise_title(each.title),
                neutralise_source(each.chunk.text),
                each.chunk.page,
                neutralise_metadata(each.metadata),
            )
            for number, each in enumerate(found, start=1)
        ]
        texts = [neutralise_control_tokens(text) for text in (request.query, *(message.content for message in request.messages))]
        for source in sources:
            texts += [source.title, source.text, *_list_texts(source)]
        quoted = (each.text for each in await self._engine.quote_texts(generator, texts))
        question = next(quoted)
        earlier = [replace(message, content=next(quoted)) for message in request.messages]
        return question, earlier, [_fill(source, quoted) for source in sources]


def _list_texts(source: PromptSource) -> list[str]:
    return [text for pair in source.metadata.items() for text in pair if isinstance(text, str)]


def _fill(source: PromptSource, quoted: Iterator[str]) -> PromptSource:
    title, text = next(quoted), next(quoted)
    metadata: dict[str, MetadataValue] = {}
    for value in source.metadata.values():
        key = next(quoted)
        metadata[key] = next(quoted) if isinstance(value, str) else value
    return replace(source, title=title, text=text, metadata=metadata)


def _join(messages: Sequence[ChatMessage]) -> str:
    return "\n".join(message.content for message in messages)
