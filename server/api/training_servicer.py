"""TrainingService on the wire: decode, one call, encode."""
# ruff: noqa: N802  # methods are named as their RPCs are

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from google.api.httpbody_pb2 import HttpBody
from google.protobuf.empty_pb2 import Empty
from grpc import aio
from modeltraining.v1 import dataset_pb2, job_event_pb2, training_job_pb2
from modeltraining.v1 import training_service_pb2 as pb
from modeltraining.v1.training_service_pb2_grpc import TrainingServiceServicer

from server.api.decoding import page_from_proto
from server.api.mappers.datasets import (
    dataset_to_proto,
    import_from_proto,
    import_item_to_proto,
    preview_from_proto,
    preview_to_proto,
    upload_from_proto,
)
from server.api.mappers.events import watch_item_to_proto
from server.api.mappers.jobs import attempt_to_proto, checkpoint_to_proto, job_to_proto, list_jobs_from_proto, metrics_to_proto
from server.api.pacing import end_when_set
from server.services.batch_generation import BatchGeneration
from server.services.previews import Previews
from server.services.training_service import TrainingService
from server.services.validation import Violations

Context = aio.ServicerContext
RESULT_TYPE = "application/jsonl"


class TrainingServicer(TrainingServiceServicer):
    """The use cases of jobs and datasets, for one organization. Watches end when `stop` is set: they would never do by themselves."""

    def __init__(
        self, service: TrainingService, previews: Previews, batches: BatchGeneration, organization: str, stop: asyncio.Event
    ) -> None:
        self._service = service
        self._previews = previews
        self._batches = batches
        self._organization = organization
        self._stop = stop

    async def ListTrainingJobs(
        self, request: pb.ListTrainingJobsRequest, context: Context[pb.ListTrainingJobsRequest, pb.ListTrainingJobsResponse]
    ) -> pb.ListTrainingJobsResponse:
        """List jobs."""
        found = Violations()
        wanted = list_jobs_from_proto(request, found)
        found.raise_if_any()
        listed = await self._service.list_jobs(self._organization, wanted)
        jobs = [job_to_proto(job) for job in listed.items]
        return pb.ListTrainingJobsResponse(training_jobs=jobs, next_page_token=listed.next_page_token)

    async def GetTrainingJob(
        self, request: pb.GetTrainingJobRequest, context: Context[pb.GetTrainingJobRequest, training_job_pb2.TrainingJob]
    ) -> training_job_pb2.TrainingJob:
        """Read a job."""
        return job_to_proto(await self._service.get_job(self._organization, request.job_id))

    async def CancelTrainingJob(
        self, request: pb.CancelTrainingJobRequest, context: Context[pb.CancelTrainingJobRequest, training_job_pb2.TrainingJob]
    ) -> training_job_pb2.TrainingJob:
        """Cancel a job."""
        return job_to_proto(await self._service.control.cancel(self._organization, request.job_id))

    async def PauseTrainingJob(
        self, request: pb.PauseTrainingJobRequest, context: Context[pb.PauseTrainingJobRequest, training_job_pb2.TrainingJob]
    ) -> training_job_pb2.TrainingJob:
        """Pause a job."""
        return job_to_proto(await self._service.control.pause(self._organization, request.job_id))

    async def ResumeTrainingJob(
        self, request: pb.ResumeTrainingJobRequest, context: Context[pb.ResumeTrainingJobRequest, training_job_pb2.TrainingJob]
    ) -> training_job_pb2.TrainingJob:
        """Resume a job."""
        return job_to_proto(await self._service.control.resume(self._organization, request.job_id))

    async def RetryTrainingJob(
        self, request: pb.RetryTrainingJobRequest, context: Context[pb.RetryTrainingJobRequest, training_job_pb2.TrainingJob]
    ) -> training_job_pb2.TrainingJob:
        """Try a job again."""
        return job_to_proto(await self._service.control.retry(self._organization, request.job_id))

    async def ListTrainingJobAttempts(
        self,
        request: pb.ListTrainingJobAttemptsRequest,
        context: Context[pb.ListTrainingJobAttemptsRequest, pb.ListTrainingJobAttemptsResponse],
    ) -> pb.ListTrainingJobAttemptsResponse:
        """List the attempts at a job."""
        listed = await self._service.list_attempts(self._organization, request.job_id, page_from_proto(request))
        attempts = [attempt_to_proto(attempt) for attempt in listed.items]
        return pb.ListTrainingJobAttemptsResponse(attempts=attempts, next_page_token=listed.next_page_token)

    async def ListTrainingJobEvents(
        self,
        request: pb.ListTrainingJobEventsRequest,
        context: Context[pb.ListTrainingJobEventsRequest, pb.ListTrainingJobEventsResponse],
    ) -> pb.ListTrainingJobEventsResponse:
        """Read a page of a job's log."""
        size = request.page_size if request.HasField("page_size") else None
        events, following = await self._service.list_events(self._organization, request.job_id, request.after_sequence, size)
        found = [watch_item_to_proto(request.job_id, event) for event in events]
        return pb.ListTrainingJobEventsResponse(events=found, next_after_sequence=following)

    async def ListCheckpoints(
        self, request: pb.ListCheckpointsRequest, context: Context[pb.ListCheckpointsRequest, pb.ListCheckpointsResponse]
    ) -> pb.ListCheckpointsResponse:
        """List what a job could go on from."""
        found = await self._service.list_checkpoints(self._organization, request.job_id)
        return pb.ListCheckpointsResponse(checkpoints=[checkpoint_to_proto(checkpoint) for checkpoint in found])

    async def DownloadJobResult(
        self, request: pb.DownloadJobResultRequest, context: Context[pb.DownloadJobResultRequest, HttpBody]
    ) -> AsyncGenerator[HttpBody, None]:
        """Stream a job's result."""
        async with aclosing(self._batches.read_result(self._organization, request.job_id)) as pieces:
            async for piece in pieces:
                yield HttpBody(content_type=RESULT_TYPE, data=piece)

    async def WatchTrainingJob(
        self, request: pb.WatchTrainingJobRequest, context: Context[pb.WatchTrainingJobRequest, job_event_pb2.JobEvent]
    ) -> AsyncGenerator[job_event_pb2.JobEvent, None]:
        """Stream a job."""
        items = self._service.watch_job(self._organization, request.job_id, request.after_sequence)
        async with aclosing(end_when_set(items, self._stop)) as watched:
            async for item in watched:
                yield watch_item_to_proto(request.job_id, item)

    async def GetTrainingMetrics(
        self, request: pb.GetTrainingMetricsRequest, context: Context[pb.GetTrainingMetricsRequest, pb.GetTrainingMetricsResponse]
    ) -> pb.GetTrainingMetricsResponse:
        """Read a job's curves."""
        most = request.max_points if request.HasField("max_points") else None
        series = await self._service.get_metrics(self._organization, request.job_id, list(request.names), most)
        return metrics_to_proto(request.job_id, series)

    async def UploadDataset(
        self, request_iterator: AsyncIterator[pb.UploadDatasetRequest], context: Context[pb.UploadDatasetRequest, dataset_pb2.Dataset]
    ) -> dataset_pb2.Dataset:
        """Store an upload as it comes."""
        first = await anext(request_iterator, pb.UploadDatasetRequest())
        found = Violations()
        wanted = upload_from_proto(first, found)
        if found.found:
            found.name(wanted.display_name, "", wanted.request_id)
        found.raise_if_any()
        dataset = await self._service.datasets.upload(self._organization, wanted, _read_data(first, request_iterator))
        return dataset_to_proto(dataset)

    async def ImportDataset(
        self, request: pb.ImportDatasetRequest, context: Context[pb.ImportDatasetRequest, pb.ImportDatasetResponse]
    ) -> AsyncGenerator[pb.ImportDatasetResponse, None]:
        """Import a file, telling how far it is."""
        found = Violations()
        wanted = import_from_proto(request, found)
        found.raise_if_any()
        items = self._service.datasets.import_(self._organization, wanted)
        async with aclosing(end_when_set(items, self._stop)) as progress:
            async for item in progress:
                yield import_item_to_proto(item)

    async def PreviewDataset(
        self, request: pb.PreviewDatasetRequest, context: Context[pb.PreviewDatasetRequest, pb.PreviewDatasetResponse]
    ) -> pb.PreviewDatasetResponse:
        """Show records as a base model reads them."""
        found = Violations()
        wanted = preview_from_proto(request, found)
        found.raise_if_any()
        return preview_to_proto(await self._previews.preview(self._organization, wanted))

    async def ListDatasets(
        self, request: pb.ListDatasetsRequest, context: Context[pb.ListDatasetsRequest, pb.ListDatasetsResponse]
    ) -> pb.ListDatasetsResponse:
        """List datasets."""
        listed = await self._service.datasets.list(self._organization, page_from_proto(request))
        datasets = [dataset_to_proto(dataset) for dataset in listed.items]
        return pb.ListDatasetsResponse(datasets=datasets, next_page_token=listed.next_page_token)

    async def GetDataset(
        self, request: pb.GetDatasetRequest, context: Context[pb.GetDatasetRequest, dataset_pb2.Dataset]
    ) -> dataset_pb2.Dataset:
        """Read a dataset."""
        return dataset_to_proto(await self._service.datasets.get(self._organization, request.dataset_id))

    async def DeleteDataset(self, request: pb.DeleteDatasetRequest, context: Context[pb.DeleteDatasetRequest, Empty]) -> Empty:
        """Delete a dataset."""
        await self._service.datasets.delete(self._organization, request.dataset_id)
        return Empty()


async def _read_data(first: pb.UploadDatasetRequest, rest: AsyncIterator[pb.UploadDatasetRequest]) -> AsyncIterator[bytes]:
    """Give the bytes of each message."""
    yield first.data.data
    async for message in rest:
        yield message.data.data
