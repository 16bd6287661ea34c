"""Indexes of RAG models, and requests to build one."""

from modeltraining.v1 import model_service_pb2, rag_index_pb2

from server.api.mappers.findings import finding_to_proto
from server.api.mappers.jobs import job_to_proto
from server.api.mappers.values import time_to_proto
from server.domain.rag_indexes import Calibration, EmbeddingSpace, RagIndex
from server.services.reindexing import Reindexed
from server.services.requests import ReindexModel


def index_to_proto(index: RagIndex) -> rag_index_pb2.RagIndex:
    """Write an index."""
    return rag_index_pb2.RagIndex(
        index_number=index.index_number,
        space=_space_to_proto(index.space) if index.space else None,
        fingerprint=index.fingerprint,
        calibration=_calibration_to_proto(index.calibration) if index.calibration else None,
        create_time=time_to_proto(index.create_time),
    )


def reindex_from_proto(message: model_service_pb2.ReindexModelRequest) -> ReindexModel:
    """Read which index is to be built."""
    chunking = message.chunking
    return ReindexModel(
        model_id=message.model_id,
        embedding_model=message.embedding_model,
        max_chunk_tokens=chunking.max_tokens if chunking.HasField("max_tokens") else None,
        overlap_tokens=chunking.overlap_tokens if chunking.HasField("overlap_tokens") else None,
        request_id=message.request_id,
        validate_only=message.validate_only,
    )


def reindexed_to_proto(reindexed: Reindexed) -> model_service_pb2.ReindexModelResponse:
    """Write the job of an index to be."""
    findings = [finding_to_proto(finding) for finding in reindexed.findings]
    return model_service_pb2.ReindexModelResponse(training_job=job_to_proto(reindexed.job), findings=findings)


def _space_to_proto(space: EmbeddingSpace) -> rag_index_pb2.RagIndex.Space:
    return rag_index_pb2.RagIndex.Space(
        embedding_model=space.embedding_model,
        revision=space.revision,
        pooling=space.pooling,
        query_prefix=space.query_prefix,
        passage_prefix=space.passage_prefix,
        preparation=space.preparation,
        max_tokens=space.max_tokens,
        dimension=space.dimension,
        backend=space.backend,
    )


def _calibration_to_proto(calibration: Calibration) -> rag_index_pb2.RagIndex.Calibration:
    points = zip(calibration.percents, calibration.similarities, strict=True)
    return rag_index_pb2.RagIndex.Calibration(
        pair_count=calibration.pair_count,
        mean=calibration.mean,
        deviation=calibration.deviation,
        percentiles=[
            rag_index_pb2.RagIndex.Calibration.Percentile(percent=percent, similarity=similarity) for percent, similarity in points
        ],
    )
