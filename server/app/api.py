"""The api's role: one gRPC server over the use cases, which are built here."""

import asyncio

from server.api.server import ApiServer, Services
from server.app.parts import make_source, open_artefacts, open_files
from server.childprocess import announce_ready
from server.datafiles.importing import ImportRoot, ImportRoots
from server.datafiles.inspector import InspectionProcesses
from server.db.database import PostgresDatabase
from server.db.feed import PostgresJobFeed
from server.domain.embeddings import EmbeddingBackend
from server.domain.errors import ServiceError
from server.inference.client import EngineClient
from server.launcher.machine import measure_machine
from server.services.batch_generation import BatchGeneration
from server.services.datasets import Datasets
from server.services.documents import Documents
from server.services.estimating import Estimator
from server.services.fine_tuning import FineTuning
from server.services.inference_service import InferenceService
from server.services.job_control import JobControl
from server.services.model_service import ModelService
from server.services.preloading import Preloader
from server.services.previews import Previews
from server.services.rag_models import RagModels
from server.services.record_lengths import LengthMeasurer
from server.services.references import References
from server.services.retrieval import Retrieval
from server.services.retrieval_evaluation import RetrievalEvaluator
from server.services.training_parameters import FineTuneDefaults
from server.services.training_service import TrainingService
from server.services.versions import Versions
from server.settings import Settings
from server.storage.downloads import ArtefactDownloads

STOP_GRACE_SECONDS = 5.0  # for calls that run when the api is told to stop
HEALTH_SECONDS = 2.0  # how often the engine is asked whether it lives
# Every row carries its organization; until callers are told apart there is this one.
ORGANIZATION = "default"


async def run_api(settings: Settings, stop: asyncio.Event, ready_fd: int | None) -> None:
    """Serve until `stop` is set."""
    assert settings.database_url is not None
    database = PostgresDatabase(settings.database_url, application_name="model-training-api")
    feed = PostgresJobFeed(database)
    engine = EngineClient(settings.engine_socket)
    references = References(database, make_source(settings))
    services = _build_services(settings, database, feed, engine, references)
    server = ApiServer(services, ORGANIZATION, f"{settings.bind_address}:{settings.grpc_port}")
    try:
        await server.start()
        announce_ready(ready_fd)
        preloader = Preloader(engine, references, settings.preload_models, settings.pinned_models)
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
    settings: Settings, database: PostgresDatabase, feed: PostgresJobFeed, engine: EngineClient, references: References
) -> Services:
    """Build the use cases of the api from their parts."""
    files = open_files(settings)
    base_models = make_source(settings)
    hub = {"token": settings.hub_token, "endpoint": settings.hub_endpoint}
    sources = ImportRoots([ImportRoot.parse(root) for root in settings.dataset_import_roots], {"hf": hub})
    datasets = Datasets(database, files, InspectionProcesses(), sources, settings.max_dataset_bytes)
    documents = Documents(database, files, sources, settings.max_document_bytes)
    defaults = FineTuneDefaults(settings.default_batch_size, settings.default_learning_rate)
    estimator = Estimator(base_models, measure_machine(settings.training_memory_bytes), LengthMeasurer(base_models, engine))
    fine_tuning = FineTuning(database, datasets, base_models, defaults, estimator)
    retrieval = Retrieval(database, engine)
    artefacts = ArtefactDownloads(open_artefacts(settings))
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


async def _report_engine_health(engine: EngineClient, server: ApiServer) -> None:
    """Let the health of the inference service follow the engine's."""
    while True:
        try:
            await engine.describe()
            is_serving = True
        except ServiceError:
            is_serving = False
        await server.report_health("modeltraining.v1.InferenceService", is_serving)
        await asyncio.sleep(HEALTH_SECONDS)
