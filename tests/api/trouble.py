"""A servicer that does what the request tells it, behind the real boundary on a real server: for what no use case would do at will."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import grpc
from google.protobuf.message import Message
from google.rpc import status_pb2
from grpc import aio
from modeltraining.v1 import dataset_pb2, inference_service_pb2, inference_service_pb2_grpc, training_service_pb2, training_service_pb2_grpc

from server.api.boundary import Boundary
from server.api.server import FILES
from server.domain.errors import FieldViolation, InvalidInput, Unavailable

pb = inference_service_pb2
Detail = TypeVar("Detail", bound=Message)
INSIDE = "/srv/secret/path of the server"


def cancel_oneself() -> BaseException:
    """What happens when something inside cancels the task."""
    return asyncio.CancelledError()


TROUBLES: Mapping[str, Callable[[], BaseException]] = {
    "bug": lambda: RuntimeError(INSIDE),
    "invalid": lambda: InvalidInput.of([FieldViolation("prompt", "must not be empty")]),
    "unavailable": lambda: Unavailable("The engine is restarting.", retry_after_seconds=1.0),
    "cancelled": cancel_oneself,
}


@dataclass
class Trouble(inference_service_pb2_grpc.InferenceServiceServicer):
    """`model_id` says what happens: a key of TROUBLES raises, "hang" waits for ever, anything else goes well."""

    entered: asyncio.Event = field(default_factory=asyncio.Event)
    left: asyncio.Event = field(default_factory=asyncio.Event)

    async def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse]
    ) -> pb.GenerateResponse:
        await self._act(request.model_id)
        return pb.GenerateResponse(text="fine")

    async def StreamGenerate(  # noqa: N802
        self, request: pb.StreamGenerateRequest, context: aio.ServicerContext[pb.StreamGenerateRequest, pb.StreamGenerateResponse]
    ) -> AsyncGenerator[pb.StreamGenerateResponse, None]:
        """The prompt tells how many pieces come before the trouble."""
        for _ in range(int(request.prompt or "0")):
            yield pb.StreamGenerateResponse(delta=pb.Delta(text="piece"))
        await self._act(request.model_id)
        yield pb.StreamGenerateResponse(finished=pb.StreamGenerateResponse.Finished(model_id="fine"))

    async def _act(self, what: str) -> None:
        self.entered.set()
        try:
            if what == "hang":
                await asyncio.Event().wait()
            if what in TROUBLES:
                raise TROUBLES[what]()
        finally:
            self.left.set()


class Uploads(training_service_pb2_grpc.TrainingServiceServicer):
    """Takes an upload and fails after the first message if that is named "bug"."""

    async def UploadDataset(  # noqa: N802
        self,
        request_iterator: AsyncIterator[training_service_pb2.UploadDatasetRequest],
        context: aio.ServicerContext[training_service_pb2.UploadDatasetRequest, dataset_pb2.Dataset],
    ) -> dataset_pb2.Dataset:
        async for message in request_iterator:
            if message.display_name == "bug":
                raise RuntimeError(INSIDE)
        return dataset_pb2.Dataset(dataset_id="ds_1")


@dataclass(frozen=True)
class Client:
    """Stubs on a channel to the server, and the servicer behind it."""

    inference: "inference_service_pb2_grpc.InferenceServiceAsyncStub"  # known to the type checker only
    training: "training_service_pb2_grpc.TrainingServiceAsyncStub"
    servicer: Trouble
    server: aio.Server
    port: int


@asynccontextmanager
async def serve_trouble() -> AsyncIterator[Client]:
    """Run a server with the boundary, and connect to it."""
    servicer = Trouble()  # type: ignore[abstract]  # only these RPCs are called
    server = aio.server(interceptors=[Boundary(FILES)])
    inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)
    training_service_pb2_grpc.add_TrainingServiceServicer_to_server(Uploads(), server)  # type: ignore[abstract]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        inference = inference_service_pb2_grpc.InferenceServiceStub(channel)
        training = training_service_pb2_grpc.TrainingServiceStub(channel)
        yield Client(inference, training, servicer, server, port)
    await server.stop(0)


@dataclass(frozen=True)
class Outcome:
    """What a client saw of a stream: its messages, then how it ended."""

    messages: list[pb.StreamGenerateResponse]
    error: aio.AioRpcError | None

    @property
    def code(self) -> grpc.StatusCode:
        return self.error.code() if self.error else grpc.StatusCode.OK


async def read_stream(client: Client, model_id: str, pieces: int) -> Outcome:
    """Read a stream to its end, whichever that is."""
    messages: list[pb.StreamGenerateResponse] = []
    try:
        async for message in client.inference.StreamGenerate(pb.StreamGenerateRequest(model_id=model_id, prompt=str(pieces)), timeout=10):
            messages.append(message)
    except aio.AioRpcError as error:
        return Outcome(messages, error)
    return Outcome(messages, None)


def read_detail(status: status_pb2.Status, kind: type[Detail]) -> Detail | None:
    """Unpack the detail of a kind, if there is one."""
    detail = kind()
    return next((detail for packed in status.details if packed.Unpack(detail)), None)


def read_status(error: aio.AioRpcError) -> status_pb2.Status:
    """Read the google.rpc.Status out of the trailers."""
    trailers = dict(error.trailing_metadata() or ())
    details = trailers["grpc-status-details-bin"]
    assert isinstance(details, bytes)
    return status_pb2.Status.FromString(details)


def read_lines(records: Sequence[logging.LogRecord]) -> list[dict[str, object]]:
    """Read the fields of the lines of calls in a log."""
    lines: list[dict[str, object]] = [getattr(record, "fields", {}) for record in records]
    return [line for line in lines if line.get("event") == "rpc"]
