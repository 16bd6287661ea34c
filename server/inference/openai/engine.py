"""The openai engine: prompts are rendered and answers read here, weights and adapters are those of a server behind a URL."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager

from server.domain.engines import EngineStatus, ModelStatus
from server.domain.errors import ResourceExhausted, Unavailable
from server.domain.generation import GenerationRequest, ModelReference, QuotedText, RenderedPrompt, TokenEvent
from server.inference.openai.answers import Answer, Waits
from server.inference.openai.connection import FULL_RETRY_SECONDS, Connection, ModelGone
from server.inference.openai.dialects import Dialect, Order, write_body
from server.inference.openai.messages import Card
from server.inference.openai.served import Served
from server.inference.openai.voices import Spoken, Voices
from server.inference.plans import name_version
from server.inference.quarantine import Quarantine


class OpenAIEngine:
    """Implements the Generator port over one server. All methods belong to one event loop; `stop` last.

    At most `max_requests` are under way; more are refused. `dialect` None: the server is asked.
    """

    def __init__(self, connection: Connection, voices: Voices, *, max_requests: int, dialect: Dialect | None = None) -> None:
        self._connection, self._voices, self._max_requests = connection, voices, max_requests
        self._served, self._quarantine = Served(connection, dialect), Quarantine()
        self._running: Counter[str] = Counter()  # by base model
        # One at a time: two that want the same version read it once.
        self._reader = ThreadPoolExecutor(1, "openai-reads")

    async def stop(self) -> None:
        """Close all connections, by which what runs at the server ends."""
        self._reader.shutdown(wait=False, cancel_futures=True)
        await self._connection.close()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent]:
        """Stream deltas, then GenerationFinished; closing the iterator closes the connection, by which the server stops."""
        received, has_begun = time.monotonic(), False
        with self._take_place(request.model.base_model):
            for is_last_try in (False, True):
                try:
                    async with aclosing(self._stream(request, received)) as events:
                        async for event in events:
                            has_begun = True
                            yield event
                    return
                except ModelGone:  # as of a server that was restarted, which has no adapters
                    self._served.lose()
                    if is_last_try or has_begun:
                        raise
                except Unavailable:
                    self._served.lose()
                    raise

    async def count_tokens(self, model: ModelReference, texts: Sequence[str]) -> Sequence[int]:
        """Count tokens by the model's own tokenizer, without special tokens."""
        tokenizer = (await self._open(model)).voice.tokenizer
        return await asyncio.to_thread(lambda: [len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts])

    async def render(self, request: GenerationRequest) -> RenderedPrompt:
        """Give what the model would be given for a request; a prompt over the context is no error here."""
        spoken = await self._open(request.model)
        context = _count_context(spoken, await self._served.find(request.model.base_model))
        built = await asyncio.to_thread(spoken.voice.prompts.build, request, context)
        return RenderedPrompt(built.text, built.token_ids, context, built.dropped_messages)

    async def quote_texts(self, model: ModelReference, texts: Sequence[str]) -> Sequence[QuotedText]:
        """Break what the model's tokenizer or chat template would take for more than text."""
        voice = (await self._open(model)).voice
        return await asyncio.to_thread(lambda: [voice.quoter.quote(text) for text in texts])

    async def read_context_tokens(self, model: ModelReference) -> int:
        """Give what a prompt and its answer may take together, in tokens: the server's bound where it tells one."""
        return _count_context(await self._open(model), await self._served.find(model.base_model))

    async def load(self, model: ModelReference, *, pinned: bool = False) -> None:
        """Read a model's tokenizer and give a version's adapter to the server. What stays in its memory the server decides."""
        spoken = await self._open(model)
        await self._served.find(model.base_model)
        if spoken.adapter is not None:
            await self._served.give_adapter(model.model_id, *spoken.adapter)

    async def unload(self, model: ModelReference) -> None:
        """Let the server forget a version's adapter; its base models it keeps. Running requests end undisturbed."""
        if model.adapter_path is not None:
            await self._served.take_adapter(name_version(model))

    async def forget(self, model_id: str) -> None:
        """Drop what is loaded for a deleted model."""
        self._quarantine.forget(model_id)
        self._voices.forget(model_id)
        await self._served.take_adapters(model_id)

    async def describe(self) -> EngineStatus:
        """Tell what the server serves, and how many requests it has from here. Raises Unavailable while it is down."""
        cards = await self._served.refresh()
        bases = [card for card in cards if card.parent is None]
        models = tuple(self._describe(base, sum(card.parent == base.id for card in cards)) for base in bases)
        return EngineStatus(self._served.instance, models, self._quarantine.list_models())

    def _describe(self, base: Card, adapters: int) -> ModelStatus:
        running = sum(self._running[name] for name in {base.id, base.root or base.id})
        return ModelStatus(
            base_model=base.id,
            weight_bytes=0,  # the server's, not this machine's
            context_tokens=base.max_model_len or 0,
            adapters_loaded=adapters,
            running_requests=running,
            waiting_requests=0,
            reserved_cache_tokens=0,
        )

    @contextmanager
    def _take_place(self, base_model: str) -> Iterator[None]:
        if self._running.total() >= self._max_requests:
            raise ResourceExhausted(
                f"{self._max_requests} requests are already with the server of this model.",
                reason="QUEUE_FULL",
                retry_after_seconds=FULL_RETRY_SECONDS,
            )
        self._running[base_model] += 1
        try:
            yield
        finally:
            self._running -= Counter((base_model,))  # which keeps no zeros: anybody can make up a name

    async def _open(self, reference: ModelReference) -> Spoken:
        known = self._voices.find(reference)
        if known is not None:
            return known
        if reference.adapter_path is not None:
            self._quarantine.check(name_version(reference))
        async with self._quarantine.guard(reference):
            return await asyncio.get_running_loop().run_in_executor(self._reader, self._voices.open, reference)

    async def _stream(self, request: GenerationRequest, received: float) -> AsyncGenerator[TokenEvent]:
        spoken = await self._open(request.model)
        card = await self._served.find(request.model.base_model)
        opened = time.monotonic()
        if spoken.adapter is not None:
            await self._served.give_adapter(request.model.model_id, *spoken.adapter)
        waits = Waits(received, opened - received, time.monotonic() - opened)
        voice, context = spoken.voice, _count_context(spoken, card)
        order = Order(request, await asyncio.to_thread(voice.prepare, request, context, spoken.vocabulary_size), sorted(voice.stop_ids))
        body = write_body(self._served.dialect, card.id if spoken.adapter is None else spoken.adapter[0], order)
        async with self._connection.complete(body) as events, aclosing(Answer(order, voice.tokenizer, waits).read(events)) as answer:
            async for event in answer:
                yield event


def _count_context(spoken: Spoken, card: Card) -> int:
    return card.max_model_len or spoken.context_tokens
