"""Versions of models with their lineage, exports and files."""

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Protocol

from modeltraining.v1 import model_service_pb2, model_version_pb2

from server.api.mappers.fine_tuning import fine_tune_to_proto
from server.api.mappers.values import enum_from_proto, enum_to_proto, time_to_proto
from server.domain.models import ModelExport, ModelFile
from server.domain.specs import ExportFormat
from server.services.requests import ExportVersion, ListVersions, PageRequest
from server.services.validation import Violations
from server.services.versions import FilesOf, ShownVersion

Version = model_version_pb2.ModelVersion
ARCHIVE_TYPE = "application/x-tar"
BINARY_TYPE = "application/octet-stream"
_TEXT_TYPES = {".md": "text/markdown; charset=utf-8", ".txt": "text/plain; charset=utf-8", ".jinja": "text/plain; charset=utf-8"}


class FilesRequest(Protocol):
    """A request about files of a version or of its export."""

    model_id: str
    version: int

    @property
    def format(self) -> model_version_pb2.ModelVersion.ExportFormat.ValueType:
        """Which export."""


def version_to_proto(shown: ShownVersion) -> Version:
    """Write a version."""
    version = shown.version
    return Version(
        model_id=version.model_id,
        version=version.version,
        job_id=version.job_id,
        base_model=version.base_model,
        base_revision=version.base_revision,
        metrics=version.metrics,
        size_bytes=version.size_bytes,
        manifest_sha256=version.manifest_sha256,
        create_time=time_to_proto(version.create_time),
        serving=shown.serving,
        attempt=version.attempt,
        checkpoint_step=version.checkpoint_step,
        effective_config=fine_tune_to_proto(version.spec) if version.spec else None,
        library_versions=version.library_versions,
        template_sha256=version.template_sha256,
        exports=[_export_to_proto(export) for export in version.exports],
    )


def _export_to_proto(export: ModelExport) -> model_version_pb2.ModelVersion.Export:
    return Version.Export(
        format=enum_to_proto(Version.ExportFormat, "EXPORT_FORMAT", export.format),
        job_id=export.job_id,
        size_bytes=export.size_bytes,
        manifest_sha256=export.manifest_sha256,
        metrics=export.metrics,
        create_time=time_to_proto(export.create_time),
    )


def list_versions_from_proto(message: model_service_pb2.ListModelVersionsRequest) -> ListVersions:
    """Read which versions are wanted."""
    return ListVersions(message.model_id, PageRequest(message.page_size if message.HasField("page_size") else None, message.page_token))


def export_from_proto(message: model_service_pb2.ExportModelVersionRequest, found: Violations) -> ExportVersion:
    """Read what is to be exported."""
    return ExportVersion(
        message.model_id, message.version, _format_from_proto(message, found), message.request_id, message.validate_only
    )  # fmt: skip


def files_from_proto(message: FilesRequest) -> FilesOf:
    """Read whose files are wanted. Raises InvalidInput."""
    found = Violations()
    wanted = FilesOf(message.model_id, message.version, _format_from_proto(message, found))
    found.raise_if_any()
    return wanted


def files_to_proto(files: Sequence[ModelFile]) -> model_service_pb2.ListModelFilesResponse:
    """Write files."""
    listed = [model_version_pb2.ModelFile(path=file.path, size_bytes=file.size_bytes, sha256=file.sha256) for file in files]
    return model_service_pb2.ListModelFilesResponse(files=listed)


def content_type(path: str) -> str:
    """Give the media type of a file by its name."""
    suffix = PurePosixPath(path).suffix
    return _TEXT_TYPES.get(suffix) or ("application/json" if suffix == ".json" else BINARY_TYPE)


def _format_from_proto(message: FilesRequest | model_service_pb2.ExportModelVersionRequest, found: Violations) -> ExportFormat | None:
    return enum_from_proto(Version.ExportFormat, "EXPORT_FORMAT", message.format, ExportFormat, found, "format")
