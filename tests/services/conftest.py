"""The use cases over a real PostgreSQL, real files and the packaged base models; no engine is running."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from server.basemodels.sources import BaseModelSource
from server.datafiles.importing import ImportRoot, ImportRoots
from server.datafiles.inspector import InspectionProcesses
from server.db.database import PostgresDatabase
from server.db.feed import PostgresJobFeed
from server.domain.errors import Unavailable
from server.domain.previews import MeasureOrder
from server.domain.specs import ParametersRequest
from server.inference.client import EngineClient
from server.services.batch_generation import BatchGeneration
from server.services.datasets import Datasets
from server.services.documents import Documents
from server.services.estimating import Estimator
from server.services.fine_tuning import FineTuning
from server.services.job_control import JobControl
from server.services.machine import Machine
from server.services.model_service import ModelService
from server.services.rag_models import RagModels
from server.services.record_lengths import LengthMeasurer
from server.services.references import References
from server.services.requests import CreateFineTunedModel
from server.services.training_parameters import FineTuneDefaults
from server.services.training_service import TrainingService
from server.services.versions import Versions
from server.storage.artefacts import ArtefactStore
from server.storage.downloads import ArtefactDownloads
from server.storage.files import LocalFiles

ORGANIZATION = "default"
MAX_DOCUMENT_BYTES = 200_000
BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
EMBEDDING_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
MACHINE = Machine(memory_bytes=16 << 30, device_memory_bytes=0, cores=2)
GOOD_LINE = b'{"prompt": "1 + 1 =", "completion": " 2"}\n'


async def pieces(*data: bytes) -> AsyncIterator[bytes]:
    """Send an upload in pieces."""
    for piece in data:
        yield piece


def fine_tune(dataset_id: object = "", **changes: object) -> CreateFineTunedModel:
    """A request that is fine but for `changes`."""
    values: dict[str, object] = {"display_name": "m", "base_model": BASE_MODEL, "technique": None, "parameters": ParametersRequest()}
    return CreateFineTunedModel(**{**values, "dataset_id": dataset_id, **changes})  # type: ignore[arg-type]  # plain test data


class NoEngine:
    """What an engine that is down says, at once."""

    async def measure(self, order: MeasureOrder) -> Sequence[Sequence[int]]:
        """Measure nothing."""
        raise Unavailable("The engine cannot be reached.")


@dataclass(frozen=True)
class UseCases:
    """The services, as app/api.py composes them."""

    models: ModelService
    training: TrainingService
    datasets: Datasets
    versions: Versions
    batches: BatchGeneration
    storage: Path
    local_models: Path


@pytest.fixture
async def use_cases(database: PostgresDatabase, tmp_path: Path) -> AsyncIterator[UseCases]:
    storage, local = tmp_path / "storage", tmp_path / "models"
    files, source = LocalFiles(storage), BaseModelSource(tmp_path / "cache", hub_endpoint="http://127.0.0.1:9", allowed_local_roots=[local])
    imports = ImportRoots([ImportRoot.parse(str(tmp_path / "imports"))])
    datasets = Datasets(database, files, InspectionProcesses(), imports, 10_000)
    engine, feed = EngineClient(tmp_path / "no-engine.sock"), PostgresJobFeed(database)
    estimator = Estimator(source, MACHINE, LengthMeasurer(source, NoEngine()))
    tuning = FineTuning(database, datasets, source, FineTuneDefaults(16, 1e-3), estimator)
    models = ModelService(
        database, files, engine, source, tuning, RagModels(database, source), Documents(database, files, imports, MAX_DOCUMENT_BYTES)
    )
    training = TrainingService(database, feed, datasets, JobControl(database, files))
    artefacts = ArtefactDownloads(ArtefactStore(storage))
    versions = Versions(database, files, artefacts, engine)
    batches = BatchGeneration(database, References(database, source), artefacts)
    yield UseCases(models, training, datasets, versions, batches, storage, local)
    await feed.close()
    await engine.close()
