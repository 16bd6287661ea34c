"""Documents of RAG models, and their metadata."""

from collections.abc import Mapping

from google.protobuf import json_format
from google.protobuf.struct_pb2 import Struct, Value
from modeltraining.v1 import document_pb2, model_service_pb2

from server.api.errors import status_from_data
from server.api.mappers.values import enum_from_proto, enum_to_proto, time_to_proto
from server.domain.documents import Document, DocumentFormat, DocumentState, NewDocument
from server.domain.errors import ErrorData
from server.domain.retrieval import MetadataValue
from server.services.requests import AddDocuments, ImportDocument, ListDocuments, PageRequest, UploadDocument
from server.services.validation import Violations

# Of what DownloadDocumentContent gives, by how it is written; None: a text.
CONTENT_TYPES = {
    None: "text/plain; charset=utf-8",
    DocumentFormat.PDF: "application/pdf",
    DocumentFormat.DOCX: "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
    DocumentFormat.PPTX: "application/vnd.openxmlformats-officedocument.presentationml.presentation",
}
# Of files of text the encoding is not known, and HTML of strangers must not run where the api's pages may.
OTHER_CONTENT_TYPE = "application/octet-stream"


def document_to_proto(document: Document) -> document_pb2.Document:
    """Write a document."""
    error = ErrorData("INVALID_ARGUMENT", document.error_reason, document.error) if document.error else None
    warnings = [document_pb2.Document.Warning(code=warning.code, message=warning.message) for warning in document.warnings]
    return document_pb2.Document(
        document_id=document.document_id,
        model_id=document.model_id,
        title=document.title,
        source_uri=document.source_uri,
        state=enum_to_proto(document_pb2.Document.State, "STATE", document.state),
        error=status_from_data(error) if error else None,
        size_bytes=document.size_bytes,
        content_sha256=document.content_sha256,
        size_characters=document.size_characters,
        chunk_count=document.chunk_count,
        metadata=metadata_to_proto(document.metadata),
        create_time=time_to_proto(document.create_time),
        job_id=document.job_id,
        format=enum_to_proto(document_pb2.Document.Format, "FORMAT", document.format),
        page_count=document.page_count,
        warnings=warnings,
        update_time=time_to_proto(document.update_time),
        update_pending=document.update_pending,
        original_size_bytes=document.original_size_bytes,
        original_sha256=document.original_sha256,
    )


def new_document_from_proto(message: document_pb2.InlineDocument, found: Violations, field: str) -> NewDocument:
    """Read a document that is given as text."""
    metadata = metadata_from_proto(message.metadata, found, f"{field}.metadata")
    return NewDocument(message.text, message.title, message.source_uri, metadata, message.document_id)


def upload_document_from_proto(message: model_service_pb2.UploadDocumentRequest, found: Violations) -> UploadDocument:
    """Read what goes with a file from its first message."""
    return UploadDocument(
        model_id=message.model_id,
        title=message.title,
        source_uri=message.source_uri,
        metadata=metadata_from_json(message.metadata, found, "metadata") if message.metadata else None,
        document_id=message.document_id,
        request_id=message.request_id,
        validate_only=message.validate_only,
    )


def import_document_from_proto(message: model_service_pb2.ImportDocumentRequest, found: Violations) -> ImportDocument:
    """Read an import."""
    return ImportDocument(
        model_id=message.model_id,
        uri=message.uri,
        title=message.title,
        metadata=metadata_from_proto(message.metadata, found, "metadata") if message.HasField("metadata") else None,
        document_id=message.document_id,
        request_id=message.request_id,
        validate_only=message.validate_only,
    )


def list_documents_from_proto(message: model_service_pb2.ListDocumentsRequest, found: Violations) -> ListDocuments:
    """Read which documents are wanted."""
    state = enum_from_proto(document_pb2.Document.State, "STATE", message.state, DocumentState, found, "state")
    size = message.page_size if message.HasField("page_size") else None
    return ListDocuments(message.model_id, PageRequest(size, message.page_token), state)


def add_documents_from_proto(message: model_service_pb2.AddDocumentsRequest, found: Violations) -> AddDocuments:
    """Read documents to add."""
    documents = [new_document_from_proto(item, found, f"documents[{place}]") for place, item in enumerate(message.documents)]
    return AddDocuments(message.model_id, documents, message.request_id, message.validate_only)


def metadata_to_proto(metadata: Mapping[str, MetadataValue]) -> Struct:
    """Write metadata as a JSON object."""
    struct = Struct()
    struct.update(metadata)
    return struct


def metadata_from_proto(struct: Struct, found: Violations, field: str) -> Mapping[str, MetadataValue]:
    """Read metadata: texts, numbers and booleans. Notes null, lists and objects."""
    metadata: dict[str, MetadataValue] = {}
    for key, value in sorted(struct.fields.items()):
        plain = value_from_proto(value)
        if plain is None:
            found.add(f"{field}[{key[:64]!r}]", "must be a text, a number or a boolean")
        else:
            metadata[key] = plain
    return metadata


def metadata_from_json(text: str, found: Violations, field: str) -> Mapping[str, MetadataValue]:
    """Read metadata that stands in a text as a JSON object. Notes what is none."""
    struct = Struct()
    try:
        json_format.Parse(text, struct)
    except json_format.ParseError:
        found.add(field, "must be a JSON object")
    return metadata_from_proto(struct, found, field)


def value_from_proto(value: Value) -> MetadataValue | None:
    """Read a text, a number or a boolean; None where it is none of these."""
    kind = value.WhichOneof("kind")
    if kind == "string_value":
        return value.string_value
    if kind == "bool_value":
        return value.bool_value
    if kind == "number_value":
        # JSON has one kind of number: 5 was sent as 5.0.
        return int(value.number_value) if value.number_value.is_integer() else value.number_value
    return None
