"""Who is in memory: models and adapters are loaded on first use, stay while somebody uses them, and leave by last use (memory.py).

A version whose files fail is quarantined: until it is looked at again only its own requests fail.
Belongs to one event loop; loading itself happens in a thread.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from server.basemodels.errors import BaseModelUnavailable
from server.domain.engines import ModelStatus
from server.domain.generation import ModelReference
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
from server.inference.memory import Holding, MemoryBudget
from server.inference.passingthread import PassingThread
from server.inference.plans import Addition, ServingPlan, VersionFiles, Weights, make_plan, name_version, plan_base
from server.inference.quarantine import Quarantine
from server.inference.stepping import Stepper
from server.inference.voice import Voice

T = TypeVar("T")
# Adapters that nobody uses and whose matrices stay in memory beside the pool, if the memory budget has room for so many: those of rank 16
# of a 7B model take some 160 MB as float32, those of rank 256 sixteen times that.
MAX_KEPT_ADAPTERS = 32
# What was found out about versions: a few hundred bytes each.
MAX_KEPT_PLANS = 4096

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Use:
    """A model in use, the adapter that goes with it, and how long the user waited for each, in seconds."""

    model: LoadedModel
    adapter: LoadedAdapter | None
    load_seconds: float
    adapter_load_seconds: float

    @property
    def voice(self) -> Voice:
        """The tokenizer and template that the version was trained with, else the weights' own."""
        return self.model.voice if self.adapter is None else self.adapter.voice


