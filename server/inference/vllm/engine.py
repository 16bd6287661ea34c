"""The vllm engine: a vLLM server of its own for each base model that is asked for, started on first use, ended when it is idle.

Servers take their part of a budget of memory: on CPUs of the one that all engines of this machine share, else of their device's own.
"""

import asyncio
import hashlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from server.domain.engines import EngineStatus, ModelStatus
from server.domain.errors import Unavailable
from server.domain.generation import GenerationFinished, GenerationRequest, ModelReference, QuotedText, RenderedPrompt, TokenEvent
from server.inference.memory import Holding, MemoryBudget
from server.inference.openai.connection import Connection
from server.inference.openai.dialects import Dialect
from server.inference.openai.engine import OpenAIEngine
from server.inference.openai.voices import BaseModelDescriptions, Voices
from server.inference.plans import VersionFiles
from server.inference.vllm.device import Device, find_device, measure_weights
from server.inference.vllm.process import VllmProcess
from server.inference.vllm.turns import Turns

# Overridden by the deployment's own arguments, which come after them.
ARGUMENTS = ("--enable-lora", "--max-lora-rank", "64", "--scheduling-policy", "priority", "--disable-uvicorn-access-log")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class VllmOptions:
    """How vLLM is run. `python` has it installed; `leash` wraps a command so that it ends with this process."""

    python: Path
    arguments: Sequence[str]
    sockets: Path
    leash: Callable[[Sequence[str]], Sequence[str]]
    max_requests: int
    silence_seconds: float


@dataclass
class _Running:
    """A base model's server, the engine over it, and whose turn it is where the base model and its versions must not run together."""

    process: VllmProcess
    engine: OpenAIEngine
    turns: Turns | None
    weight_bytes: int
    memory_bytes: int  # what it takes of the budget
    users: int = 0
    last_use: float = field(default_factory=time.monotonic)
    pins: set[ModelReference] = field(default_factory=set)


