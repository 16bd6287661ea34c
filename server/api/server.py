"""The api's gRPC server: all services behind the boundary, health and reflection; started, told of health, stopped gracefully."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import OVERALL_HEALTH
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection
from modeltraining.v1 import (
    inference_service_pb2,
    inference_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
    training_service_pb2,
    training_service_pb2_grpc,
)

from server.api.boundary import Boundary
from server.api.inference_servicer import InferenceServicer
from server.api.model_servicer import ModelServicer
from server.api.training_servicer import TrainingServicer
from server.services.batch_generation import BatchGeneration
from server.services.inference_service import InferenceService
from server.services.model_service import ModelService
from server.services.previews import Previews
from server.services.training_service import TrainingService
from server.services.versions import Versions

FILES = (model_service_pb2.DESCRIPTOR, training_service_pb2.DESCRIPTOR, inference_service_pb2.DESCRIPTOR)
SERVICE_NAMES: Sequence[str] = [service.full_name for file in FILES for service in file.services_by_name.values()]

MAX_REQUEST_BYTES = 32 << 20  # the same as the gateway's buffer
MAX_RESPONSE_BYTES = 64 << 20  # a page of 1,000 fits

OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    ("grpc.max_send_message_length", MAX_RESPONSE_BYTES),
    # A port in use is an error, not a share of somebody else's calls.
    ("grpc.so_reuseport", 0),
    # A client that vanished without a word is found within 40 s, and its stream ends.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # By default a client that pings more often than every 300 s is cut off ("too many pings"): long streams need more.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
)


@dataclass(frozen=True, slots=True)
class Services:
    """The use cases that the server offers."""

    models: ModelService
    training: TrainingService
    inference: InferenceService
    versions: Versions
    previews: Previews
    batches: BatchGeneration


class ApiServer:
    """Serves one organization's use cases at one address. Make, start and stop it in the same event loop."""

    def __init__(self, services: Services, organization: str, address: str) -> None:
        self._address = address
        self._stopping = asyncio.Event()
        self._health = health_aio.HealthServicer()
        self._server = aio.server(interceptors=[Boundary(FILES)], options=OPTIONS)
        models = ModelServicer(services.models, services.versions, organization)
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(models, self._server)
        training = TrainingServicer(services.training, services.previews, services.batches, organization, self._stopping)
        training_service_pb2_grpc.add_TrainingServiceServicer_to_server(training, self._server)
        inference = InferenceServicer(services.inference, services.batches, organization)
        inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(inference, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection([*SERVICE_NAMES, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name], self._server)

    async def start(self) -> int:
        """Listen, say SERVING, and give the port. Raises OSError when the address is in use."""
        try:
            port = self._server.add_insecure_port(self._address)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {self._address}") from error
        await self._server.start()
        for name in (OVERALL_HEALTH, *SERVICE_NAMES):
            await self.report_health(name, is_serving=True)
        return port

    async def report_health(self, service_name: str, is_serving: bool) -> None:
        """Say whether a service (by full name; empty: the whole) can do its work, as grpc.health.v1 tells it."""
        states = health_pb2.HealthCheckResponse
        await self._health.set(service_name, states.SERVING if is_serving else states.NOT_SERVING)

    async def stop(self, grace_seconds: float) -> None:
        """Stop: say NOT_SERVING, send watchers away, let other calls end for so long, then end them with a status."""
        await self._health.enter_graceful_shutdown()
        self._stopping.set()
        await self._server.stop(grace_seconds)

    async def wait(self) -> None:
        """Wait until the server was stopped."""
        await self._server.wait_for_termination()
