"""The server as a whole: light to import, honest about its health, found by reflection, stopped without leaving anybody waiting."""

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from modeltraining.v1 import (
    job_event_pb2,
    message_pb2,
    model_service_pb2,
    model_service_pb2_grpc,
    training_service_pb2,
    training_service_pb2_grpc,
)

from server.api.server import SERVICE_NAMES, ApiServer
from tests.api.conftest import Api

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "peft", "sqlalchemy", "psycopg", "numpy", "numba")
States = health_pb2.HealthCheckResponse
Watch: TypeAlias = "aio.UnaryStreamCall[training_service_pb2.WatchTrainingJobRequest, job_event_pb2.JobEvent]"


def test_importing_the_api_loads_no_heavy_library() -> None:
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "server" / "api").rglob("*.py")]
    code = f"import sys, {', '.join(modules)}; print([name for name in {HEAVY!r} if name in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={"PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}"}, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


async def create_job(api: Api) -> str:
    """Start a fine-tuning that no worker will ever take, and give its job."""
    stub = model_service_pb2_grpc.ModelServiceStub(api.channel)
    record = message_pb2.TrainingRecord(prompt="1 + 1 =", completion=" 2")
    request = model_service_pb2.CreateFineTunedModelRequest(
        display_name="m", base_model="HuggingFaceTB/SmolLM2-135M-Instruct", inline_records=[record]
    )
    made = await stub.CreateFineTunedModel(request)
    return made.training_job.job_id


async def test_every_service_says_that_it_serves(api: Api) -> None:
    stub: Any = health_pb2_grpc.HealthStub(api.channel)  # its stubs name no methods
    for name in ("", *SERVICE_NAMES):
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
        assert answer.status == States.SERVING
    await api.server.report_health("modeltraining.v1.InferenceService", is_serving=False)
    answer = await stub.Check(health_pb2.HealthCheckRequest(service="modeltraining.v1.InferenceService"))
    assert answer.status == States.NOT_SERVING


async def test_tools_find_the_services_by_reflection(api: Api) -> None:
    def list_services() -> list[str]:
        with grpc.insecure_channel(f"127.0.0.1:{api.port}") as channel:
            return list(ProtoReflectionDescriptorDatabase(channel).get_services())

    assert set(SERVICE_NAMES) <= set(await asyncio.to_thread(list_services))


async def test_a_stop_tells_health_first_and_sends_watchers_away(api: Api) -> None:
    job_id = await create_job(api)
    call = training_service_pb2_grpc.TrainingServiceStub(api.channel).WatchTrainingJob(
        training_service_pb2.WatchTrainingJobRequest(job_id=job_id)
    )
    stub: Any = health_pb2_grpc.HealthStub(api.channel)
    health = stub.Watch(health_pb2.HealthCheckRequest())
    assert (await health.read()).status == States.SERVING
    first = await call.read()
    assert isinstance(first, job_event_pb2.JobEvent)
    assert first.WhichOneof("payload") == "snapshot"
    stopping = asyncio.create_task(api.server.stop(5))
    assert (await health.read()).status == States.NOT_SERVING
    health.cancel()
    seen: list[job_event_pb2.JobEvent] = []
    with pytest.raises(aio.AioRpcError) as end:
        await read_all(call, seen)
    assert end.value.code() is grpc.StatusCode.UNAVAILABLE
    assert seen[-1].WhichOneof("payload") == "error"
    await asyncio.wait_for(stopping, 5)


async def read_all(call: Watch, seen: list[job_event_pb2.JobEvent]) -> None:
    """Read a stream to its end. Raises AioRpcError where that is an error."""
    while isinstance(event := await call.read(), job_event_pb2.JobEvent):
        seen.append(event)


async def test_a_port_in_use_is_refused(api: Api) -> None:
    second = ApiServer(api.services, "default", f"127.0.0.1:{api.port}")
    with pytest.raises(OSError, match=str(api.port)):
        await second.start()
    await second.stop(0)
