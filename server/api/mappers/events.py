"""What a watcher of a job sees."""

from datetime import UTC, datetime

from modeltraining.v1 import job_event_pb2

from server.api.errors import status_from_data
from server.api.mappers.findings import finding_to_proto
from server.api.mappers.jobs import batch_to_proto, counters_to_proto, job_to_proto, state_to_proto
from server.api.mappers.values import time_to_proto
from server.domain.errors import ErrorData
from server.domain.events import (
    BatchAdvanced,
    CheckpointSaved,
    DataChecked,
    Evaluated,
    IndexAdvanced,
    IndexProgress,
    JobEvent,
    LoggedPayload,
    Preparing,
    Sampled,
    Started,
    StateChanged,
    StepDone,
    Warned,
)
from server.services.watching import CoalescedStep, Finished, Heartbeat, Snapshot, WatchItem

Event = job_event_pb2.JobEvent


def watch_item_to_proto(job_id: str, item: WatchItem) -> Event:
    """Write one item of a watch: a stored event with its number, anything else with number 0."""
    if isinstance(item, CoalescedStep):
        event = watch_item_to_proto(job_id, item.event)
        event.step.coalesced_steps = item.left_out
        return event
    if isinstance(item, JobEvent):
        event = payload_to_proto(item.payload)
        event.sequence, event.attempt = item.sequence, item.attempt
        event.time.CopyFrom(time_to_proto(item.time) or event.time)
    else:
        event = _unstored_to_proto(item)
        event.time.CopyFrom(time_to_proto(datetime.now(UTC)) or event.time)
    event.job_id = job_id
    return event


def _unstored_to_proto(item: Snapshot | Heartbeat | Finished) -> Event:
    if isinstance(item, Snapshot):
        return Event(snapshot=job_to_proto(item.job), attempt=item.job.attempt)
    if isinstance(item, Finished):
        return Event(finished=Event.Finished(job=job_to_proto(item.job)), attempt=item.job.attempt)
    return Event(heartbeat=Event.Heartbeat())


def payload_to_proto(payload: LoggedPayload) -> Event:
    """Write what happened."""
    match payload:
        case StateChanged():
            return Event(state_changed=_state_changed_to_proto(payload))
        case Started():
            return Event(started=_started_to_proto(payload))
        case StepDone():
            return Event(step=_step_to_proto(payload))
        case Evaluated():
            return Event(evaluation=_evaluation_to_proto(payload))
        case CheckpointSaved():
            return Event(checkpoint=Event.Checkpoint(step=payload.step, size_bytes=payload.size_bytes))
        case Warned():
            return Event(warning=Event.Warning(code=payload.code, message=payload.message))
        case Sampled():
            return Event(sample=Event.Sample(step=payload.step, prompt=payload.prompt, text=payload.text))
        case Preparing():
            done, total = payload.records, payload.total_records
            return Event(preparing=Event.Preparing(records=done, total_records=total, tokens=payload.tokens))
        case DataChecked():
            return Event(data_checked=_data_checked_to_proto(payload))
        case IndexAdvanced():
            return Event(indexing=counters_to_proto(payload.counters))
        case BatchAdvanced():
            return Event(batch=batch_to_proto(payload.counters))
        case IndexProgress():
            return Event(document_indexed=_document_to_proto(payload))


def _state_changed_to_proto(payload: StateChanged) -> Event.StateChanged:
    return Event.StateChanged(
        from_state=state_to_proto(payload.from_state),
        to_state=state_to_proto(payload.state),
        reason=payload.reason,
        error=status_from_data(payload.error) if payload.error else None,
    )


def _started_to_proto(payload: Started) -> Event.Started:
    return Event.Started(
        total_steps=payload.total_steps,
        resumed_from_step=payload.resumed_from_step,
        train_records=payload.train_records,
        eval_records=payload.eval_records,
        trainable_parameters=payload.trainable_parameters,
        total_parameters=payload.total_parameters,
    )


def _step_to_proto(payload: StepDone) -> Event.Step:
    return Event.Step(
        step=payload.step,
        total_steps=payload.total_steps,
        epoch=payload.epoch,
        loss=payload.loss,
        learning_rate=payload.learning_rate,
        gradient_norm=payload.gradient_norm,
        tokens=payload.tokens,
        trained_tokens=payload.trained_tokens,
        tokens_per_second=payload.tokens_per_second,
        memory_bytes=payload.memory_bytes,
        eta_seconds=payload.eta_seconds,
    )


def _evaluation_to_proto(payload: Evaluated) -> Event.Evaluation:
    return Event.Evaluation(
        step=payload.step,
        eval_loss=payload.loss,
        tokens=payload.tokens,
        record_count=payload.records,
        duration_seconds=payload.duration_seconds,
        best=payload.best,
    )


def _data_checked_to_proto(payload: DataChecked) -> Event.DataChecked:
    buckets = [Event.DataChecked.LengthBucket(up_to_tokens=bucket.up_to_tokens, count=bucket.count) for bucket in payload.lengths]
    return Event.DataChecked(
        train_sequences=payload.train_sequences,
        eval_sequences=payload.eval_sequences,
        tokens=payload.tokens,
        trained_tokens=payload.trained_tokens,
        dropped_records=payload.dropped_records,
        cut_records=payload.cut_records,
        lengths=buckets,
        findings=[finding_to_proto(finding) for finding in payload.findings],
        duration_seconds=payload.duration_seconds,
        cached=payload.cached,
    )


def _document_to_proto(payload: IndexProgress) -> Event.DocumentIndexed:
    error = ErrorData("INVALID_ARGUMENT", payload.error_reason, payload.error) if payload.error else None
    return Event.DocumentIndexed(
        document_id=payload.document_id,
        documents_done=payload.documents_done,
        documents_total=payload.documents_total,
        chunk_count=payload.chunks,
        error=status_from_data(error) if error else None,
        progress=counters_to_proto(payload.counters),
    )
