"""ModelService on the wire: decode, one call, encode."""
# ruff: noqa: N802  # methods are named as their RPCs are

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from functools import partial

from google.api.httpbody_pb2 import HttpBody
from google.protobuf.empty_pb2 import Empty
from grpc import aio
from modeltraining.v1 import document_pb2, estimate_pb2, model_pb2, model_version_pb2
from modeltraining.v1 import model_service_pb2 as pb
from modeltraining.v1.model_service_pb2_grpc import ModelServiceServicer

from server.api.decoding import create_or_refuse, page_from_proto, refuse_all_bad
from server.api.mappers.catalogue import base_model_to_proto, embedding_model_to_proto
from server.api.mappers.documents import (
    CONTENT_TYPES,
    OTHER_CONTENT_TYPE,
    add_documents_from_proto,
    document_to_proto,
    import_document_from_proto,
    list_documents_from_proto,
    upload_document_from_proto,
)
from server.api.mappers.estimates import estimate_to_proto
from server.api.mappers.jobs import job_to_proto
from server.api.mappers.models import (
    create_fine_tuned_from_proto,
    create_rag_from_proto,
    fine_tuned_to_proto,
    list_models_from_proto,
    model_to_proto,
    rag_created_to_proto,
    update_model_from_proto,
)
from server.api.mappers.rag_indexes import reindex_from_proto, reindexed_to_proto
from server.api.mappers.versions import (
    ARCHIVE_TYPE,
    content_type,
    export_from_proto,
    files_from_proto,
    files_to_proto,
    list_versions_from_proto,
    version_to_proto,
)
from server.services.model_service import ModelService
from server.services.validation import Violations
from server.services.versions import Versions

Context = aio.ServicerContext


