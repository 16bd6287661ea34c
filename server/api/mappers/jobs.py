"""Jobs, their configuration and their metrics."""

from collections.abc import Sequence

from modeltraining.v1 import generation_pb2, model_version_pb2, training_job_pb2, training_service_pb2

from server.api.errors import status_from_data
from server.api.mappers.embedding import backend_to_proto
from server.api.mappers.estimates import estimate_to_proto
from server.api.mappers.fine_tuning import fine_tune_to_proto
from server.api.mappers.generation import parameters_to_proto
from server.api.mappers.retrieval import chunking_to_proto
from server.api.mappers.values import enum_from_proto, enum_to_proto, time_to_proto
from server.domain.jobs import Attempt, BatchCounters, Checkpoint, IndexCounters, Job, JobKind, JobState, Progress, Usage
from server.domain.specs import BatchSpec, ExportSpec, FineTuneSpec, Spec
from server.services.ports import JobFilter
from server.services.requests import ListJobs, PageRequest
from server.services.training_service import Series
from server.services.validation import Violations

TrainingJob = training_job_pb2.TrainingJob


def job_to_proto(job: Job) -> TrainingJob:
    """Write a job."""
    return TrainingJob(
        job_id=job.job_id,
        kind=enum_to_proto(TrainingJob.Kind, "KIND", job.kind),
        model_id=job.model_id,
        state=state_to_proto(job.state),
        state_reason=job.state_reason,
        error=status_from_data(job.error) if job.error else None,
        progress=progress_to_proto(job.progress),
        best=TrainingJob.Best(step=job.best.step, eval_loss=job.best.eval_loss) if job.best else None,
        attempt=job.attempt,
        queue_position=job.queue_position,
        effective_config=spec_to_proto(job.spec),
        usage=usage_to_proto(job.usage) if job.start_time else None,
        last_sequence=job.last_sequence,
        create_time=time_to_proto(job.create_time),
        start_time=time_to_proto(job.start_time),
        end_time=time_to_proto(job.end_time),
        update_time=time_to_proto(job.update_time),
        retry_of_job_id=job.retry_of_job_id or "",
        estimate=estimate_to_proto(job.estimate) if job.estimate else None,
    )


def state_to_proto(state: JobState | None) -> training_job_pb2.TrainingJob.State.ValueType:
    """Write where a job stands."""
    return enum_to_proto(TrainingJob.State, "STATE", state)


def progress_to_proto(progress: Progress) -> training_job_pb2.TrainingJob.Progress:
    """Write how far a job is; what is not known yet stays unset."""
    return TrainingJob.Progress(
        step=progress.step,
        total_steps=progress.total_steps or None,
        epoch=progress.epoch,
        fraction=progress.fraction,
        tokens=progress.tokens,
        tokens_per_second=progress.tokens_per_second or None,
        eta_seconds=progress.eta_seconds,
        loss=progress.loss,
        indexing=counters_to_proto(progress.indexing) if progress.indexing else None,
        batch=batch_to_proto(progress.batch) if progress.batch else None,
    )


def counters_to_proto(counters: IndexCounters) -> training_job_pb2.TrainingJob.Indexing:
    """Write how far the documents of an index job are."""
    return TrainingJob.Indexing(
        parsed_documents=counters.parsed_documents,
        chunked_chunks=counters.chunked_chunks,
        embedded_chunks=counters.embedded_chunks,
        reused_chunks=counters.reused_chunks,
        committed_documents=counters.committed_documents,
    )


def batch_to_proto(counters: BatchCounters) -> training_job_pb2.TrainingJob.Batch:
    """Write what became of the records of a batch generation."""
    return TrainingJob.Batch(
        answered_records=counters.answered_records,
        failed_records=counters.failed_records,
        prompt_tokens=counters.prompt_tokens,
        completion_tokens=counters.completion_tokens,
    )


