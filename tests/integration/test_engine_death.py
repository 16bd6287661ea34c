"""The engine killed under the whole stack: what ran ends typed, health tells it, and the next engine serves without anybody's help."""

import json
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import httpx
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.e2e.stack import Stack

STREAMS = 16
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE.value[0]
States = health_pb2.HealthCheckResponse


def _ask(tokens: int) -> Mapping[str, Any]:
    # A tiny model would be at its end before all have begun. Without its end tokens (0, 2) this one writes for 20 s.
    parameters = {"temperature": 0, "max_tokens": tokens, "logit_bias": {"0": -100, "2": -100}}
    return {"model_id": "smollm2", "prompt": "The river town", "parameters": parameters}


def _stream(stack: Stack, begun: threading.Barrier) -> Mapping[str, Any]:
    """Give the last message of a stream; meet the others at the first one."""
    last: Mapping[str, Any] = {}
    with httpx.stream("POST", stack.api + "/inference/stream", json=_ask(480), timeout=60) as response:
        for message in _read(response):
            if not last:
                begun.wait(30)
            last = message
    return last


def _read(response: httpx.Response) -> Iterator[Mapping[str, Any]]:
    for line in response.iter_lines():
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


def test_sixteen_streams_end_typed_when_the_engine_is_killed_and_another_takes_over(stack: Stack) -> None:
    before = httpx.post(stack.api + "/inference", json=_ask(8), timeout=60).json()["text"]
    engine = stack.wait_for_role("engine")
    begun = threading.Barrier(STREAMS, action=engine.kill)
    with ThreadPoolExecutor(STREAMS) as pool:
        ends = list(pool.map(lambda _: _stream(stack, begun), range(STREAMS)))
    assert [end["error"]["code"] for end in ends] == [UNAVAILABLE] * STREAMS
    with grpc.insecure_channel(stack.grpc_target) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)  # its stubs name no methods

        def tell(service: str) -> Any:
            return health.Check(health_pb2.HealthCheckRequest(service=service)).status

        stack.wait_until(lambda: tell("modeltraining.v1.InferenceService") == States.NOT_SERVING, 10)
        refused = httpx.post(stack.api + "/inference", json=_ask(8), timeout=60)
        if refused.status_code != httpx.codes.OK:  # the next engine may be there already
            assert refused.status_code == httpx.codes.SERVICE_UNAVAILABLE
            assert any("retryDelay" in str(detail) or "retry_delay" in str(detail) for detail in refused.json()["details"])
        assert tell("modeltraining.v1.ModelService") == States.SERVING
        stack.wait_until(lambda: tell("modeltraining.v1.InferenceService") == States.SERVING, 60)
    assert httpx.post(stack.api + "/inference", json=_ask(8), timeout=60).json()["text"] == before
