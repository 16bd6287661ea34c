"""Datasets and the findings in them."""

from modeltraining.v1 import dataset_pb2, training_service_pb2

from server.api.mappers.findings import finding_to_proto
from server.api.mappers.values import enum_from_proto, enum_to_proto, time_to_proto
from server.domain.datasets import Dataset, DatasetFormat
from server.services.requests import UploadDataset
from server.services.validation import Violations


def dataset_to_proto(dataset: Dataset) -> dataset_pb2.Dataset:
    """Write a dataset with the findings that it carries."""
    return dataset_pb2.Dataset(
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
    )


def upload_from_proto(message: training_service_pb2.UploadDatasetRequest, found: Violations) -> UploadDataset:
    """Read what goes with an upload from its first message."""
    form = enum_from_proto(dataset_pb2.Dataset.Format, "FORMAT", message.format, DatasetFormat, found, "format")
    return UploadDataset(message.display_name, form, message.request_id, message.validate_only)
