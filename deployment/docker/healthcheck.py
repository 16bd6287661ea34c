"""Asks this container's service whether it serves: `http` through Envoy, `grpc` the api alone. Exits 0 if so, else 1 with a sentence."""

import os
import sys
import urllib.error
import urllib.request

TIMEOUT_SECONDS = 4.0


def check_http(port: str) -> str | None:
    """Ask Envoy, which asks the api. Give what is wrong, or None."""
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=TIMEOUT_SECONDS).close()
    except (urllib.error.URLError, OSError) as error:
        return f"GET /healthz on port {port}: {error}"
    return None


def check_grpc(port: str) -> str | None:
    """Ask the api's own health service. Give what is wrong, or None."""
    # Here, so that the check by HTTP stays quick.
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_SECONDS)
        except grpc.RpcError as error:
            return f"grpc.health.v1.Health/Check on port {port}: {error.code().name}"
    serving = health_pb2.HealthCheckResponse.SERVING
    return None if answer.status == serving else f"the api on port {port} is not SERVING"


def main(way: str) -> int:
    """Check one way; the ports are the service's own variables."""
    problem = check_grpc(os.environ.get("GRPC_PORT", "50051")) if way == "grpc" else check_http(os.environ.get("HTTP_PORT", "8003"))
    if problem:
        print(problem, file=sys.stderr)
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