def usage_to_proto(usage: Usage) -> training_job_pb2.TrainingJob.Usage:
    """Write what a job used up."""
    return TrainingJob.Usage(
        compute_seconds=usage.compute_seconds,
        peak_memory_bytes=usage.peak_memory_bytes or None,
        tokens=usage.tokens,
        artifact_bytes=usage.artifact_bytes,
        peak_device_memory_bytes=usage.peak_device_memory_bytes or None,
    )


def spec_to_proto(spec: Spec) -> training_job_pb2.TrainingJob.EffectiveConfig:
    """Write what a job does, by its kind."""
    if isinstance(spec, FineTuneSpec):
        return TrainingJob.EffectiveConfig(fine_tune=fine_tune_to_proto(spec))
    if isinstance(spec, ExportSpec):
        form = enum_to_proto(model_version_pb2.ModelVersion.ExportFormat, "EXPORT_FORMAT", spec.format)
        return TrainingJob.EffectiveConfig(export=TrainingJob.ExportConfig(version=spec.version, format=form))
    if isinstance(spec, BatchSpec):
        return TrainingJob.EffectiveConfig(batch_generation=_batch_config_to_proto(spec))
    return TrainingJob.EffectiveConfig(
        rag_index=TrainingJob.RagIndexConfig(
            embedding_model=spec.embedding_model,
            chunking=chunking_to_proto(spec.chunking),
            embedding_backend=backend_to_proto(spec.embedding_backend),
            index_number=spec.index_number,
            reindex=spec.is_reindex,
        )
    )


def _batch_config_to_proto(spec: BatchSpec) -> training_job_pb2.TrainingJob.BatchGenerationConfig:
    return TrainingJob.BatchGenerationConfig(
        base_model=spec.base_model,
        version=spec.version,
        dataset_id=spec.dataset_id,
        dataset_sha256=spec.dataset_sha256,
        parameters=parameters_to_proto(spec.parameters),
        history=enum_to_proto(generation_pb2.HistoryPolicy, "HISTORY_POLICY", spec.history),
    )


def attempt_to_proto(attempt: Attempt) -> training_job_pb2.TrainingJob.Attempt:
    """Write one try at a job."""
    return TrainingJob.Attempt(
        attempt=attempt.attempt,
        state=state_to_proto(attempt.state),
        reason=attempt.reason,
        error=status_from_data(attempt.error) if attempt.error else None,
        last_step=attempt.last_step,
        start_time=time_to_proto(attempt.start_time),
        end_time=time_to_proto(attempt.end_time),
        job_id=attempt.job_id,
    )


def checkpoint_to_proto(checkpoint: Checkpoint) -> training_job_pb2.TrainingJob.Checkpoint:
    """Write a saved state."""
    return TrainingJob.Checkpoint(
        step=checkpoint.step,
        size_bytes=checkpoint.size_bytes,
        eval_loss=checkpoint.eval_loss,
        best=checkpoint.best,
        create_time=time_to_proto(checkpoint.create_time),
    )


def list_jobs_from_proto(message: training_service_pb2.ListTrainingJobsRequest, found: Violations) -> ListJobs:
    """Read which jobs are wanted."""
    where = JobFilter(
        state=enum_from_proto(TrainingJob.State, "STATE", message.state, JobState, found, "state"),
        kind=enum_from_proto(TrainingJob.Kind, "KIND", message.kind, JobKind, found, "kind"),
        model_id=message.model_id or None,
    )
    return ListJobs(where, PageRequest(message.page_size if message.HasField("page_size") else None, message.page_token))


def metrics_to_proto(job_id: str, series: Sequence[Series]) -> training_service_pb2.GetTrainingMetricsResponse:
    """Write a job's curves."""
    response = training_service_pb2.GetTrainingMetricsResponse(job_id=job_id)
    for curve in series:
        points = [training_service_pb2.GetTrainingMetricsResponse.Point(step=step, value=value) for step, value in curve.points]
        response.series.add(name=curve.name, points=points)
    return response
