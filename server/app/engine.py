"""The engine's role: models for generation, embedding and reranking, here or in other servers."""

import asyncio
import signal
from pathlib import Path

import psutil

from server.app.parts import WEIGHT_HASHES, make_source, open_artefacts, prepare_torch
from server.basemodels.sources import BaseModelSource
from server.childprocess import announce_ready
from server.datafiles.previewing import Previewer
from server.inference.batching import BatchLimits
from server.inference.engine import EmbeddedEngine
from server.inference.library import LoadingOptions
from server.inference.openai.connection import Connection
from server.inference.openai.dialects import Dialect
from server.inference.openai.engine import OpenAIEngine
from server.inference.openai.voices import Voices
from server.inference.routing import RoutedEngine, StoppableGenerator
from server.inference.server import serve
from server.inference.vllm.engine import VllmEngine, VllmOptions
from server.launcher.leash import leash_command
from server.rag.embedding import Embedder
from server.rag.reranking import CrossEncoders
from server.rag.shelf import Shelf
from server.settings import Settings
from server.storage.artefacts import ArtefactStore

# The engine's models may take this share of the machine's memory; training jobs and the database need the rest.
ENGINE_MEMORY_SHARE = 0.4
# And its embedding models and cross-encoders together this one.
ENCODERS_MEMORY_SHARE = 0.2


async def run_engine(settings: Settings, stop: asyncio.Event, ready_fd: int | None) -> None:
    """Serve until `stop` is set."""
    prepare_torch(settings)
    source = make_source(settings)
    store = open_artefacts(settings)
    memory_bytes = psutil.virtual_memory().total
    shelf = Shelf(int(memory_bytes * ENCODERS_MEMORY_SHARE))

    def locate(name: str) -> Path:
        return source.resolve(name).directory

    embedded = EmbeddedEngine(
        base_models=source,
        versions=store,
        embedder=Embedder(locate, shelf, hashes_path=settings.cache_path / WEIGHT_HASHES),
        reranker=CrossEncoders(locate, shelf),
        previewer=Previewer(locate, store.locate),
        options=LoadingOptions(BatchLimits(settings.max_concurrent_generations, settings.max_queued_generations, settings.kv_cache_tokens)),
        max_model_bytes=settings.engine_memory_bytes or int(memory_bytes * ENGINE_MEMORY_SHARE),
        idle_seconds=settings.model_idle_seconds,
    )
    engine = _route_engines(settings, embedded, source, store)
    await serve(engine, settings.engine_socket, stop=stop, on_ready=lambda: announce_ready(ready_fd))


def _route_engines(
    settings: Settings, embedded: EmbeddedEngine, source: BaseModelSource, store: ArtefactStore
) -> EmbeddedEngine | RoutedEngine:
    """Put the engines that are configured beside the embedded one, each made once; the embedded one alone where there are none."""
    engines: dict[str, StoppableGenerator] = {"embedded": embedded}
    max_requests, silence_seconds = settings.max_concurrent_generations + settings.max_queued_generations, settings.engine_silence_seconds

    def make(name: str) -> StoppableGenerator:
        if name == "vllm":
            options = VllmOptions(
                settings.vllm_python, settings.vllm_arguments, settings.engine_socket.parent,
                lambda command: leash_command(command, signal.SIGTERM), max_requests, silence_seconds,
            )  # fmt: skip
            return VllmEngine(source, store, options, embedded.memory)
        connection = Connection(name, api_key=settings.engine_api_key, silence_seconds=silence_seconds)
        dialect = Dialect(settings.engine_dialect) if settings.engine_dialect else None
        return OpenAIEngine(connection, Voices(source, store), max_requests=max_requests, dialect=dialect)

    def find(name: str) -> StoppableGenerator:
        if name not in engines:
            engines[name] = make(name)
        return engines[name]

    default = find(settings.engine)
    routes = {source.canonical_name(base_model): find(name) for base_model, name in settings.engine_routes}
    return RoutedEngine(embedded, default, routes) if len(engines) > 1 else embedded
