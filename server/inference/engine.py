"""The embedded engine: the Engine port over torch, in this process. Loads on first use, keeps a memory budget, generates in batches."""

import asyncio
import hashlib
import itertools
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from typing import Any, Protocol, TypeVar

from server.domain.errors import FailedPrecondition
from server.domain.generation import EmbedRole, GenerationRequest, ModelReference, TokenEvent
from server.inference.library import (
    AdapterResolver,
    BaseModelResolver,
    LoadedAdapter,
    LoadedModel,
    LoadingOptions,
    load_adapter,
    load_model,
)
from server.inference.stepping import Mailbox, Stepper
from server.inference.wire import EngineStatus, ModelStatus

T = TypeVar("T")
# Adapters whose matrices stay in memory beside the pool; a rank-16 adapter of a 7B model takes some 160 MB as float32.
MAX_KEPT_ADAPTERS = 32


class Embedder(Protocol):
    """Embeds texts (rag/embedding.py, injected by app.py). Blocking."""

    def embed(self, embedding_model: str, texts: Sequence[str], role: EmbedRole) -> Sequence[Sequence[float]]:
        """Give one unit vector per text."""


class EmbeddedEngine:
    """Implements the Engine port. All methods belong to one event loop; `start` first, `stop` last."""

    def __init__(
        self,
        *,
        base_models: BaseModelResolver,
        resolve_adapter: AdapterResolver,
        embedder: Embedder | None,
        options: LoadingOptions,
        max_model_bytes: int,
    ) -> None:
        self._base_models, self._resolve_adapter, self._embedder = base_models, resolve_adapter, embedder
        self._options, self._max_model_bytes = options, max_model_bytes
        self._stepper = Stepper()
        self._models: dict[str, LoadedModel] = {}
        self._loads: dict[str, asyncio.Task[Any]] = {}
        self._numbers = itertools.count()
        # One load at a time: two large models that load together need twice the memory at its peak.
        self._loader = ThreadPoolExecutor(1, "engine-loads")
        self._embedding = ThreadPoolExecutor(1, "engine-embeds")

    def start(self) -> None:
        """Start computing."""
        self._stepper.start()

    async def stop(self) -> None:
        """End: requests that still run fail as Unavailable."""
        await asyncio.to_thread(self._stepper.stop)
        self._loader.shutdown(wait=False, cancel_futures=True)
        self._embedding.shutdown(wait=False, cancel_futures=True)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent]:
        """Stream deltas, then GenerationFinished; closing the iterator frees the place before the next step."""
        received, name = time.monotonic(), f"{request.request_id}#{next(self._numbers)}"
        model = await self._enter(request.model)
        try:
            adapter = await self._find_adapter(request.model, model)
            generation = await asyncio.to_thread(model.prepare, name, request, adapter, received)
            mailbox = Mailbox()
            self._stepper.submit(model.batch, generation, mailbox)
            try:
                async with aclosing(mailbox.read()) as events:
                    async for event in events:
                        yield event
            finally:
                self._stepper.cancel(model.batch, name)
        finally:
            self._leave(model)

    async def count_tokens(self, model: ModelReference, texts: Sequence[str]) -> Sequence[int]:
        """Count tokens by the model's own tokenizer, without special tokens."""
        loaded = await self._enter(model)
        try:
            adapter = await self._find_adapter(model, loaded)
            tokenizer = (adapter.voice if adapter is not None else loaded.voice).tokenizer
            return await asyncio.to_thread(lambda: [len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts])
        finally:
            self._leave(loaded)

    async def read_context_tokens(self, model: ModelReference) -> int:
        """Give the model's context length in tokens."""
        loaded = await self._enter(model)
        self._leave(loaded)
        return loaded.context_tokens

    async def embed(self, embedding_model: str, texts: Sequence[str], role: EmbedRole) -> Sequence[Sequence[float]]:
        """Embed to unit vectors, one per text, through the injected embedder."""
        if self._embedder is None:
            raise FailedPrecondition("This engine embeds nothing.", reason="EMBEDDER_MISSING")
        return await asyncio.get_running_loop().run_in_executor(self._embedding, self._embedder.embed, embedding_model, texts, role)

    async def forget(self, model_id: str) -> None:
        """Drop a deleted model's adapters, and a base model of that name that nobody uses. Running requests end undisturbed."""
        for model in list(self._models.values()):
            names = [name for name, adapter in model.adapters.items() if adapter.model_id == model_id]
            for name in names:
                del model.adapters[name]
                await self._stepper.call(partial(model.decoder.adapters.evict, name))
        base = self._models.get(model_id)
        if base is not None and base.users == 0:
            await self._unload(model_id)

    async def describe(self) -> EngineStatus:
        """Tell what is loaded and how busy it is."""
        rows = [
            ModelStatus(
                base_model=name,
                weight_bytes=model.decoder.weight_bytes,
                context_tokens=model.context_tokens,
                adapters_loaded=len(model.adapters),
                running_requests=model.batch.running_count,
                waiting_requests=model.batch.waiting_count,
                reserved_cache_tokens=model.batch.reserved_tokens,
            )
            for name, model in self._models.items()
        ]
        return EngineStatus(tuple(rows))

    async def _enter(self, reference: ModelReference) -> LoadedModel:
        """Give the base model, loaded if it was not, and count a user, for whom it stays."""
        name = reference.base_model
        while name not in self._models:  # it may have been unloaded again before this task went on
            await self._load_once(f"model {name}", lambda: self._load_model(name))
        model = self._models[name]
        model.users += 1
        model.last_use = time.monotonic()
        return model

    def _leave(self, model: LoadedModel) -> None:
        model.users -= 1

    async def _load_once(self, key: str, load: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Let all who want the same thing wait for one load. A waiter that is cancelled does not end it for the others."""
        task = self._loads.get(key)
        if task is None:
            task = asyncio.get_running_loop().create_task(load())
            self._loads[key] = task
            task.add_done_callback(lambda done: self._end_load(key, done))
        result: T = await asyncio.shield(task)
        return result

    def _end_load(self, key: str, task: "asyncio.Task[Any]") -> None:
        del self._loads[key]
        if not task.cancelled():
            task.exception()  # read here, since every waiter may be gone

    async def _load_model(self, name: str) -> None:
        loop = asyncio.get_running_loop()
        model = await loop.run_in_executor(self._loader, lambda: load_model(self._base_models.resolve(name).directory, self._options))
        await self._stepper.add(model.batch)
        model.last_use = time.monotonic()
        self._models[name] = model
        await self._keep_budget(name)

    async def _keep_budget(self, newest: str) -> None:
        """Unload what was used longest ago and is idle, until the rest is within the budget."""
        idle = sorted((m.last_use, name) for name, m in self._models.items() if m.users == 0 and name != newest)
        for _, name in idle:
            if sum(model.decoder.weight_bytes for model in self._models.values()) <= self._max_model_bytes:
                return
            if self._models[name].users == 0:
                await self._unload(name)

    async def _unload(self, name: str) -> None:
        await self._stepper.remove(self._models.pop(name).batch)

    async def _find_adapter(self, reference: ModelReference, model: LoadedModel) -> LoadedAdapter | None:
        if reference.adapter_path is None:
            return None
        name = _name_adapter(reference)
        adapter = model.adapters.get(name)
        if adapter is None:
            adapter = await self._load_once(f"adapter {name} of {id(model)}", lambda: self._load_adapter(name, reference, model))
        model.adapters[name] = adapter
        model.adapters.move_to_end(name)
        while len(model.adapters) > MAX_KEPT_ADAPTERS:
            model.adapters.popitem(last=False)
        return adapter

    async def _load_adapter(self, name: str, reference: ModelReference, model: LoadedModel) -> LoadedAdapter:
        def load() -> LoadedAdapter:
            return load_adapter(name, reference.model_id, self._resolve_adapter(reference), model)

        return await asyncio.get_running_loop().run_in_executor(self._loader, load)


def _name_adapter(reference: ModelReference) -> str:
    """Name an adapter by all that decides its content, so that a name never stands for other weights later."""
    parts = (reference.base_model, reference.model_id, str(reference.version), str(reference.adapter_path), str(reference.manifest_sha256))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