class ModelServicer(ModelServiceServicer):
    """The use cases of models, for one organization."""

    def __init__(self, service: ModelService, versions: Versions, organization: str) -> None:
        self._service = service
        self._versions = versions
        self._organization = organization

    async def ListModels(
        self, request: pb.ListModelsRequest, context: Context[pb.ListModelsRequest, pb.ListModelsResponse]
    ) -> pb.ListModelsResponse:
        """List models."""
        found = Violations()
        wanted = list_models_from_proto(request, found)
        found.raise_if_any()
        listed = await self._service.list_models(self._organization, wanted)
        return pb.ListModelsResponse(models=[model_to_proto(model) for model in listed.items], next_page_token=listed.next_page_token)

    async def GetModel(self, request: pb.GetModelRequest, context: Context[pb.GetModelRequest, model_pb2.Model]) -> model_pb2.Model:
        """Read a model."""
        return model_to_proto(await self._service.get_model(self._organization, request.model_id))

    async def UpdateModel(
        self, request: pb.UpdateModelRequest, context: Context[pb.UpdateModelRequest, model_pb2.Model]
    ) -> model_pb2.Model:
        """Change a model."""
        found = Violations()
        wanted = update_model_from_proto(request, found)
        found.raise_if_any()
        return model_to_proto(await self._service.update_model(self._organization, wanted))

    async def DeleteModel(self, request: pb.DeleteModelRequest, context: Context[pb.DeleteModelRequest, Empty]) -> Empty:
        """Delete a model."""
        await self._service.delete_model(self._organization, request.model_id)
        return Empty()

    async def CreateFineTunedModel(
        self,
        request: pb.CreateFineTunedModelRequest,
        context: Context[pb.CreateFineTunedModelRequest, pb.CreateFineTunedModelResponse],
    ) -> pb.CreateFineTunedModelResponse:
        """Start a fine-tuning."""
        found = Violations()
        wanted = create_fine_tuned_from_proto(request, found)
        return fine_tuned_to_proto(
            await create_or_refuse(wanted, found, partial(self._service.create_fine_tuned_model, self._organization))
        )

    async def EstimateFineTune(
        self, request: pb.EstimateFineTuneRequest, context: Context[pb.EstimateFineTuneRequest, estimate_pb2.Estimate]
    ) -> estimate_pb2.Estimate:
        """Say what a fine-tuning would need."""
        found = Violations()
        wanted = create_fine_tuned_from_proto(request.fine_tune, found)
        await refuse_all_bad(found, lambda: self._service.estimate_fine_tune(self._organization, wanted))
        return estimate_to_proto(await self._service.estimate_fine_tune(self._organization, wanted))

    async def ListModelVersions(
        self, request: pb.ListModelVersionsRequest, context: Context[pb.ListModelVersionsRequest, pb.ListModelVersionsResponse]
    ) -> pb.ListModelVersionsResponse:
        """List a model's versions."""
        listed = await self._versions.list(self._organization, list_versions_from_proto(request))
        versions = [version_to_proto(version) for version in listed.items]
        return pb.ListModelVersionsResponse(versions=versions, next_page_token=listed.next_page_token)

    async def GetModelVersion(
        self, request: pb.GetModelVersionRequest, context: Context[pb.GetModelVersionRequest, model_version_pb2.ModelVersion]
    ) -> model_version_pb2.ModelVersion:
        """Read a version."""
        return version_to_proto(await self._versions.get(self._organization, request.model_id, request.version))

    async def PromoteModelVersion(
        self, request: pb.PromoteModelVersionRequest, context: Context[pb.PromoteModelVersionRequest, model_pb2.Model]
    ) -> model_pb2.Model:
        """Let a version answer."""
        return model_to_proto(await self._versions.promote(self._organization, request.model_id, request.version))

    async def DeleteModelVersion(
        self, request: pb.DeleteModelVersionRequest, context: Context[pb.DeleteModelVersionRequest, Empty]
    ) -> Empty:
        """Delete a version."""
        await self._versions.delete(self._organization, request.model_id, request.version)
        return Empty()

    async def ExportModelVersion(
        self, request: pb.ExportModelVersionRequest, context: Context[pb.ExportModelVersionRequest, pb.ExportModelVersionResponse]
    ) -> pb.ExportModelVersionResponse:
        """Start an export."""
        found = Violations()
        wanted = export_from_proto(request, found)
        found.raise_if_any()
        return pb.ExportModelVersionResponse(training_job=job_to_proto(await self._versions.export(self._organization, wanted)))

    async def ListModelFiles(
        self, request: pb.ListModelFilesRequest, context: Context[pb.ListModelFilesRequest, pb.ListModelFilesResponse]
    ) -> pb.ListModelFilesResponse:
        """List the files of a version or export."""
        return files_to_proto(await self._versions.list_files(self._organization, files_from_proto(request)))

    async def DownloadModelFile(
        self, request: pb.DownloadModelFileRequest, context: Context[pb.DownloadModelFileRequest, HttpBody]
    ) -> AsyncGenerator[HttpBody, None]:
        """Stream a file."""
        pieces = self._versions.read_file(self._organization, files_from_proto(request), request.path)
        async with aclosing(pieces) as opened:
            async for piece in opened:
                yield HttpBody(content_type=content_type(request.path), data=piece)

    async def DownloadModelArchive(
        self, request: pb.DownloadModelArchiveRequest, context: Context[pb.DownloadModelArchiveRequest, HttpBody]
    ) -> AsyncGenerator[HttpBody, None]:
        """Stream all files."""
        pieces = self._versions.read_archive(self._organization, files_from_proto(request))
        async with aclosing(pieces) as opened:
            async for piece in opened:
                yield HttpBody(content_type=ARCHIVE_TYPE, data=piece)

    async def CreateRagModel(
        self, request: pb.CreateRagModelRequest, context: Context[pb.CreateRagModelRequest, pb.CreateRagModelResponse]
    ) -> pb.CreateRagModelResponse:
        """Make a RAG model."""
        found = Violations()
        wanted = create_rag_from_proto(request, found)
        return rag_created_to_proto(await create_or_refuse(wanted, found, partial(self._service.create_rag_model, self._organization)))

    async def ReindexModel(
        self, request: pb.ReindexModelRequest, context: Context[pb.ReindexModelRequest, pb.ReindexModelResponse]
    ) -> pb.ReindexModelResponse:
        """Start building another index."""
        return reindexed_to_proto(await self._service.reindex_model(self._organization, reindex_from_proto(request)))

    async def UploadDocument(
        self, request_iterator: AsyncIterator[pb.UploadDocumentRequest], context: Context[pb.UploadDocumentRequest, document_pb2.Document]
    ) -> document_pb2.Document:
        """Store a file as it comes."""
        first = await anext(request_iterator, pb.UploadDocumentRequest())
        found = Violations()
        wanted = upload_document_from_proto(first, found)
        found.raise_if_any()
        return document_to_proto(await self._service.documents.upload(self._organization, wanted, _read_data(first, request_iterator)))

    async def ImportDocument(
        self, request: pb.ImportDocumentRequest, context: Context[pb.ImportDocumentRequest, document_pb2.Document]
    ) -> document_pb2.Document:
        """Store a file that lies elsewhere."""
        found = Violations()
        wanted = import_document_from_proto(request, found)
        found.raise_if_any()
        return document_to_proto(await self._service.documents.import_(self._organization, wanted))

    async def DownloadDocumentText(
        self, request: pb.DownloadDocumentTextRequest, context: Context[pb.DownloadDocumentTextRequest, HttpBody]
    ) -> AsyncGenerator[HttpBody, None]:
        """Stream a document's text."""
        async with aclosing(self._service.documents.read_text(self._organization, request.model_id, request.document_id)) as opened:
            async for piece in opened:
                yield HttpBody(content_type=CONTENT_TYPES[None], data=piece)

    async def DownloadDocumentContent(
        self, request: pb.DownloadDocumentContentRequest, context: Context[pb.DownloadDocumentContentRequest, HttpBody]
    ) -> AsyncGenerator[HttpBody, None]:
        """Stream a document as it was given."""
        form, pieces = await self._service.documents.read_original(self._organization, request.model_id, request.document_id)
        async with aclosing(pieces) as opened:
            async for piece in opened:
                yield HttpBody(content_type=CONTENT_TYPES.get(form, OTHER_CONTENT_TYPE), data=piece)

    async def AddDocuments(
        self, request: pb.AddDocumentsRequest, context: Context[pb.AddDocumentsRequest, pb.AddDocumentsResponse]
    ) -> pb.AddDocumentsResponse:
        """Add documents to a RAG model."""
        found = Violations()
        wanted = add_documents_from_proto(request, found)
        documents, job = await create_or_refuse(wanted, found, partial(self._service.documents.add, self._organization))
        added = [document_to_proto(document) for document in documents]
        return pb.AddDocumentsResponse(documents=added, training_job=job_to_proto(job) if job else None)

    async def ListDocuments(
        self, request: pb.ListDocumentsRequest, context: Context[pb.ListDocumentsRequest, pb.ListDocumentsResponse]
    ) -> pb.ListDocumentsResponse:
        """List a RAG model's documents."""
        found = Violations()
        wanted = list_documents_from_proto(request, found)
        found.raise_if_any()
        listed = await self._service.documents.list(self._organization, wanted)
        documents = [document_to_proto(document) for document in listed.items]
        return pb.ListDocumentsResponse(documents=documents, next_page_token=listed.next_page_token)

    async def GetDocument(
        self, request: pb.GetDocumentRequest, context: Context[pb.GetDocumentRequest, document_pb2.Document]
    ) -> document_pb2.Document:
        """Read a document."""
        return document_to_proto(await self._service.documents.get(self._organization, request.model_id, request.document_id))

    async def DeleteDocument(self, request: pb.DeleteDocumentRequest, context: Context[pb.DeleteDocumentRequest, Empty]) -> Empty:
        """Delete a document."""
        await self._service.documents.delete(self._organization, request.model_id, request.document_id)
        return Empty()

    async def ListBaseModels(
        self, request: pb.ListBaseModelsRequest, context: Context[pb.ListBaseModelsRequest, pb.ListBaseModelsResponse]
    ) -> pb.ListBaseModelsResponse:
        """List the catalogue's base models. In a thread: it looks at the disk."""
        listed = await asyncio.to_thread(self._service.list_base_models, page_from_proto(request))
        models = [base_model_to_proto(model, is_present) for model, is_present in listed.items]
        return pb.ListBaseModelsResponse(base_models=models, next_page_token=listed.next_page_token)

    async def ListEmbeddingModels(
        self, request: pb.ListEmbeddingModelsRequest, context: Context[pb.ListEmbeddingModelsRequest, pb.ListEmbeddingModelsResponse]
    ) -> pb.ListEmbeddingModelsResponse:
        """List the catalogue's embedding models. In a thread: it looks at the disk."""
        listed = await asyncio.to_thread(self._service.list_embedding_models, page_from_proto(request))
        models = [embedding_model_to_proto(model, is_present) for model, is_present in listed.items]
        return pb.ListEmbeddingModelsResponse(embedding_models=models, next_page_token=listed.next_page_token)


async def _read_data(first: pb.UploadDocumentRequest, rest: AsyncIterator[pb.UploadDocumentRequest]) -> AsyncIterator[bytes]:
    """Give the bytes of each message."""
    yield first.data.data
    async for message in rest:
        yield message.data.data
