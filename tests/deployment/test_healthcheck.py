"""The containers' health check, asked of real servers that are well and unwell."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from tests.deployment.dockerfile import REPOSITORY

SCRIPT = REPOSITORY / "deployment" / "docker" / "healthcheck.py"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class Gateway(BaseHTTPRequestHandler):
    """Answers as the gateway does: /healthz with what the server was told, anything else with 404."""

    def do_GET(self) -> None:  # http.server finds its handlers by this name
        self.send_response(GATEWAY_STATUS[0] if self.path == "/healthz" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


GATEWAY_STATUS = [200]


@pytest.fixture(scope="module")
def gateway_port() -> Iterator[int]:
    with HTTPServer(("127.0.0.1", 0), Gateway) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.fixture
def api() -> Iterator[tuple[int, health.HealthServicer]]:
    server = grpc.server(ThreadPoolExecutor(2))
    servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield port, servicer
    server.stop(None)


def check(way: str, **ports: int) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.defpath, **{name: str(port) for name, port in ports.items()}}
    return subprocess.run([sys.executable, SCRIPT, way], env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(("status", "exit_code"), [(200, 0), (503, 1)])
def test_a_container_is_healthy_while_the_gateway_says_so(gateway_port: int, status: int, exit_code: int) -> None:
    GATEWAY_STATUS[0] = status
    assert check("http", HTTP_PORT=gateway_port).returncode == exit_code


def test_the_api_is_healthy_only_while_it_serves(api: tuple[int, health.HealthServicer]) -> None:
    port, servicer = api
    servicer.set("", SERVING)
    assert check("grpc", GRPC_PORT=port).returncode == 0
    servicer.set("", NOT_SERVING)
    result = check("grpc", GRPC_PORT=port)
    assert (result.returncode, result.stderr) == (1, f"the api on port {port} is not SERVING\n")


def test_an_api_that_is_not_there_is_unhealthy_in_one_sentence() -> None:
    result = check("grpc", GRPC_PORT=1)
    assert result.returncode == 1
    assert result.stderr.strip() == "grpc.health.v1.Health/Check on port 1: UNAVAILABLE"
