"""The embedded engine: the Engine port over torch, in this process. Loads on first use, keeps a memory budget, generates in batches."""

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from typing import Any, Protocol, TypeVar

from server.domain.errors import FailedPrecondition
from server.domain.generation import EmbedRole, GenerationRequest, ModelReference, TokenEvent
from server.domain.previews import Preview, PreviewOrder
from server.inference.library import (
    AdapterFiles,
    BaseModelResolver,
    LoadedAdapter,
    LoadedModel,
    LoadingOptions,
    find_files,
    load_model,
    read_adapter,
)
from server.inference.plans import Addition, ServingPlan, VersionFiles, Weights, make_plan, name_version
from server.inference.stepping import Mailbox, Stepper
from server.inference.wire import EngineStatus, ModelStatus

T = TypeVar("T")
# Adapters whose matrices stay in memory beside the pool; a rank-16 adapter of a 7B model takes some 160 MB as float32.
MAX_KEPT_ADAPTERS = 32
# What was found out about versions: a few hundred bytes each.
MAX_KEPT_PLANS = 4096


class Embedder(Protocol):
    """Embeds texts (rag/embedding.py, injected by app.py). Blocking."""

    def embed(self, embedding_model: str, texts: Sequence[str], role: EmbedRole) -> Sequence[Sequence[float]]:
        """Give one unit vector per text."""


class Previewer(Protocol):
    """Shows records (datafiles/previewing.py, injected by app.py). Blocking."""

    def preview(self, order: PreviewOrder) -> Preview:
        """Give the records of the order."""