class VllmEngine:
    """Implements the Generator port. All methods belong to one event loop, that of the main thread; `stop` last.

    On CPUs its servers' weights count against `memory`; they leave by its rules everywhere.
    """

    def __init__(self, base_models: BaseModelDescriptions, versions: VersionFiles, options: VllmOptions, memory: MemoryBudget) -> None:
        self._base_models, self._options, self._memory = base_models, options, memory
        self._voices = Voices(base_models, versions)
        self._running: dict[str, _Running] = {}
        self._starting = asyncio.Lock()
        self._instance = secrets.token_hex(8)
        self._ended_losses = 0  # of servers that were ended since
        self._device: Device | None = None
        self._sweeper: asyncio.Task[None] | None = None

    async def stop(self) -> None:
        """End all servers."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        for base_model in list(self._running):
            await self._end(base_model)

    def list_holdings(self) -> Sequence[Holding]:
        """Give what the servers take of the budget, those that are still starting too."""
        return [
            Holding(base_model, running.memory_bytes, running.last_use, not (running.users or running.pins), partial(self._end, base_model))
            for base_model, running in self._running.items()
        ]

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent]:
        """Stream deltas, then GenerationFinished; closing the iterator makes vLLM stop."""
        began = time.monotonic()
        async with self._use(request.model) as running:
            found = time.monotonic()
            turn = nullcontext() if running.turns is None else running.turns.take(is_version=request.model.adapter_path is not None)
            async with turn:
                waits = found - began, time.monotonic() - found
                async with aclosing(running.engine.generate(request)) as events:
                    async for event in events:
                        yield _add_waits(event, *waits) if isinstance(event, GenerationFinished) else event

    async def count_tokens(self, model: ModelReference, texts: Sequence[str]) -> Sequence[int]:
        """Count tokens by the model's own tokenizer, without special tokens."""
        async with self._use(model) as running:
            return await running.engine.count_tokens(model, texts)

    async def render(self, request: GenerationRequest) -> RenderedPrompt:
        """Give what the model would be given for a request; a prompt over the context is no error here."""
        async with self._use(request.model) as running:
            return await running.engine.render(request)

    async def quote_texts(self, model: ModelReference, texts: Sequence[str]) -> Sequence[QuotedText]:
        """Break what the model's tokenizer or chat template would take for more than text."""
        async with self._use(model) as running:
            return await running.engine.quote_texts(model, texts)

    async def read_context_tokens(self, model: ModelReference) -> int:
        """Give what a prompt and its answer may take together, in tokens."""
        async with self._use(model) as running:
            return await running.engine.read_context_tokens(model)

    async def load(self, model: ModelReference, *, pinned: bool = False) -> None:
        """Start the base model's server and give it a version's adapter; pinned, the server stays until `unload` or `forget`."""
        async with self._use(model) as running:
            await running.engine.load(model, pinned=pinned)
            if pinned:
                running.pins.add(model)

    async def unload(self, model: ModelReference) -> None:
        """Let a version's adapter go, or end a base model's server: what runs there fails, for vLLM has one process for all."""
        if model.adapter_path is None:
            await self._end(model.base_model)
        elif (running := self._running.get(model.base_model)) is not None:
            running.pins.discard(model)
            await running.engine.unload(model)

    async def forget(self, model_id: str) -> None:
        """Drop what is loaded for a deleted model."""
        for running in list(self._running.values()):
            running.pins = {pin for pin in running.pins if pin.model_id != model_id}
            if running.process.is_ready:
                await running.engine.forget(model_id)

    async def describe(self) -> EngineStatus:
        """Tell what all servers hold; one that loads holds nothing yet. Raises Unavailable while one is dead.

        The instance is another one after a server died, not after one was started or ended as it was meant to.
        """
        models, quarantined = list[ModelStatus](), set[str]()
        for base_model, running in list(self._running.items()):
            if running.process.is_ready:
                try:
                    status = await running.engine.describe()
                except Unavailable:
                    if self._running.get(base_model) is not running:
                        continue  # it was ended meanwhile, as it was meant to
                    raise
                models += [replace(model, weight_bytes=running.weight_bytes, is_pinned=bool(running.pins)) for model in status.models]
                quarantined.update(status.quarantined)
            elif running.process.deaths:
                raise running.process.explain_death()
        losses = self._ended_losses + sum(running.process.losses for running in self._running.values())
        return EngineStatus(f"{self._instance}-{losses}", tuple(models), sorted(quarantined))

    @asynccontextmanager
    async def _use(self, model: ModelReference) -> AsyncIterator[_Running]:
        """Give a base model's server, started if there is none, once it serves; it stays until the block ends."""
        while (running := self._running.get(model.base_model)) is None:
            async with self._starting:
                if model.base_model not in self._running:
                    await self._begin(model.base_model)
        running.users += 1
        try:
            await running.process.wait_ready()
            yield running
        finally:
            running.users -= 1
            running.last_use = time.monotonic()

    async def _begin(self, base_model: str) -> None:
        directory = (await asyncio.to_thread(self._base_models.resolve, base_model)).directory
        device = await self._find_device()
        weight_bytes, needed = await asyncio.to_thread(lambda: (measure_weights(directory), device.measure_bytes(directory)))
        async with device.memory.reserve(needed):
            self._running[base_model] = self._start(base_model, directory, weight_bytes, needed)

    async def _find_device(self) -> Device:
        """Ask vLLM once what it computes on, and take part in the budget of that memory from then on."""
        if self._device is None:
            self._device = await find_device(self._options.python, self._options.arguments, self._memory)
            self._device.memory.join(self)
            if self._device.memory is not self._memory:  # which is swept already
                self._sweeper = asyncio.get_running_loop().create_task(self._device.memory.sweep())
        return self._device

    def _start(self, base_model: str, directory: Path, weight_bytes: int, memory_bytes: int) -> _Running:
        options = self._options
        # Short, however long the name is: the path of a socket has at most 107 bytes.
        socket = options.sockets / f"vllm-{hashlib.sha256(base_model.encode()).hexdigest()[:12]}.sock"
        connection = Connection("http://vllm", silence_seconds=options.silence_seconds, uds=socket)
        engine = OpenAIEngine(connection, self._voices, max_requests=options.max_requests, dialect=Dialect.VLLM)
        command = [str(options.python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory)]
        command += ["--served-model-name", base_model, "--uds", str(socket), *ARGUMENTS, *options.arguments]

        async def is_serving() -> bool:
            return bool(await connection.list_models())

        logger.info("starting vLLM for %s", base_model)
        process = VllmProcess(base_model, options.leash(command), socket, is_serving)
        process.start()
        # On CPUs vLLM's kernels give the base model's requests the adapter of others in their batch
        # (https://github.com/vllm-project/vllm/pull/48421).
        turns = Turns() if self._device is not None and self._device.is_cpu else None
        return _Running(process, engine, turns, weight_bytes, memory_bytes)

    async def _end(self, base_model: str) -> None:
        running = self._running.pop(base_model, None)
        if running is not None:
            self._ended_losses += running.process.losses
            await running.process.stop()
            await running.engine.stop()


def _add_waits(end: GenerationFinished, load_seconds: float, queue_seconds: float) -> GenerationFinished:
    timings, waited = end.timings, load_seconds + queue_seconds
    return replace(
        end,
        timings=replace(
            timings,
            queue_seconds=timings.queue_seconds + queue_seconds,
            first_token_seconds=timings.first_token_seconds + waited,
            total_seconds=timings.total_seconds + waited,
            load_seconds=timings.load_seconds + load_seconds,
        ),
    )
