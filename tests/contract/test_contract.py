"""The contract as generated: every promised path leads to its RPC, and every element of it is explained."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from google.api import annotations_pb2, http_pb2
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    MethodDescriptorProto,
    ServiceDescriptorProto,
)

DESCRIPTOR_SET = Path(__file__).parents[2] / "gen" / "modeltraining.binpb"
PREFIX = "/api/v1/model-training"

# Verb, path below the prefix, RPC. Users were promised the first ten; the others are the rest of this version.
PROMISED = (
    ("get", "/models", "ModelService.ListModels"),
    ("get", "/models/{model_id}", "ModelService.GetModel"),
    ("delete", "/models/{model_id}", "ModelService.DeleteModel"),
    ("post", "/models/fine-tune", "ModelService.CreateFineTunedModel"),
    ("post", "/models/rag", "ModelService.CreateRagModel"),
    ("post", "/models/fine-tune/estimate", "ModelService.EstimateFineTune"),
    ("get", "/training-jobs", "TrainingService.ListTrainingJobs"),
    ("get", "/training-jobs/{job_id}", "TrainingService.GetTrainingJob"),
    ("post", "/training-jobs/{job_id}/cancel", "TrainingService.CancelTrainingJob"),
    ("post", "/inference", "InferenceService.Generate"),
    ("post", "/rag/inference", "InferenceService.RagGenerate"),
    ("patch", "/models/{model_id}", "ModelService.UpdateModel"),
    ("get", "/models/{model_id}/versions", "ModelService.ListModelVersions"),
    ("get", "/models/{model_id}/versions/{version}", "ModelService.GetModelVersion"),
    ("post", "/models/{model_id}/versions/{version}/promote", "ModelService.PromoteModelVersion"),
    ("delete", "/models/{model_id}/versions/{version}", "ModelService.DeleteModelVersion"),
    ("post", "/models/{model_id}/versions/{version}/export", "ModelService.ExportModelVersion"),
    ("get", "/models/{model_id}/versions/{version}/files", "ModelService.ListModelFiles"),
    ("get", "/models/{model_id}/versions/{version}/files/{path=**}", "ModelService.DownloadModelFile"),
    ("get", "/models/{model_id}/versions/{version}/archive", "ModelService.DownloadModelArchive"),
    ("post", "/models/{model_id}/documents", "ModelService.UploadDocument"),
    ("post", "/models/{model_id}/documents/import", "ModelService.ImportDocument"),
    ("get", "/models/{model_id}/documents/{document_id}/text", "ModelService.DownloadDocumentText"),
    ("get", "/models/{model_id}/documents/{document_id}/content", "ModelService.DownloadDocumentContent"),
    ("post", "/models/{model_id}/documents/batch", "ModelService.AddDocuments"),
    ("post", "/models/{model_id}/reindex", "ModelService.ReindexModel"),
    ("get", "/models/{model_id}/documents", "ModelService.ListDocuments"),
    ("get", "/models/{model_id}/documents/{document_id}", "ModelService.GetDocument"),
    ("delete", "/models/{model_id}/documents/{document_id}", "ModelService.DeleteDocument"),
    ("get", "/base-models", "ModelService.ListBaseModels"),
    ("get", "/embedding-models", "ModelService.ListEmbeddingModels"),
    ("get", "/training-jobs/{job_id}/watch", "TrainingService.WatchTrainingJob"),
    ("post", "/training-jobs/{job_id}/pause", "TrainingService.PauseTrainingJob"),
    ("post", "/training-jobs/{job_id}/resume", "TrainingService.ResumeTrainingJob"),
    ("post", "/training-jobs/{job_id}/retry", "TrainingService.RetryTrainingJob"),
    ("get", "/training-jobs/{job_id}/attempts", "TrainingService.ListTrainingJobAttempts"),
    ("get", "/training-jobs/{job_id}/events", "TrainingService.ListTrainingJobEvents"),
    ("get", "/training-jobs/{job_id}/checkpoints", "TrainingService.ListCheckpoints"),
    ("get", "/training-jobs/{job_id}/result", "TrainingService.DownloadJobResult"),
    ("get", "/training-jobs/{job_id}/metrics", "TrainingService.GetTrainingMetrics"),
    ("post", "/datasets", "TrainingService.UploadDataset"),
    ("post", "/datasets/import", "TrainingService.ImportDataset"),
    ("get", "/datasets/{dataset_id}/preview", "TrainingService.PreviewDataset"),
    ("get", "/datasets", "TrainingService.ListDatasets"),
    ("get", "/datasets/{dataset_id}", "TrainingService.GetDataset"),
    ("delete", "/datasets/{dataset_id}", "TrainingService.DeleteDataset"),
    ("post", "/inference/stream", "InferenceService.StreamGenerate"),
    ("post", "/inference/count-tokens", "InferenceService.CountTokens"),
    ("post", "/inference/render", "InferenceService.RenderPrompt"),
    ("post", "/rag/inference/stream", "InferenceService.StreamRagGenerate"),
    ("post", "/rag/retrieve", "InferenceService.Retrieve"),
    ("post", "/inference/batch", "InferenceService.CreateBatchGeneration"),
    ("post", "/rag/evaluate", "InferenceService.EvaluateRetrieval"),
    ("post", "/embeddings", "InferenceService.Embed"),
)

# What the body of a request is, where it is not the whole message.
BODIES = {"TrainingService.UploadDataset": "data", "ModelService.UploadDocument": "data", "ModelService.EstimateFineTune": "fine_tune"}

# Which RPCs stream: (from the client, to the client).
STREAMS = {
    "TrainingService.UploadDataset": (True, False),
    "ModelService.UploadDocument": (True, False),
    "ModelService.DownloadDocumentText": (False, True),
    "ModelService.DownloadDocumentContent": (False, True),
    "TrainingService.WatchTrainingJob": (False, True),
    "TrainingService.ImportDataset": (False, True),
    "ModelService.DownloadModelFile": (False, True),
    "ModelService.DownloadModelArchive": (False, True),
    "TrainingService.DownloadJobResult": (False, True),
    "InferenceService.StreamGenerate": (False, True),
    "InferenceService.StreamRagGenerate": (False, True),
}


def read_files() -> Sequence[FileDescriptorProto]:
    """Read the files of the contract from the descriptor set, those that it imports left out."""
    files = FileDescriptorSet.FromString(DESCRIPTOR_SET.read_bytes()).file
    return [file for file in files if file.package == "modeltraining.v1"]


def read_rule(method: MethodDescriptorProto) -> http_pb2.HttpRule:
    """Read the REST binding of a method."""
    # The generated stub says no more of an extension than that it is a field.
    rule: http_pb2.HttpRule = method.options.Extensions[cast(Any, annotations_pb2.http)]
    return rule


def read_methods() -> Iterator[tuple[str, MethodDescriptorProto]]:
    """Name every method of every service."""
    for file in read_files():
        for service in file.service:
            for method in service.method:
                yield f"{service.name}.{method.name}", method


def test_the_promised_paths_are_those_of_the_contract_and_no_others() -> None:
    bound = set()
    for name, method in read_methods():
        rule = read_rule(method)
        verb = rule.WhichOneof("pattern")
        assert verb is not None, f"{name} has no REST path"
        assert not rule.additional_bindings, f"{name} has more than one REST path"
        bound.add((verb, getattr(rule, verb), name))
    assert bound == {(verb, PREFIX + path, name) for verb, path, name in PROMISED}


@pytest.mark.parametrize("verb", ["post", "patch"])
def test_what_is_sent_is_the_whole_body(verb: str) -> None:
    for name, method in read_methods():
        rule = read_rule(method)
        if rule.WhichOneof("pattern") == verb:
            assert rule.body == BODIES.get(name, "*"), name


def test_only_the_long_answers_and_the_upload_stream() -> None:
    for name, method in read_methods():
        assert (method.client_streaming, method.server_streaming) == STREAMS.get(name, (False, False)), name


def test_every_element_has_a_comment() -> None:
    bare = [f"{file.name}: {element}" for file in read_files() for element in find_uncommented(file)]
    assert bare == []


def test_error_details_can_be_transcoded() -> None:
    names = {file.name for file in FileDescriptorSet.FromString(DESCRIPTOR_SET.read_bytes()).file}
    assert "google/rpc/error_details.proto" in names


def test_scalars_are_numbers_in_json() -> None:
    """int64 becomes a string in JSON."""
    wide = {3, 4, 6, 16, 18}  # FieldDescriptorProto.Type: INT64, UINT64, FIXED64, SFIXED64, SINT64
    found = [f"{path}.{field.name}" for path, message in walk_messages() for field in message.field if field.type in wide]
    assert found == []


def test_a_created_thing_can_be_asked_for_twice_and_tried() -> None:
    creating = {
        "CreateFineTunedModelRequest",
        "CreateRagModelRequest",
        "AddDocumentsRequest",
        "UploadDatasetRequest",
        "UploadDocumentRequest",
        "ImportDocumentRequest",
        "ImportDatasetRequest",
    }
    messages = {message.name: {field.name for field in message.field} for _, message in walk_messages()}
    for name in creating:
        assert {"request_id", "validate_only"} <= messages[name], name


# A job keeps a few checkpoints, a version has a few dozen files; events are paged by their own numbers.
PAGED_OTHERWISE = {"ListCheckpoints", "ListModelFiles", "ListTrainingJobEvents"}


def test_every_list_is_paged() -> None:
    messages = {message.name: {field.name for field in message.field} for _, message in walk_messages()}
    lists = {name.split(".")[1] for name, _ in read_methods() if ".List" in name}
    assert {"page_size", "after_sequence"} <= messages["ListTrainingJobEventsRequest"]
    for name in lists - PAGED_OTHERWISE:
        assert {"page_size", "page_token"} <= messages[f"{name}Request"], name
        assert "next_page_token" in messages[f"{name}Response"], name


def walk_messages() -> Iterator[tuple[str, DescriptorProto]]:
    """Name every message, nested ones too, entries of maps left out."""
    pending = [(message.name, message) for file in read_files() for message in file.message_type]
    while pending:
        path, message = pending.pop()
        if not message.options.map_entry:
            yield path, message
            pending += [(f"{path}.{nested.name}", nested) for nested in message.nested_type]


# Numbers of the fields of descriptor.proto that make up the path of an element in the source info.
FILE_MESSAGE, FILE_ENUM, FILE_SERVICE = 4, 5, 6
MESSAGE_FIELD, MESSAGE_NESTED, MESSAGE_ENUM, MESSAGE_ONEOF = 2, 3, 4, 8
ENUM_VALUE, SERVICE_METHOD = 2, 2


def find_uncommented(file: FileDescriptorProto) -> Iterator[str]:
    """Name the elements of a file that have no comment before them."""
    commented = {tuple(place.path) for place in file.source_code_info.location if place.leading_comments.strip()}
    for path, name in walk_elements(file):
        if path not in commented:
            yield name


def walk_elements(file: FileDescriptorProto) -> Iterator[tuple[tuple[int, ...], str]]:
    """Give the source-info path and the name of each element of a file."""
    for number, message in enumerate(file.message_type):
        yield from walk_message((FILE_MESSAGE, number), message, message.name)
    for number, enum in enumerate(file.enum_type):
        yield from walk_enum((FILE_ENUM, number), enum, enum.name)
    for number, service in enumerate(file.service):
        yield from walk_service((FILE_SERVICE, number), service)


def walk_message(path: tuple[int, ...], message: DescriptorProto, name: str) -> Iterator[tuple[tuple[int, ...], str]]:
    """Give a message and what is in it."""
    if message.options.map_entry:
        return
    yield path, name
    for number, field in enumerate(message.field):
        yield (*path, MESSAGE_FIELD, number), f"{name}.{field.name}"
    # An `optional` field is a oneof of its own that nobody wrote.
    written = {field.oneof_index for field in message.field if field.HasField("oneof_index") and not field.proto3_optional}
    for number in sorted(written):
        yield (*path, MESSAGE_ONEOF, number), f"{name}.{message.oneof_decl[number].name}"
    for number, nested in enumerate(message.nested_type):
        yield from walk_message((*path, MESSAGE_NESTED, number), nested, f"{name}.{nested.name}")
    for number, enum in enumerate(message.enum_type):
        yield from walk_enum((*path, MESSAGE_ENUM, number), enum, f"{name}.{enum.name}")


def walk_enum(path: tuple[int, ...], enum: EnumDescriptorProto, name: str) -> Iterator[tuple[tuple[int, ...], str]]:
    """Give an enum and its values."""
    yield path, name
    for number, value in enumerate(enum.value):
        yield (*path, ENUM_VALUE, number), f"{name}.{value.name}"


def walk_service(path: tuple[int, ...], service: ServiceDescriptorProto) -> Iterator[tuple[tuple[int, ...], str]]:
    """Give a service and its methods."""
    yield path, service.name
    for number, method in enumerate(service.method):
        yield (*path, SERVICE_METHOD, number), f"{service.name}.{method.name}"