class EmbeddedEngine:
    """Implements the Engine port. All methods belong to one event loop; `start` first, `stop` last."""

    def __init__(
        self,
        *,
        base_models: BaseModelResolver,
        versions: VersionFiles,
        embedder: Embedder | None,
        previewer: Previewer | None = None,
        options: LoadingOptions,
        max_model_bytes: int,
    ) -> None:
        self._base_models, self._versions, self._embedder = base_models, versions, embedder
        self._options, self._max_model_bytes = options, max_model_bytes
        self._stepper = Stepper()
        self._models: dict[Weights, LoadedModel] = {}
        self._plans: dict[str, ServingPlan] = {}
        self._loads: dict[str, asyncio.Task[Any]] = {}
        self._removals: set[asyncio.Task[None]] = set()
        self._numbers = itertools.count()
        # One load at a time: two large models that load together need twice the memory at its peak.
        self._loader = ThreadPoolExecutor(1, "engine-loads")
        self._embedding = ThreadPoolExecutor(1, "engine-embeds")
        self._previewer, self._previewing = previewer, ThreadPoolExecutor(1, "engine-previews")

    def start(self) -> None:
        """Start computing."""
        self._stepper.start()

    async def stop(self) -> None:
        """End: requests that still run fail as Unavailable."""
        await asyncio.to_thread(self._stepper.stop)
        self._loader.shutdown(wait=False, cancel_futures=True)
        self._embedding.shutdown(wait=False, cancel_futures=True)
        self._previewing.shutdown(wait=False, cancel_futures=True)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent]:
        """Stream deltas, then GenerationFinished; closing the iterator frees the place before the next step."""
        received, name = time.monotonic(), f"{request.request_id}#{next(self._numbers)}"
        plan, model = await self._enter(request.model)
        try:
            adapter = await self._find_adapter(request.model, plan, model)
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
        plan, loaded = await self._enter(model)
        try:
            adapter = await self._find_adapter(model, plan, loaded)
            tokenizer = (adapter.voice if adapter is not None else loaded.voice).tokenizer
            return await asyncio.to_thread(lambda: [len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts])
        finally:
            self._leave(loaded)

    async def read_context_tokens(self, model: ModelReference) -> int:
        """Give what a prompt and its answer may take together, in tokens."""
        plan, loaded = await self._enter(model)
        try:
            return loaded.count_context_tokens(await self._find_adapter(model, plan, loaded))
        finally:
            self._leave(loaded)

    async def embed(self, embedding_model: str, texts: Sequence[str], role: EmbedRole) -> Sequence[Sequence[float]]:
        """Embed to unit vectors, one per text, through the injected embedder."""
        if self._embedder is None:
            raise FailedPrecondition("This engine embeds nothing.", reason="EMBEDDER_MISSING")
        return await asyncio.get_running_loop().run_in_executor(self._embedding, self._embedder.embed, embedding_model, texts, role)

    async def preview(self, order: PreviewOrder) -> Preview:
        """Show records as a base model reads them, through the injected previewer; needs the tokenizer only."""
        if self._previewer is None:
            raise FailedPrecondition("This engine previews nothing.", reason="PREVIEWER_MISSING")
        return await asyncio.get_running_loop().run_in_executor(self._previewing, self._previewer.preview, order)

    async def forget(self, model_id: str) -> None:
        """Drop a deleted model's adapters and weights, and a base model of that name that nobody uses. Running requests end undisturbed."""
        for model in list(self._models.values()):
            names = [name for name, adapter in model.adapters.items() if adapter.model_id == model_id]
            for name in names:
                del model.adapters[name]
                await self._stepper.call(partial(model.decoder.adapters.evict, name))
        for weights, model in list(self._models.items()):
            is_own = weights.model_id == model_id
            if is_own or weights == Weights(model_id):
                model.is_forgotten = is_own
                if model.users == 0:
                    await self._unload(weights)

    async def describe(self) -> EngineStatus:
        """Tell what is loaded and how busy it is."""
        rows = [
            ModelStatus(
                base_model=weights.base_model,
                variant=weights.variant,
                weight_bytes=model.decoder.weight_bytes,
                context_tokens=model.context_tokens,
                adapters_loaded=len(model.adapters),
                running_requests=model.batch.running_count,
                waiting_requests=model.batch.waiting_count,
                reserved_cache_tokens=model.batch.reserved_tokens,
            )
            for weights, model in self._models.items()
        ]
        return EngineStatus(tuple(rows))

    async def _enter(self, reference: ModelReference) -> tuple[ServingPlan, LoadedModel]:
        """Give a reference's plan and weights, loaded if they were not, and count a user, for whom they stay."""
        plan = await self._find_plan(reference)
        while plan.weights not in self._models:  # they may have been unloaded again before this task went on
            await self._load_once(f"model {plan.weights}", lambda: self._load_model(plan, reference))
        model = self._models[plan.weights]
        model.users += 1
        model.last_use = time.monotonic()
        return plan, model

    def _leave(self, model: LoadedModel) -> None:
        model.users -= 1
        if model.users == 0 and model.is_forgotten:
            for weights in [weights for weights, loaded in self._models.items() if loaded is model]:
                removal = asyncio.get_running_loop().create_task(self._unload(weights))
                self._removals.add(removal)
                removal.add_done_callback(self._removals.discard)

    async def _find_plan(self, reference: ModelReference) -> ServingPlan:
        """Give how a reference is served; looked up once for each version, whose files never change."""
        if reference.adapter_path is None:
            return ServingPlan("", Weights(reference.base_model))
        name = name_version(reference)
        if name not in self._plans:
            plan = await asyncio.to_thread(make_plan, reference, self._versions, self._options.max_adapter_ranks)
            self._plans[name] = plan
            while len(self._plans) > MAX_KEPT_PLANS:
                del self._plans[next(iter(self._plans))]
            return plan
        return self._plans[name]

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

    async def _load_model(self, plan: ServingPlan, reference: ModelReference) -> None:
        loop = asyncio.get_running_loop()
        files = await loop.run_in_executor(self._loader, find_files, plan, reference, self._base_models, self._versions)
        await self._keep_budget(files.size_bytes)
        model = await loop.run_in_executor(self._loader, load_model, files, plan, self._options)
        await self._stepper.add(model.batch)
        model.last_use = time.monotonic()
        self._models[plan.weights] = model
        # Once more: the files' size was a guess, and another load may have ended meanwhile.
        await self._keep_budget(0, newest=plan.weights)

    async def _keep_budget(self, needed_bytes: int, newest: Weights | None = None) -> None:
        """Unload what was used longest ago and is idle, until what stays and what comes are within the budget."""
        idle = [(model.last_use, weights) for weights, model in self._models.items() if model.users == 0 and weights != newest]
        for _, weights in sorted(idle, key=lambda entry: entry[0]):
            if sum(model.decoder.weight_bytes for model in self._models.values()) + needed_bytes <= self._max_model_bytes:
                return
            if weights in self._models and self._models[weights].users == 0:
                await self._unload(weights)

    async def _unload(self, weights: Weights) -> None:
        model = self._models.pop(weights, None)
        if model is not None:
            await self._stepper.remove(model.batch)

    async def _find_adapter(self, reference: ModelReference, plan: ServingPlan, model: LoadedModel) -> LoadedAdapter | None:
        if plan.addition is Addition.NOTHING:
            return None
        adapter = model.adapters.get(plan.name)
        if adapter is None:
            adapter = await self._load_once(f"adapter {plan.name} of {id(model)}", lambda: self._load_adapter(reference, plan, model))
        model.adapters[plan.name] = adapter
        model.adapters.move_to_end(plan.name)
        while len(model.adapters) > MAX_KEPT_ADAPTERS:
            model.adapters.popitem(last=False)
        return adapter

    async def _load_adapter(self, reference: ModelReference, plan: ServingPlan, model: LoadedModel) -> LoadedAdapter:
        def read() -> AdapterFiles:
            return read_adapter(plan, self._versions.open(reference.adapter_path or "", reference.manifest_sha256).directory, model)

        files = await asyncio.get_running_loop().run_in_executor(self._loader, read)
        prefix = files.prefix
        if files.embeddings is not None:
            # The model belongs to the stepper: a pass of anyone else would mix with its own.
            prefix = await self._stepper.call(partial(model.decoder.compute_prefix, files.embeddings))
        return LoadedAdapter(reference.model_id, files.voice, files.matrices, prefix)
