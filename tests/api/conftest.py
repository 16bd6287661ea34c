"""The api over the real use cases and a real PostgreSQL, with Envoy before it. No engine runs: what needs one is UNAVAILABLE."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from string import Template

import httpx
import pytest
from grpc import aio

from server.api.server import ApiServer, Services
from server.basemodels.sources import BaseModelSource
from server.datafiles.importing import ImportRoot, ImportRoots
from server.datafiles.inspector import InspectionProcesses
from server.db.database import PostgresDatabase
from server.db.feed import PostgresJobFeed
from server.inference.client import EngineClient
from server.services.batch_generation import BatchGeneration
from server.services.datasets import Datasets
from server.services.documents import Documents
from server.services.estimating import Estimator
from server.services.fine_tuning import FineTuning
from server.services.inference_service import InferenceService
from server.services.job_control import JobControl
from server.services.machine import Machine
from server.services.model_service import ModelService
from server.services.previews import Previews
from server.services.rag_models import RagModels
from server.services.record_lengths import LengthMeasurer
from server.services.references import References
from server.services.retrieval import Retrieval
from server.services.retrieval_evaluation import RetrievalEvaluator
from server.services.training_parameters import FineTuneDefaults
from server.services.training_service import TrainingService
from server.services.versions import Versions
from server.storage.artefacts import ArtefactStore
from server.storage.downloads import ArtefactDownloads
from server.storage.files import LocalFiles
from tests.contract.test_contract import DESCRIPTOR_SET
from tests.contract.test_gateway import ENVOY, TEMPLATE
from tests.services.conftest import NoEngine

MAX_DATASET_BYTES = 3_000_000
MAX_DOCUMENT_BYTES = 3_000_000


@dataclass(frozen=True)
class Api:
    """A running server and a channel to it."""

    server: ApiServer
    port: int
    services: Services
    channel: aio.Channel


@pytest.fixture
async def api(database: PostgresDatabase, tmp_path: Path) -> AsyncIterator[Api]:
    """The api on a port of its own."""
    files, source = LocalFiles(tmp_path / "storage"), BaseModelSource(tmp_path / "cache", hub_endpoint="http://127.0.0.1:9")
    engine, feed = EngineClient(tmp_path / "no-engine.sock"), PostgresJobFeed(database)
    imports = ImportRoots([ImportRoot.parse(str(tmp_path / "imports"))])
    datasets = Datasets(database, files, InspectionProcesses(), imports, MAX_DATASET_BYTES)
    machine = Machine(memory_bytes=16 << 30, device_memory_bytes=0, cores=2)
    tuning = FineTuning(
        database, datasets, source, FineTuneDefaults(16, 1e-3), Estimator(source, machine, LengthMeasurer(source, NoEngine()))
    )
    retrieval = Retrieval(database, engine)
    references = References(database, source)
    artefacts = ArtefactDownloads(ArtefactStore(tmp_path / "storage"))
    services = Services(
        models=ModelService(
            database, files, engine, source, tuning, RagModels(database, source), Documents(database, files, imports, MAX_DOCUMENT_BYTES)
        ),
        training=TrainingService(database, feed, datasets, JobControl(database, files)),
        inference=InferenceService(engine, references, retrieval, RetrievalEvaluator(database, retrieval, files)),
        versions=Versions(database, files, artefacts, engine),
        previews=Previews(database, engine, source),
        batches=BatchGeneration(database, references, artefacts),
    )
    server = ApiServer(services, "default", "127.0.0.1:0")
    port = await server.start()
    async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Api(server, port, services, channel)
    await server.stop(0)
    await feed.close()
    await engine.close()


@pytest.fixture
async def rest(api: Api, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the REST API, through Envoy."""
    async with run_envoy(api.port, tmp_path) as client:
        yield client


@asynccontextmanager
async def run_envoy(grpc_port: int, directory: Path) -> AsyncIterator[httpx.AsyncClient]:
    """Run Envoy before a gRPC server, and give a client of its REST API."""
    port = find_free_port()
    configuration = directory / "envoy.yaml"
    configuration.write_text(
        Template(TEMPLATE.read_text()).substitute(
            bind_address="127.0.0.1", http_port=port, grpc_host="127.0.0.1", grpc_port=grpc_port, descriptor_path=DESCRIPTOR_SET
        )
    )
    command = [str(ENVOY), "-c", str(configuration), "--disable-hot-restart", "--concurrency", "1", "--log-level", "error"]
    process = await asyncio.create_subprocess_exec(*command)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}/api/v1/model-training", timeout=30) as client:
            await wait_for_envoy(client)
            yield client
    finally:
        process.terminate()
        await asyncio.wait_for(process.wait(), 10)


async def wait_for_envoy(client: httpx.AsyncClient) -> None:
    """Wait until Envoy listens."""
    for _ in range(100):
        with suppress(httpx.ConnectError):
            await client.get("/no-such-path")
            return
        await asyncio.sleep(0.1)
    raise TimeoutError("Envoy does not listen")


def find_free_port() -> int:
    """Find a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
