"""The composition root: builds each role from its parts, and imports a role's parts in that role only.

The one module that knows every concrete class.
"""

import asyncio
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from server.domain.base_models import BASE_MODELS
from server.domain.catalogue import EMBEDDING_MODELS
from server.domain.cross_encoders import CROSS_ENCODERS
from server.domain.embeddings import EmbeddingBackend
from server.logs import configure_logging
from server.settings import Settings

if TYPE_CHECKING:
    from server.api.server import ApiServer, Services
    from server.basemodels.sources import BaseModelSource
    from server.childprocess import Emit, Signals
    from server.db.database import PostgresDatabase
    from server.db.feed import PostgresJobFeed
    from server.domain.orders import BatchOrder, Order
    from server.inference.client import EngineClient
    from server.inference.engine import EmbeddedEngine
    from server.inference.routing import RoutedEngine
    from server.services.references import References
    from server.storage.artefacts import ArtefactStore
    from server.storage.files import LocalFiles
    from server.storage.mirror import Mirror
    from server.storage.objects import RemoteObjects

# The engine's models may take this share of the machine's memory; training jobs and the database need the rest.
ENGINE_MEMORY_SHARE = 0.4
# And its embedding models and cross-encoders together this one.
ENCODERS_MEMORY_SHARE = 0.2
WEIGHT_HASHES = "weight-hashes"  # of embedding models, below the cache: a few kilobytes each
TOKEN_CACHE_BYTES = 4 << 30  # some 500 million tokens of datasets that were trained on, oldest use dropped first
STOP_GRACE_SECONDS = 5.0  # for calls that run when the api is told to stop
HEALTH_SECONDS = 2.0  # how often the engine is asked whether it lives
# Every row carries its organization; until callers are told apart there is this one.
ORGANIZATION = "default"
# They ask at their start whether a remote storage takes what they write. Children find out when they write.
_STORING_ROLES = ("up", "api", "worker")


def run(role: str, settings: Settings, *, events_fd: int | None, ready_fd: int | None) -> int:
    """Run a role to its end; return the exit code."""
    configure_logging(role, settings.log_level)
    if role in _STORING_ROLES and (problem := _check_storage(settings)):
        print(problem, file=sys.stderr)
        return 2
    if role == "up":
        from server.launcher.up import run_up

        return asyncio.run(run_up(settings))
    if role in ("train", "index", "batch"):
        return _run_child(role, settings, events_fd if events_fd is not None else sys.stdout.fileno())
    if role == "engine":
        return asyncio.run(_until_stopped(lambda stop: _run_engine(settings, stop, ready_fd)))
    if settings.database_url is None:
        print(f"DATABASE_URL must be set for the role {role}: only `up` brings a PostgreSQL of its own.", file=sys.stderr)
        return 2
    if role == "migrate":
        from server.db.migrate import migrate

        migrate(settings.database_url)
        return 0
    serve = _run_api if role == "api" else _run_worker
    return asyncio.run(_until_stopped(lambda stop: serve(settings, stop, ready_fd)))


