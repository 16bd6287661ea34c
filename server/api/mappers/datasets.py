"""Datasets: uploads, imports, previews, and what they show."""

from modeltraining.v1 import dataset_pb2, fine_tuning_pb2, training_service_pb2

from server.api.mappers.findings import finding_to_proto
from server.api.mappers.values import enum_from_proto, enum_to_proto, time_to_proto
from server.domain.datasets import Dataset, DatasetFormat, RecordKind
from server.domain.previews import PreviewedRecord, PreviewedSequence
from server.domain.specs import LossOn, OverlongPolicy
from server.services.datasets import Progress
from server.services.previews import DatasetPreview
from server.services.requests import ImportDataset, PreviewDataset, UploadDataset
from server.services.validation import Violations


def dataset_to_proto(dataset: Dataset) -> dataset_pb2.Dataset:
    """Write a dataset with the findings that it carries."""
    message = dataset_pb2.Dataset(
        dataset_id=dataset.dataset_id,
        display_name=dataset.display_name,
        format=enum_to_proto(dataset_pb2.Dataset.Format, "FORMAT", dataset.format),
        record_kind=enum_to_proto(dataset_pb2.Dataset.RecordKind, "RECORD_KIND", dataset.record_kind),
        size_bytes=dataset.size_bytes,
        sha256=dataset.sha256,
        record_count=dataset.record_count,
        invalid_record_count=dataset.invalid_record_count,
        findings=[finding_to_proto(finding) for finding in dataset.findings],
        create_time=time_to_proto(dataset.create_time),
        finding_counts=[finding_to_proto(finding) for finding in dataset.finding_counts],
        source_uri=dataset.source_uri,
    )
    if dataset.compression:
        message.compression = enum_to_proto(dataset_pb2.Dataset.Compression, "COMPRESSION", dataset.compression)
    return message


def upload_from_proto(message: training_service_pb2.UploadDatasetRequest, found: Violations) -> UploadDataset:
    """Read what goes with an upload from its first message."""
    form = enum_from_proto(dataset_pb2.Dataset.Format, "FORMAT", message.format, DatasetFormat, found, "format")
    kind = enum_from_proto(dataset_pb2.Dataset.RecordKind, "RECORD_KIND", message.record_kind, RecordKind, found, "record_kind")
    return UploadDataset(message.display_name, form, message.request_id, message.validate_only, kind)


def import_from_proto(message: training_service_pb2.ImportDatasetRequest, found: Violations) -> ImportDataset:
    """Read an import."""
    form = enum_from_proto(dataset_pb2.Dataset.Format, "FORMAT", message.format, DatasetFormat, found, "format")
    kind = enum_from_proto(dataset_pb2.Dataset.RecordKind, "RECORD_KIND", message.record_kind, RecordKind, found, "record_kind")
    return ImportDataset(message.display_name, message.uri, form, kind, message.request_id, message.validate_only)


def import_item_to_proto(item: Progress | Dataset) -> training_service_pb2.ImportDatasetResponse:
    """Write how far an import is, or its dataset."""
    if isinstance(item, Dataset):
        return training_service_pb2.ImportDatasetResponse(dataset=dataset_to_proto(item))
    progress = training_service_pb2.ImportDatasetResponse.Progress(
        bytes=item.read_bytes, total_bytes=item.total_bytes, records=item.records
    )
    return training_service_pb2.ImportDatasetResponse(progress=progress)


def preview_from_proto(message: training_service_pb2.PreviewDatasetRequest, found: Violations) -> PreviewDataset:
    """Read which records to show, and under which rules."""
    parameters = fine_tuning_pb2.TrainingParameters
    policy = enum_from_proto(
        parameters.OverlongPolicy, "OVERLONG_POLICY", message.overlong_policy, OverlongPolicy, found, "overlong_policy"
    )
    loss_on = enum_from_proto(parameters.LossOn, "LOSS_ON", message.loss_on, LossOn, found, "loss_on")
    return PreviewDataset(
        dataset_id=message.dataset_id,
        base_model=message.base_model,
        records=tuple(message.records),
        page_size=message.page_size if message.HasField("page_size") else None,
        page_token=message.page_token,
        max_sequence_tokens=message.max_sequence_tokens if message.HasField("max_sequence_tokens") else None,
        overlong_policy=policy,
        loss_on=loss_on,
        max_tokens_shown=message.max_tokens_shown if message.HasField("max_tokens_shown") else None,
    )


def preview_to_proto(preview: DatasetPreview) -> training_service_pb2.PreviewDatasetResponse:
    """Write a page of records."""
    return training_service_pb2.PreviewDatasetResponse(
        records=[_record_to_proto(record) for record in preview.records],
        next_page_token=preview.next_page_token,
        base_model=preview.base_model,
        template_sha256=preview.template_sha256,
    )


def _record_to_proto(record: PreviewedRecord) -> dataset_pb2.PreviewedRecord:
    return dataset_pb2.PreviewedRecord(
        record=record.record,
        line=record.line,
        sequences=[_sequence_to_proto(sequence) for sequence in record.sequences],
        findings=[finding_to_proto(finding) for finding in record.findings],
    )


def _sequence_to_proto(sequence: PreviewedSequence) -> dataset_pb2.PreviewedRecord.Sequence:
    return dataset_pb2.PreviewedRecord.Sequence(
        name=sequence.name,
        tokens=[
            dataset_pb2.PreviewedRecord.Token(token_id=token.token_id, text=token.text, trained=token.weight > 0, weight=token.weight)
            for token in sequence.tokens
        ],
        token_count=sequence.token_count,
        trained_token_count=sequence.trained_token_count,
    )