class Residents:
    """Models and adapters in memory. `stepper` steps their batches; both count against `memory`."""

    def __init__(
        self,
        stepper: Stepper,
        *,
        base_models: BaseModelResolver,
        versions: VersionFiles,
        options: LoadingOptions,
        memory: MemoryBudget,
    ) -> None:
        self._stepper, self._base_models, self._versions = stepper, base_models, versions
        self._options, self._memory = options, memory
        memory.join(self)
        self._models: dict[Weights, LoadedModel] = {}
        self._plans: dict[str, ServingPlan] = {}
        self._revisions: dict[str, str] = {}  # of base models as they are: what their files were when they were looked at
        self._pins: dict[str, Weights] = {}  # by the plan's name, or the base model's
        self._quarantine = Quarantine()
        self._loads: dict[str, asyncio.Task[Any]] = {}
        self._removals: set[asyncio.Task[None]] = set()
        # One load at a time: two large models that load together need twice the memory at its peak.
        self._loader = PassingThread("engine-loads")

    def stop(self) -> None:
        """Load nothing more."""
        self._loader.shutdown(wait=False, cancel_futures=True)

    @asynccontextmanager
    async def use(self, reference: ModelReference) -> AsyncIterator[Use]:
        """Give a reference's weights and adapter, loaded if they were not; they stay until the block ends. Raises ServiceError."""
        start = time.monotonic()
        plan, model = await self._enter(reference)
        adapter: LoadedAdapter | None = None
        try:
            entered = time.monotonic()
            adapter = await self._find_adapter(reference, plan, model)
            yield Use(model, adapter, entered - start, time.monotonic() - entered)
        finally:
            self._leave(model, adapter)

    async def load(self, reference: ModelReference, *, pinned: bool) -> None:
        """Load what a reference needs; pinned, it stays until `unload` or `forget`."""
        async with self.use(reference):
            plan = await self._find_plan(reference)
            if pinned:
                self._pins[_name(reference, plan)] = plan.weights

    async def unload(self, reference: ModelReference) -> None:
        """Drop a reference's adapter and pin, and weights of its own once nobody uses them. Weights that others share stay."""
        plan = await self._find_plan(reference)
        self._pins.pop(_name(reference, plan), None)
        model = self._models.get(plan.weights)
        if model is None:
            return
        await self._drop_adapters(model, [plan.name])
        if plan.weights.version or not plan.name:
            await self._retire(plan.weights, model)

    async def forget(self, model_id: str) -> None:
        """Drop a deleted model's adapters and weights, and a base model of that name that nobody uses. Running requests end undisturbed."""
        self._quarantine.forget(model_id)
        for weights, model in list(self._models.items()):
            names = [name for name, adapter in model.adapters.items() if adapter.model_id == model_id]
            for name in names:
                self._pins.pop(name, None)
            await self._drop_adapters(model, names)
            if weights.model_id == model_id:
                self._pins.pop(weights.version, None)
                await self._retire(weights, model)
            elif replace(weights, revision="") == Weights(model_id) and model.users == 0:
                await self._unload(weights)

    def list_holdings(self) -> Sequence[Holding]:
        """Give all weights that are loaded, and all adapters beside them."""
        holdings: list[Holding] = []
        for weights, model in self._models.items():
            unload = partial(self._unload, weights)
            holdings.append(Holding(weights.base_model, model.decoder.weight_bytes, model.last_use, self._may_leave(weights), unload))
            for name, adapter in model.adapters.items():
                drop = partial(self._drop_adapters, model, [name])
                holdings.append(Holding(adapter.model_id, adapter.size_bytes, adapter.last_use, self._is_spare(name, adapter), drop))
        return holdings

    def describe(self) -> Sequence[ModelStatus]:
        """Tell what is loaded and how busy it is."""
        pinned = set(self._pins.values())
        return tuple(
            ModelStatus(
                base_model=weights.base_model,
                variant=weights.variant,
                weight_bytes=model.decoder.weight_bytes,
                context_tokens=model.context_tokens,
                adapters_loaded=len(model.adapters),
                running_requests=model.batch.running_count,
                waiting_requests=model.batch.waiting_count,
                reserved_cache_tokens=model.batch.reserved_tokens,
                is_pinned=weights in pinned,
            )
            for weights, model in self._models.items()
        )

    def list_quarantined(self) -> Sequence[str]:
        """Give the ids of the models one of whose versions failed lately."""
        return self._quarantine.list_models()

    async def _enter(self, reference: ModelReference) -> tuple[ServingPlan, LoadedModel]:
        """Give a reference's plan and weights, loaded if they were not, and count a user, for whom they stay."""
        plan = await self._find_plan(reference)
        while plan.weights not in self._models:  # they may have been unloaded again before this task went on
            await self._load_once(f"model {plan.weights}", lambda: self._guard(reference, self._load_model(plan, reference)))
        model = self._models[plan.weights]
        model.users += 1
        model.last_use = time.monotonic()
        return plan, model

    def _leave(self, model: LoadedModel, adapter: LoadedAdapter | None) -> None:
        model.users -= 1
        model.last_use = time.monotonic()
        if adapter is not None:
            adapter.users -= 1
            adapter.last_use = model.last_use
        if model.users == 0 and model.is_forgotten:
            for weights in [weights for weights, loaded in self._models.items() if loaded is model]:
                removal = asyncio.get_running_loop().create_task(self._unload(weights))
                self._removals.add(removal)
                removal.add_done_callback(self._removals.discard)

    async def _find_plan(self, reference: ModelReference) -> ServingPlan:
        """Give how a reference is served; looked up once for each version, whose files never change."""
        if reference.adapter_path is None:
            return plan_base(reference.base_model, await self._find_revision(reference.base_model))
        name = name_version(reference)
        self._quarantine.check(name)
        plan = self._plans.get(name)
        if plan is None:
            making = asyncio.to_thread(make_plan, reference, self._versions, self._options.max_adapter_ranks)
            self._plans[name] = plan = await self._guard(reference, making)
            while len(self._plans) > MAX_KEPT_PLANS:
                del self._plans[next(iter(self._plans))]
        if plan.needs_base and not plan.weights.revision:
            return replace(plan, weights=replace(plan.weights, revision=await self._find_revision(reference.base_model)))
        return plan

    async def _find_revision(self, base_model: str) -> str:
        """Give the revision of a base model's files: of those in memory, while they are, or else of those that lie here."""

        async def look() -> str:
            loop = asyncio.get_running_loop()
            self._revisions[base_model] = (await loop.run_in_executor(self._loader, self._base_models.resolve, base_model)).revision
            return self._revisions[base_model]

        known = self._revisions.get(base_model)
        return known if known is not None else await self._load_once(f"revision {base_model}", look)

    def _forget_revision(self, weights: Weights) -> None:
        if self._revisions.get(weights.base_model) == weights.revision:
            del self._revisions[weights.base_model]

    async def _guard(self, reference: ModelReference, work: Coroutine[Any, Any, T]) -> T:
        """Quarantine the version whose files fail in this work: they are not tried again for each request."""
        async with self._quarantine.guard(reference):
            return await work

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
        try:
            files = await loop.run_in_executor(self._loader, find_files, plan, reference, self._base_models, self._versions)
        except BaseModelUnavailable:
            self._forget_revision(plan.weights)  # the next request looks at the files again
            raise
        needed = await loop.run_in_executor(self._loader, files.measure_bytes, self._options)
        async with self._memory.reserve(needed):
            logger.info("loading %s, about %d MiB of weights", reference.base_model, needed >> 20)
            model = await loop.run_in_executor(self._loader, load_model, files, plan, self._options)
            await self._stepper.add(model.batch)
            model.last_use = time.monotonic()
            self._models[plan.weights] = model

    def _may_leave(self, weights: Weights) -> bool:
        return self._models[weights].users == 0 and weights not in self._pins.values()

    def _is_spare(self, name: str, adapter: LoadedAdapter) -> bool:
        return adapter.users == 0 and name not in self._pins

    async def _retire(self, weights: Weights, model: LoadedModel) -> None:
        """Unload weights now, or with their last user."""
        model.is_forgotten = True
        if model.users == 0:
            await self._unload(weights)

    async def _unload(self, weights: Weights) -> None:
        model = self._models.pop(weights, None)
        if model is not None:
            self._forget_revision(weights)
            await self._stepper.remove(model.batch)

    async def _drop_adapters(self, model: LoadedModel, names: Sequence[str]) -> None:
        for name in names:
            model.adapters.pop(name, None)
            await self._stepper.call(partial(model.decoder.adapters.evict, name))

    async def _find_adapter(self, reference: ModelReference, plan: ServingPlan, model: LoadedModel) -> LoadedAdapter | None:
        if plan.addition is Addition.NOTHING:
            return None
        adapter = model.adapters.get(plan.name)
        if adapter is None:
            key = f"adapter {plan.name} of {id(model)}"
            adapter = await self._load_once(key, lambda: self._guard(reference, self._load_adapter(reference, plan, model)))
        adapter.users += 1
        model.adapters[plan.name] = adapter  # it may have left again before this task went on
        model.adapters.move_to_end(plan.name)
        for name in [name for name, kept in model.adapters.items() if self._is_spare(name, kept)][:-MAX_KEPT_ADAPTERS]:
            del model.adapters[name]
        return adapter

    async def _load_adapter(self, reference: ModelReference, plan: ServingPlan, model: LoadedModel) -> LoadedAdapter:
        def read() -> AdapterFiles:
            return read_adapter(plan, self._versions.open(reference.adapter_path or "", reference.manifest_sha256), model)

        files = await asyncio.get_running_loop().run_in_executor(self._loader, read)
        prefix = files.prefix
        if files.embeddings is not None:
            # The model belongs to the stepper: a pass of anyone else would mix with its own.
            prefix = await self._stepper.call(partial(model.decoder.compute_prefix, files.embeddings))
        adapter = LoadedAdapter(reference.model_id, files.voice, files.matrices, prefix)
        # Only now: from a file's size one cannot tell what its adapter unfolds to (VeRA's is a fraction of it).
        async with self._memory.reserve(adapter.size_bytes):
            model.adapters[plan.name] = adapter
        return adapter


def _name(reference: ModelReference, plan: ServingPlan) -> str:
    return plan.name or reference.base_model