async def _until_stopped(work: Callable[[asyncio.Event], Coroutine[Any, Any, None]]) -> int:
    """Run `work` with an event that SIGTERM or Ctrl-C sets."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await work(stop)
    return 0


async def _run_api(settings: Settings, stop: asyncio.Event, ready_fd: int | None) -> None:
    from server.api.server import ApiServer
    from server.childprocess import announce_ready
    from server.db.database import PostgresDatabase
    from server.db.feed import PostgresJobFeed
    from server.inference.client import EngineClient
    from server.services.preloading import Preloader
    from server.services.references import References

    assert settings.database_url is not None
    database = PostgresDatabase(settings.database_url, application_name="model-training-api")
    feed = PostgresJobFeed(database)
    engine = EngineClient(settings.engine_socket)
    references = References(database, _make_source(settings))
    services = _build_services(settings, database, feed, engine, references)
    server = ApiServer(services, ORGANIZATION, f"{settings.bind_address}:{settings.grpc_port}")
    try:
        await server.start()
        announce_ready(ready_fd)
        preloader = Preloader(engine, references, settings.preload_models or (), settings.pinned_models or ())
        watches = [asyncio.create_task(_report_engine_health(engine, server)), asyncio.create_task(preloader.run(ORGANIZATION))]
        await stop.wait()
        for watch in watches:
            watch.cancel()
        await server.stop(STOP_GRACE_SECONDS)
    finally:
        await engine.close()
        await feed.close()
        await database.close()


def _build_services(
    settings: Settings, database: "PostgresDatabase", feed: "PostgresJobFeed", engine: "EngineClient", references: "References"
) -> "Services":
    """Build the use cases of the api from their parts."""
    from server.api.server import Services
    from server.datafiles.importing import ImportRoot, ImportRoots
    from server.datafiles.inspector import InspectionProcesses
    from server.launcher.machine import measure_machine
    from server.services.batch_generation import BatchGeneration
    from server.services.datasets import Datasets
    from server.services.documents import Documents
    from server.services.estimating import Estimator
    from server.services.fine_tuning import FineTuning
    from server.services.inference_service import InferenceService
    from server.services.job_control import JobControl
    from server.services.model_service import ModelService
    from server.services.previews import Previews
    from server.services.rag_models import RagModels
    from server.services.record_lengths import LengthMeasurer
    from server.services.retrieval import Retrieval
    from server.services.retrieval_evaluation import RetrievalEvaluator
    from server.services.training_parameters import FineTuneDefaults
    from server.services.training_service import TrainingService
    from server.services.versions import Versions
    from server.storage.downloads import ArtefactDownloads

    files = _open_files(settings)
    base_models = _make_source(settings)
    hub = {"token": settings.hub_token, "endpoint": settings.hub_endpoint}
    sources = ImportRoots([ImportRoot.parse(root) for root in settings.dataset_import_roots or ()], {"hf": hub})
    datasets = Datasets(database, files, InspectionProcesses(), sources, settings.max_dataset_bytes)
    documents = Documents(database, files, sources, settings.max_document_bytes)
    defaults = FineTuneDefaults(settings.default_batch_size, settings.default_learning_rate)
    estimator = Estimator(base_models, measure_machine(settings.training_memory_bytes), LengthMeasurer(base_models, engine))
    fine_tuning = FineTuning(database, datasets, base_models, defaults, estimator)
    retrieval = Retrieval(database, engine)
    artefacts = ArtefactDownloads(_open_artefacts(settings))
    return Services(
        models=ModelService(
            database,
            files,
            engine,
            base_models,
            fine_tuning,
            RagModels(database, base_models, EmbeddingBackend(settings.embedding_backend)),
            documents,
        ),
        training=TrainingService(database, feed, datasets, JobControl(database, files)),
        inference=InferenceService(engine, references, retrieval, RetrievalEvaluator(database, retrieval, files)),
        versions=Versions(database, files, artefacts, engine),
        previews=Previews(database, engine, base_models),
        batches=BatchGeneration(database, references, artefacts),
    )


async def _report_engine_health(engine: "EngineClient", server: "ApiServer") -> None:
    """Let the health of the inference service follow the engine's."""
    from server.domain.errors import ServiceError

    while True:
        try:
            await engine.describe()
            is_serving = True
        except ServiceError:
            is_serving = False
        await server.report_health("modeltraining.v1.InferenceService", is_serving)
        await asyncio.sleep(HEALTH_SECONDS)


async def _run_worker(settings: Settings, stop: asyncio.Event, ready_fd: int | None) -> None:
    from server.childprocess import announce_ready
    from server.db.database import PostgresDatabase
    from server.db.queue import PostgresJobQueue
    from server.db.vector_placement import PostgresVectorTables
    from server.jobs.files import JobFiles
    from server.jobs.localchild import LocalExecution
    from server.jobs.runner import JobRunner, LeaseTerms
    from server.jobs.worker import Worker
    from server.services.job_queue import ClaimLimits

    assert settings.database_url is not None
    database = PostgresDatabase(settings.database_url, application_name="model-training-worker")
    queue = PostgresJobQueue(database)
    files = JobFiles(settings.storage_path, _open_objects(settings))
    terms = LeaseTerms(settings.lease_seconds, settings.heartbeat_seconds, settings.max_job_attempts)
    runner = JobRunner(queue, LocalExecution([sys.executable, "-m", "server"]), files, terms)
    limits = ClaimLimits(settings.max_training_jobs, settings.max_index_jobs, settings.max_batch_jobs)
    worker = Worker(queue, runner, files, limits, terms, PostgresVectorTables(database))
    announce_ready(ready_fd)
    try:
        await worker.run(stop)
    finally:
        await database.close()


