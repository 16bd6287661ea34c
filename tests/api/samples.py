"""One of each resource, with a value in every field that can have one."""

from datetime import UTC, datetime

from server.domain.documents import Document, DocumentState
from server.domain.errors import ErrorData
from server.domain.generation import FinishReason, ModelReference, Timings, TokenUsage
from server.domain.jobs import Best, Job, JobKind, JobState, Progress, Usage
from server.domain.models import Model, ModelState, ModelType, RagConfiguration
from server.domain.rag_indexes import Calibration, EmbeddingSpace, IndexState, RagIndex
from server.domain.retrieval import Chunk, Chunking, Citation, RetrievalSettings, RetrievedChunk, Scores
from server.domain.specs import FineTuneSpec, IndexSpec, LossOn, OverlongPolicy, Scheduler, TrainingParameters
from server.domain.techniques import LoraTechnique
from server.services.rag_answers import RagAnswer, RagFinished, Sources
from server.services.retrieval import RetrievalTimings

TIME = datetime(2026, 11, 23, tzinfo=UTC)

FINE_TUNE = FineTuneSpec(
    base_model="org/base",
    dataset_id="ds_1",
    dataset_sha256="ab",
    technique=LoraTechnique(),
    parameters=TrainingParameters(
        epochs=2.0, max_steps=None, batch_size=8, learning_rate=1e-3, scheduler=Scheduler.CONSTANT, warmup_steps=3, weight_decay=0.1,
        max_gradient_norm=1.0, max_sequence_tokens=512, overlong_policy=OverlongPolicy.DROP, loss_on=LossOn.ASSISTANT, seed=7,
        evaluate_every_steps=5, checkpoint_every_steps=6,
    ),
    eval_fraction=0.25,
)  # fmt: skip
INDEX = IndexSpec("org/embedding", Chunking(64, 8))

JOB = Job(
    job_id="job_1",
    kind=JobKind.FINE_TUNE,
    model_id="mdl_1",
    state=JobState.FAILED,
    spec=FINE_TUNE,
    create_time=TIME,
    update_time=TIME,
    state_reason="OUT_OF_MEMORY",
    error=ErrorData("FAILED_PRECONDITION", "OUT_OF_MEMORY", "No memory.", {"suggestion": "smaller"}),
    progress=Progress(5, 10, 0.5, 5_000, 250.0, 20.0, 1.5),
    best=Best(4, 1.25),
    usage=Usage(3.0, 5_000, 100, 10),
    attempt=2,
    last_sequence=7,
    start_time=TIME,
)

MODEL = Model(
    model_id="mdl_1",
    type=ModelType.FINE_TUNED,
    display_name="m",
    state=ModelState.READY,
    base_model="org/base",
    create_time=TIME,
    update_time=TIME,
    labels={"team": "a"},
    technique="LORA",
    serving_version=1,
    version_count=1,
)

INDEX_OF_MODEL = RagIndex(
    index_number=1,
    embedding_model="org/embedding",
    chunking=Chunking(64, 8),
    state=IndexState.READY,
    create_time=TIME,
    index_key=7,
    dimension=384,
    space=EmbeddingSpace("org/embedding", "ab", "CLS", "q: ", "p: ", "ARABERT_V02", 512, 384, "torch-float32"),
    calibration=Calibration(552, 0.2, 0.1, (0.0, 100.0), (-0.1, 0.7)),
)
RAG_MODEL = Model(
    model_id="mdl_2",
    type=ModelType.RAG,
    display_name="r",
    state=ModelState.FAILED,
    base_model="org/base",
    create_time=TIME,
    update_time=TIME,
    rag=RagConfiguration("org/base", "org/embedding", RetrievalSettings(), Chunking(64, 8), "", INDEX_OF_MODEL),
    document_count=3,
    chunk_count=12,
    error=ErrorData("INTERNAL", "INTERNAL", "It failed."),
)

DOCUMENT = Document(
    document_id="doc_1",
    model_id="mdl_2",
    title="t",
    state=DocumentState.FAILED,
    size_characters=0,
    size_bytes=0,
    content_sha256="ab",
    create_time=TIME,
    metadata={"year": 2026},
    error="Empty.",
)

FOUND = RetrievedChunk(Chunk("chk_1", 0, "a quote", 0, 7, 2), "doc_1", "t", Scores(similarity=0.5), {"year": 2026})
RAG_ANSWER = RagAnswer(
    text="quote [1]",
    sources=Sources([FOUND], True, RetrievalTimings(0.1, 0.2, 0.3), "where is it"),
    finished=RagFinished(
        finish_reason=FinishReason.STOP,
        usage=TokenUsage(10, 2),
        timings=Timings(0.0, 0.1, 0.2),
        model_id="mdl_2",
        generator=ModelReference("org/base", "org/base"),
        citations=[Citation("doc_1", "chk_1", 2, 7, "quote", 1)],
        dropped_citation_count=0,
        grounded=True,
    ),
)
