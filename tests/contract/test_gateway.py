"""Envoy's configuration against Envoy itself and against the contract: what is written by hand in one must be in the other."""

import subprocess
import sys
from pathlib import Path
from string import Template
from typing import Any

import pytest
import yaml

from tests.contract.test_contract import DESCRIPTOR_SET, read_files, read_methods

TEMPLATE = Path(__file__).parents[2] / "gateway" / "envoy.yaml"
ENVOY = Path(sys.executable).parent / "envoy"


def render(descriptor_path: Path = DESCRIPTOR_SET) -> str:
    """Fill in every placeholder; an unknown or missing one is an error."""
    return Template(TEMPLATE.read_text()).substitute(
        bind_address="127.0.0.1", http_port=8003, grpc_host="127.0.0.1", grpc_port=50051, descriptor_path=descriptor_path
    )


def validate(configuration: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Let Envoy check a configuration without serving it."""
    path = directory / "envoy.yaml"
    path.write_text(configuration)
    return subprocess.run(
        [ENVOY, "--mode", "validate", "-c", path, "--disable-hot-restart"], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture(scope="module")
def http_manager() -> dict[str, Any]:
    """The configuration of the one listener."""
    manager: dict[str, Any] = yaml.safe_load(render())["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    return manager


def test_envoy_accepts_the_configuration(tmp_path: Path) -> None:
    result = validate(render(), tmp_path)
    assert result.returncode == 0, result.stderr
    assert "deprecated" not in result.stderr.lower()


def test_envoy_refuses_a_service_that_the_descriptor_lacks(tmp_path: Path) -> None:
    result = validate(render().replace("- modeltraining.v1.ModelService", "- modeltraining.v1.NoService"), tmp_path)
    assert result.returncode != 0


def test_every_service_is_transcoded(http_manager: dict[str, Any]) -> None:
    transcoder = next(item for item in http_manager["http_filters"] if item["name"].endswith("grpc_json_transcoder"))
    services = {f"{file.package}.{service.name}" for file in read_files() for service in file.service}
    assert set(transcoder["typed_config"]["services"]) == services


def test_every_stream_has_a_route_without_a_time_limit(http_manager: dict[str, Any]) -> None:
    routes = http_manager["route_config"]["virtual_hosts"][0]["routes"]
    endless = {route["match"]["path"] for route in routes if "path" in route["match"] and route.get("route", {}).get("timeout") == "0s"}
    streams = {
        f"/modeltraining.v1.{name.replace('.', '/')}"
        for name, method in read_methods()
        if method.server_streaming or method.client_streaming
    }
    assert endless == streams


def test_no_route_sets_both_time_limits(http_manager: dict[str, Any]) -> None:
    """Where max_stream_duration is set, `timeout` does not fire."""
    for route in http_manager["route_config"]["virtual_hosts"][0]["routes"]:
        assert "max_stream_duration" not in route.get("route", {})


def test_nothing_can_be_administered_from_outside() -> None:
    assert "admin" not in yaml.safe_load(render())