async def _run_engine(settings: Settings, stop: asyncio.Event, ready_fd: int | None) -> None:
    import psutil

    from server.childprocess import announce_ready
    from server.datafiles.previewing import Previewer
    from server.inference.batching import BatchLimits
    from server.inference.engine import EmbeddedEngine
    from server.inference.library import LoadingOptions
    from server.inference.server import serve
    from server.rag.embedding import Embedder
    from server.rag.reranking import CrossEncoders
    from server.rag.shelf import Shelf

    _prepare_torch(settings)
    source = _make_source(settings)
    store = _open_artefacts(settings)
    memory_bytes = psutil.virtual_memory().total
    shelf = Shelf(int(memory_bytes * ENCODERS_MEMORY_SHARE))
    embedded = EmbeddedEngine(
        base_models=source,
        versions=store,
        embedder=Embedder(lambda name: source.resolve(name).directory, shelf, hashes_path=settings.cache_path / WEIGHT_HASHES),
        reranker=CrossEncoders(lambda name: source.resolve(name).directory, shelf),
        previewer=Previewer(lambda name: source.resolve(name).directory, store.locate),
        options=LoadingOptions(BatchLimits(settings.max_concurrent_generations, settings.max_queued_generations, settings.kv_cache_tokens)),
        max_model_bytes=settings.engine_memory_bytes or int(memory_bytes * ENGINE_MEMORY_SHARE),
        idle_seconds=settings.model_idle_seconds,
    )
    engine = _route_engines(settings, embedded, source, store)
    await serve(engine, settings.engine_socket, stop=stop, on_ready=lambda: announce_ready(ready_fd))


