"""The vllm engine: a vLLM server of its own for each base model that is asked for, started on first use."""

import asyncio
import hashlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from server.domain.engines import EngineStatus
from server.domain.errors import FailedPrecondition
from server.domain.generation import GenerationFinished, GenerationRequest, ModelReference, QuotedText, RenderedPrompt, TokenEvent
from server.inference.openai.connection import Connection
from server.inference.openai.dialects import Dialect
from server.inference.openai.engine import OpenAIEngine
from server.inference.openai.voices import BaseModelDescriptions, Voices
from server.inference.plans import VersionFiles
from server.inference.vllm.process import VllmProcess
from server.inference.vllm.turns import Turns

# Overridden by the deployment's own arguments, which come after them.
ARGUMENTS = ("--enable-lora", "--max-lora-rank", "64", "--scheduling-policy", "priority", "--disable-uvicorn-access-log")

# On CPUs its kernels give the base model's requests the adapter of others in their batch (https://github.com/vllm-project/vllm/pull/48421).
ASK_DEVICE = "from vllm.platforms import current_platform; print(current_platform.device_type)"

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


@dataclass(frozen=True)
class _Running:
    """A base model's server, the engine over it, and whose turn it is where the base model and its versions must not run together."""

    process: VllmProcess
    engine: OpenAIEngine
    turns: Turns | None


class VllmEngine:
    """Implements the Generator port. All methods belong to one event loop, that of the main thread; `stop` last."""

    def __init__(self, base_models: BaseModelDescriptions, versions: VersionFiles, options: VllmOptions) -> None:
        self._base_models, self._options = base_models, options
        self._voices = Voices(base_models, versions)
        self._running: dict[str, _Running] = {}
        self._starting = asyncio.Lock()
        self._instance = secrets.token_hex(8)
        self._is_on_cpu: bool | None = None

    async def stop(self) -> None:
        """End all servers."""
        for base_model in list(self._running):
            await self._end(base_model)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent]:
        """Stream deltas, then GenerationFinished; closing the iterator makes vLLM stop."""
        began = time.monotonic()
        running = await self._find(request.model.base_model)
        found = time.monotonic()
        turn = nullcontext() if running.turns is None else running.turns.take(is_version=request.model.adapter_path is not None)
        async with turn:
            waits = found - began, time.monotonic() - found
            async with aclosing(running.engine.generate(request)) as events:
                async for event in events:
                    yield _add_waits(event, *waits) if isinstance(event, GenerationFinished) else event

    async def count_tokens(self, model: ModelReference, texts: Sequence[str]) -> Sequence[int]:
        """Count tokens by the model's own tokenizer, without special tokens."""
        return await (await self._find(model.base_model)).engine.count_tokens(model, texts)

    async def render(self, request: GenerationRequest) -> RenderedPrompt:
        """Give what the model would be given for a request; a prompt over the context is no error here."""
        return await (await self._find(request.model.base_model)).engine.render(request)

    async def quote_texts(self, model: ModelReference, texts: Sequence[str]) -> Sequence[QuotedText]:
        """Break what the model's tokenizer or chat template would take for more than text."""
        return await (await self._find(model.base_model)).engine.quote_texts(model, texts)

    async def read_context_tokens(self, model: ModelReference) -> int:
        """Give what a prompt and its answer may take together, in tokens."""
        return await (await self._find(model.base_model)).engine.read_context_tokens(model)

    async def load(self, model: ModelReference, *, pinned: bool = False) -> None:
        """Start the base model's server and give it a version's adapter. It stays until it is unloaded, pinned or not."""
        await (await self._find(model.base_model)).engine.load(model, pinned=pinned)

    async def unload(self, model: ModelReference) -> None:
        """Let a version's adapter go, or end a base model's server: what runs there fails, for vLLM has one process for all."""
        if model.adapter_path is None:
            await self._end(model.base_model)
        elif model.base_model in self._running:
            await self._running[model.base_model].engine.unload(model)

    async def forget(self, model_id: str) -> None:
        """Drop what is loaded for a deleted model."""
        for running in self._running.values():
            if running.process.is_ready:
                await running.engine.forget(model_id)

    async def describe(self) -> EngineStatus:
        """Tell what all servers hold; one that loads holds nothing yet. Raises Unavailable while one is dead."""
        statuses = []
        for running in list(self._running.values()):
            if running.process.is_ready:
                statuses.append(await running.engine.describe())
            elif running.process.deaths:
                raise running.process.explain_death()
        models = tuple(model for status in statuses for model in status.models)
        quarantined = sorted({model_id for status in statuses for model_id in status.quarantined})
        return EngineStatus("-".join([self._instance, *(status.instance for status in statuses)]), models, quarantined)

    async def _find(self, base_model: str) -> _Running:
        """Give a base model's server, started if there is none; waits until it serves."""
        if base_model not in self._running:
            async with self._starting:
                if base_model not in self._running:
                    directory = (await asyncio.to_thread(self._base_models.resolve, base_model)).directory
                    if self._is_on_cpu is None:
                        self._is_on_cpu = await self._ask_device() == "cpu"
                    self._running[base_model] = self._start(base_model, directory)
        running = self._running[base_model]
        await running.process.wait_ready()
        return running

    async def _ask_device(self) -> str:
        """Give vLLM's own word for what it computes on. Raises FailedPrecondition where there is no vLLM."""
        process = await asyncio.create_subprocess_exec(str(self._options.python), "-c", ASK_DEVICE, stdout=asyncio.subprocess.PIPE)
        printed, _ = await process.communicate()
        if process.returncode != 0:
            raise FailedPrecondition("There is no vLLM that runs in VLLM_PYTHON.", reason="VLLM_MISSING")
        return printed.split()[-1].decode()

    def _start(self, base_model: str, directory: Path) -> _Running:
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
        return _Running(process, engine, Turns() if self._is_on_cpu else None)

    async def _end(self, base_model: str) -> None:
        running = self._running.pop(base_model, None)
        if running is not None:
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
