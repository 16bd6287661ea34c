"""The compose file: parsed, held against the settings, the image's recipe and the gateway; Envoy itself judges its configuration."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from sqlalchemy.engine import make_url

from server.__main__ import ROLES
from server.settings import Settings
from tests.deployment.dockerfile import DOCKERFILE, REPOSITORY, copied_from_repository, image_environment
from tests.deployment.variables import variable_names

OUR_IMAGE = "llm-platform/model-training"
Service = dict[str, Any]


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    text = (REPOSITORY / "docker-compose.yml").read_text(encoding="utf-8")
    # As `docker-compose` does where nothing is set outside.
    parsed: dict[str, Any] = yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text))
    return parsed


@pytest.fixture(scope="module")
def services(compose: dict[str, Any]) -> dict[str, Service]:
    found: dict[str, Service] = compose["services"]
    return found


@pytest.fixture(scope="module")
def roles(services: dict[str, Service]) -> dict[str, Service]:
    return {name: service for name, service in services.items() if service["image"] == OUR_IMAGE}


def test_one_image_serves_every_role(roles: dict[str, Service]) -> None:
    assert {name: service["command"] for name, service in roles.items()} == {
        "model-training": ["api"],
        "worker": ["worker"],
        "engine": ["engine"],
        "migrate": ["migrate"],
    }
    for service in roles.values():
        assert service["command"][0] in ROLES
        assert (REPOSITORY / service["build"]["context"] / service["build"]["dockerfile"]).samefile(DOCKERFILE)


def test_starting_model_training_starts_every_service(services: dict[str, Service]) -> None:
    started: set[str] = set()
    waiting = ["model-training"]
    while waiting:
        name = waiting.pop()
        started.add(name)
        waiting += [other for other in services[name].get("depends_on", {}) if other not in started]
    assert started == set(services)


def test_each_role_gets_only_variables_that_the_settings_know_and_accept(roles: dict[str, Service], tmp_path: Path) -> None:
    for name, service in roles.items():
        assert service["environment"].keys() <= variable_names(), name
        environment = {**image_environment(), **service["environment"], "DATA_DIRECTORY": str(tmp_path)}
        # What YAML reads as nothing arrives in the container as an empty text.
        settings = Settings.from_environment({variable: value or "" for variable, value in environment.items()})
        assert settings.max_training_jobs == 1
        assert settings.default_batch_size == 16


def test_the_roles_share_one_volume_for_files_and_the_engines_socket(compose: dict[str, Any], roles: dict[str, Service]) -> None:
    data = image_environment()["DATA_DIRECTORY"]
    for name, service in roles.items():
        assert service["volumes"] == [f"data:{data}"], name
        assert "ENGINE_SOCKET" not in service["environment"]
    assert Settings.from_environment({"DATA_DIRECTORY": data}).engine_socket.is_relative_to(data)
    assert set(compose["volumes"]) == {"data", "postgres"}


def test_the_database_url_names_the_database_that_is_made(services: dict[str, Service], roles: dict[str, Service]) -> None:
    made = services["postgres"]["environment"]
    for service in roles.values():
        url = make_url(service["environment"]["DATABASE_URL"])
        assert (url.username, url.password, url.database) == (made["POSTGRES_USER"], made["POSTGRES_PASSWORD"], made["POSTGRES_DB"])
        assert url.host in services
        assert url.port == 5432
    assert services["postgres"]["image"] == "pgvector/pgvector:pg18"
    assert "ports" not in services["postgres"], "its password is a default: it must not be reachable from outside"


def test_only_envoy_is_published_on_the_promised_port(services: dict[str, Service]) -> None:
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    environment = services["envoy"]["environment"]
    assert published == {"envoy": [f"{environment['HTTP_PORT']}:{environment['HTTP_PORT']}"]}
    assert environment["HTTP_PORT"] == image_environment()["HTTP_PORT"] == "8003"


def test_envoy_leads_to_the_port_that_the_api_listens_on(services: dict[str, Service]) -> None:
    environment = services["envoy"]["environment"]
    assert services[environment["GRPC_HOST"]]["command"] == ["api"]
    assert environment["GRPC_PORT"] == image_environment()["GRPC_PORT"]


def test_every_file_that_is_mounted_exists(services: dict[str, Service]) -> None:
    for name, service in services.items():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert not source.startswith(".") or (REPOSITORY / source).is_file(), (name, source)


def test_the_health_checks_run_what_is_in_the_image(services: dict[str, Service]) -> None:
    copied = {destination for _, destination in copied_from_repository()}
    test = services["model-training"]["healthcheck"]["test"]
    assert test[:2] == ["CMD", "python"]
    assert test[2] in copied
    assert test[3] == "grpc"


def test_envoy_accepts_the_gateway_as_its_container_fills_it_in(services: dict[str, Service], tmp_path: Path) -> None:
    envoy = services["envoy"]
    mounts = {parts[1]: REPOSITORY / parts[0] for parts in (volume.split(":") for volume in envoy["volumes"])}
    environment = dict(envoy["environment"])
    for variable in ("TEMPLATE", "DESCRIPTOR"):
        environment[variable] = str(mounts[environment[variable]])
    shell, script = envoy["entrypoint"]
    path = f"{Path(sys.executable).parent}:{os.defpath}"
    command = [shell, str(mounts[script]), "--mode", "validate"]
    variables = {**environment, "PATH": path, "TMPDIR": str(tmp_path)}
    result = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    filled = next(tmp_path.rglob("envoy.yaml")).read_text(encoding="utf-8")
    assert "$" not in filled, "a placeholder is left over"
    address = yaml.safe_load(filled)["static_resources"]["listeners"][0]["address"]["socket_address"]
    assert address == {"address": "0.0.0.0", "port_value": 8003}  # noqa: S104  # the container's outside address