def _route_engines(
    settings: Settings, embedded: "EmbeddedEngine", source: "BaseModelSource", store: "ArtefactStore"
) -> "EmbeddedEngine | RoutedEngine":
    """Put the engines that are configured beside the embedded one, each made once; the embedded one alone where there are none."""
    from server.inference.openai.connection import Connection
    from server.inference.openai.dialects import Dialect
    from server.inference.openai.engine import OpenAIEngine
    from server.inference.openai.voices import Voices
    from server.inference.routing import RoutedEngine, StoppableGenerator
    from server.inference.vllm.engine import VllmEngine, VllmOptions
    from server.launcher.leash import leash_command

    engines: dict[str, StoppableGenerator] = {"embedded": embedded}
    max_requests, silence_seconds = settings.max_concurrent_generations + settings.max_queued_generations, settings.engine_silence_seconds

    def make(name: str) -> StoppableGenerator:
        if name == "vllm":
            options = VllmOptions(
                settings.vllm_python, settings.vllm_arguments or (), settings.engine_socket.parent,
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
    routes = {source.canonical_name(base_model): find(name) for base_model, name in settings.engine_routes or ()}
    return RoutedEngine(embedded, default, routes) if len(engines) > 1 else embedded


def _run_child(role: str, settings: Settings, events_fd: int) -> int:
    from server.childprocess import run_child
    from server.domain.orders import BatchOrder, ExportOrder, FineTuneOrder, IndexOrder

    if role != "batch":
        _prepare_torch(settings)
    source = _make_source(settings)

    def work(order: "Order", emit: "Emit", signals: "Signals") -> None:
        if isinstance(order, FineTuneOrder) and role == "train":
            from server.datafiles.tokencache import TokenCache
            from server.training.run import run_fine_tune

            cache = TokenCache(settings.cache_path / "tokens", TOKEN_CACHE_BYTES)
            run_fine_tune(order, _open_artefacts(settings), source, emit, signals, cache)
        elif isinstance(order, ExportOrder) and role == "train":
            from server.training.export import run_export

            run_export(order, _open_artefacts(settings), source, emit, signals)
        elif isinstance(order, IndexOrder) and role == "index":
            from server.rag.embedding import Embedder
            from server.rag.index_child import run_index
            from server.rag.parsing.document import Limits

            files = _open_files(settings)
            embedder = Embedder(lambda name: source.resolve(name).directory, hashes_path=settings.cache_path / WEIGHT_HASHES)
            limits = Limits(file_bytes=settings.max_document_bytes)
            run_index(
                order, settings.storage_path, embedder, emit, signals.should_stop,
                fetch=lambda path: asyncio.run(files.fetch(path)), limits=limits,
            )  # fmt: skip
        elif isinstance(order, BatchOrder) and role == "batch":
            asyncio.run(_answer_batch(settings, order, emit, signals))
        else:
            raise ValueError(f"the role {role} does not take an order of kind {order.kind}")

    return run_child(work, events_fd)


async def _answer_batch(settings: Settings, order: "BatchOrder", emit: "Emit", signals: "Signals") -> None:
    from server.batches.batch_child import BatchParts, run_batch
    from server.inference.client import EngineClient

    engine = EngineClient(settings.engine_socket)
    # People's requests come first where there is a queue; where there is none they find half of the places free.
    concurrency = max(1, settings.max_concurrent_generations // 2)
    try:
        parts = BatchParts(_open_artefacts(settings), _open_files(settings).fetch, engine, concurrency)
        await run_batch(order, parts, emit, signals)
    finally:
        await engine.close()


def _open_objects(settings: Settings) -> "RemoteObjects | None":
    """Give the remote storage, or None where the storage is a directory."""
    from server.storage.objects import RemoteObjects

    return RemoteObjects(settings.storage_url) if settings.storage_url else None


def _open_mirror(settings: Settings, objects: "RemoteObjects") -> "Mirror":
    from server.storage.mirror import Mirror

    settings.storage_path.mkdir(parents=True, exist_ok=True)
    return Mirror(settings.storage_path, objects, settings.storage_cache_bytes)


def _open_artefacts(settings: Settings) -> "ArtefactStore":
    from server.storage.artefacts import ArtefactStore
    from server.storage.remote import RemoteArtefactStore

    objects = _open_objects(settings)
    return RemoteArtefactStore(_open_mirror(settings, objects)) if objects else ArtefactStore(settings.storage_path)


def _open_files(settings: Settings) -> "LocalFiles":
    from server.storage.files import LocalFiles
    from server.storage.remote_files import RemoteFiles

    objects = _open_objects(settings)
    return RemoteFiles(_open_mirror(settings, objects)) if objects else LocalFiles(settings.storage_path)


def _check_storage(settings: Settings) -> str | None:
    """Say why the storage cannot be used; None where it can."""
    from server.domain.errors import ServiceError

    objects = _open_objects(settings)
    try:
        if objects is not None:
            objects.check()
    except ServiceError as error:
        return f"MODEL_STORAGE_PATH: {error}"
    return None


def _prepare_torch(settings: Settings) -> None:
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]  # bars have no place in a log of JSON lines
    if settings.torch_threads:
        torch.set_num_threads(settings.torch_threads)


def _make_source(settings: Settings) -> "BaseModelSource":
    from server.basemodels.sources import BaseModelSource

    return BaseModelSource(
        settings.cache_path,
        allowed_local_roots=settings.local_models_paths,
        aliases=dict(_list_aliases()),
        hub_token=settings.hub_token,
        hub_endpoint=settings.hub_endpoint,
    )


def _list_aliases() -> list[tuple[str, str]]:
    bases = [(alias, model.base_model_id) for model in BASE_MODELS for alias in model.aliases]
    cross_encoders = [(alias, model.cross_encoder_id) for model in CROSS_ENCODERS for alias in model.aliases]
    return bases + cross_encoders + [(alias, model.embedding_model_id) for model in EMBEDDING_MODELS for alias in model.aliases]
